"""The public functions of the core that take plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .blocks import score_blocks
from .checkpoints import Checkpoints
from .choice import choose
from .heldout import HeldOut
from .members import member_losses
from .quality import SelfLDS, estimate
from .spectrum import Setting

_ROWS = 16_384


def scores(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike | None = None,
    estimator: str = "auto",
    noise: float | NDArray[np.float64] | None = None,
    rho: float | None = None,
    earlier: Checkpoints | None = None,
) -> NDArray[Any]:
    """Attribution scores of every training example to every test example.

    Args:
        train_loss_KN: (K, N) per-example losses of K members, nats; NaN = missing.
        test_loss_KM: (K, M) per-example losses, nats; NaN = missing.
        inclusion_KN: (K, N) whether training example i is in member k's subset.
        estimator: a name in `ESTIMATORS`, or "auto" (see `choose`).
        noise: standard deviation of the scoring noise of one training loss, nats, or (N,) of them.
        rho: for members started from the target, their learning-rate time relative to the target's (METHOD item 6).
        earlier: losses of the same members at earlier checkpoints, which are further rows; see `checkpoints`. Named
            estimators use them where they are given.

    Returns:
        (N, M) scores; positive = helpful: up-weighting the training example lowers the test example's loss. Units are
        nats^2 for covariance, none for correlation and whitened, nats for the others, up to a factor common to all
        pairs. NaN where fewer than two members have both losses. float32 if both loss matrices are and no entry is
        missing.

    Raises:
        DataError, NotEnoughMembersError, ConfigurationError: see `member_losses` and the estimator.
    """
    members = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, earlier)
    choice = choose(members, estimator, Setting(noise, rho))
    blocks = score_blocks(choice.estimator, members, choice.setting)
    parts = [blocks.block(slice(start, start + _ROWS), slice(None)) for start in range(0, blocks.shape[0], _ROWS)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def self_lds(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike,
    estimator: str = "auto",
    noise: float | NDArray[np.float64] | None = None,
    rho: float | None = None,
    earlier: Checkpoints | None = None,
) -> SelfLDS:
    """The quality of a run, estimated from its own members; see `quality`.

    Args: as for `scores`; the inclusion matrix is needed.

    Returns:
        SelfLDS with .value, .low, .high (95 % bootstrap over members) and .estimator.

    Raises:
        NotEnoughMembersError: fewer than 8 members. Otherwise as `scores`.
    """
    members = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, earlier)
    part, rows, _ = members.observed()
    choice = choose(part, estimator, Setting(noise, rho).of_examples(rows, members.train_KN.shape[1]))
    return estimate(HeldOut(part), (choice.estimator, choice.setting))
