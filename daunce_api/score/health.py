"""What the measured log-probabilities say about the endpoint: its noise, and whether it serves the fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..attribution import Attribution
from ..errors import MembersAlikeError

FloatArray = npt.NDArray[np.float64]

SERVES_BASE_RATIO = 1.5
"""Members whose losses vary less than this many times the measurement noise (as variances) cannot be told apart."""


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


def check_served(attribution: Attribution, models: Mapping[int, str]) -> None:
    """Raises MembersAlikeError where the members' answers show that the endpoint does not serve the fine-tunes.

    ``models``: ids of the members' models, for the message.
    """
    members = np.array(attribution.members)

    def check(loss_KX: FloatArray, member_K: npt.NDArray[np.int64], which: str = "") -> None:
        names = [f"{models.get(int(k), f'member {k}')}{which}" for k in member_K]
        try:
            check_members_differ(loss_KX, names, sigma=attribution.noise or 0.0)
        except MembersAlikeError as error:
            rows = error.members
            raise MembersAlikeError(str(error), rows and [int(member_K[row]) for row in rows]) from error

    check(np.concatenate([attribution.test_loss_KM, attribution.train_loss_KN], axis=1), members)
    if attribution.earlier is None:
        return
    for train_KN, test_KM in zip(attribution.earlier.train_loss_SKN, attribution.earlier.test_loss_SKM, strict=True):
        loss_KX = np.concatenate([test_KM, train_KN], axis=1)
        has_K = np.isfinite(loss_KX).any(axis=1)
        check(loss_KX[has_K], members[has_K], " (checkpoint)")
