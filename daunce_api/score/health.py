"""What the measured log-probabilities say about the endpoint: its noise, and whether it serves the fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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
