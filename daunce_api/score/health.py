"""What the measured log-probabilities say about the endpoint: its noise, and whether it serves the fine-tunes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.losses import Reduction
from ..errors import MembersAlikeError
from ..providers.base import TokenScores
from ..store import RunStore

FloatArray = npt.NDArray[np.float64]

SERVES_BASE_RATIO = 1.5
"""Members whose losses vary less than this many times the measurement noise (as variances) cannot be told apart."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of one measurement, from examples that were scored twice.

    ``sigma_token`` is of one token's log-probability, ``sigma_example`` of an example's loss, both in nats;
    ``pairs`` is the number of (member, example) pairs behind them. Zero pairs: not measured, sigmas are NaN.
    """

    sigma_token: float
    sigma_example: float
    pairs: int


def measure_noise(store: RunStore, members: Iterable[int], reduction: Reduction = "mean") -> Noise:
    """Noise from replicates 0 and 1 of these members; examples with censored tokens are left out. ``reduction``: how
    token losses become an example's (nats per token, or their sum).

    A difference of two measurements has twice the variance of one.
    """
    per_token: list[FloatArray] = []
    for member in members:
        again = store.scores.load(member, replicate=1)
        repeated = again.scores()
        first = store.scores.load_some(again.ids, member).scores() if repeated else {}
        per_token += [
            _difference(first[key], again) for key, again in repeated.items() if _usable(first.get(key), again)
        ]
    if not per_token:
        return Noise(float("nan"), float("nan"), 0)
    token = float(np.sqrt(np.mean(np.concatenate(per_token) ** 2) / 2))
    reduce = np.mean if reduction == "mean" else np.sum
    example = float(np.sqrt(np.mean([reduce(d) ** 2 for d in per_token]) / 2))
    return Noise(token, example, len(per_token))


def _usable(first: TokenScores | None, again: TokenScores) -> bool:
    return first is not None and not first.any_censored and not again.any_censored


def _difference(first: TokenScores, again: TokenScores) -> FloatArray:
    return np.asarray(first.logprobs, dtype=np.float64) - np.asarray(again.logprobs, dtype=np.float64)


def check_members_differ(loss_KN: FloatArray, models: Sequence[str], *, sigma: float = 0.0) -> None:
    """Fine-tunes on different subsets must answer differently.

    ``loss_KN`` holds per-example losses in nats (NaN where not measured), ``models`` the K model ids, ``sigma`` the
    noise of one loss. Raises MembersAlikeError where all members give the same losses up to the noise (the server
    answers with the base model, or training changed nothing), or where two members give exactly the same losses (one
    adapter is served under two names; its ``members`` are their rows). Fewer than two members or no examples: nothing
    can be said, nothing is raised.
    """
    loss_KN = np.asarray(loss_KN, dtype=np.float64)
    if loss_KN.shape[0] < 2 or loss_KN.shape[1] == 0:
        return
    complete_N = np.isfinite(loss_KN).all(axis=0)
    if complete_N.any():
        variance = float(np.mean(np.var(loss_KN[:, complete_N], axis=0, ddof=1)))
        if variance <= SERVES_BASE_RATIO * sigma**2:
            raise MembersAlikeError(
                f"all {len(models)} fine-tuned models give the same losses (variance over models {variance:.3g} nats², "
                f"measurement noise {sigma**2:.3g}). Either the server answers with the base model whatever model is "
                "asked for, or training changed nothing. The scores mean nothing. Check that each fine-tune is loaded "
                "under its own name, and the learning rate and epochs."
            )
    first_with: dict[bytes, int] = {}
    for k, row_N in enumerate(loss_KN):
        if not np.isfinite(row_N).any():
            continue
        twin = first_with.setdefault(row_N.tobytes(), k)
        if twin != k:
            raise MembersAlikeError(
                f"models {models[twin]!r} and {models[k]!r} give exactly the same losses on every example: the server "
                "answers with one of them for both. Check that each fine-tune is loaded under its own name.",
                (twin, k),
            )
