"""The two loss matrices and the inclusion matrix, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from daunce_api.errors import DataError, NotEnoughMembersError

Floats: TypeAlias = NDArray[Any]  # float32 or float64; NumPy's own float generics do not survive most operations


@dataclass(frozen=True, eq=False)
class MemberLosses:
    """Losses of the members that can be used, all of one floating type.

    Attributes:
        train_KN: (K, N) loss of training example i under member k, nats.
        test_KM: (K, M) loss of test example j under member k, nats.
        inclusion_KN: (K, N) bool or multiplicities, or None when unknown.
        kept: (K,) indices of these members among the rows that were given.
        complete: no entry is NaN.
    """

    train_KN: Floats
    test_KM: Floats
    inclusion_KN: Floats | None
    kept: NDArray[np.int64]
    complete: bool

    @property
    def count(self) -> int:
        """K, the number of usable members."""
        return int(self.train_KN.shape[0])

    def rows(self, members: ArrayLike) -> MemberLosses:
        """The same losses of some members only (indices or a boolean mask over the K usable ones)."""
        pick = np.asarray(members)
        return MemberLosses(
            self.train_KN[pick],
            self.test_KM[pick],
            None if self.inclusion_KN is None else self.inclusion_KN[pick],
            self.kept[pick],
            self.complete,
        )

    def test_columns(self, columns: ArrayLike) -> MemberLosses:
        """The same members with some test examples only."""
        return MemberLosses(
            self.train_KN, self.test_KM[:, np.asarray(columns)], self.inclusion_KN, self.kept, self.complete
        )


def member_losses(
    train_loss_KN: ArrayLike, test_loss_KM: ArrayLike, inclusion_KN: ArrayLike | None = None
) -> MemberLosses:
    """Check the loss matrices and leave out members that have no losses at all.

    Args:
        train_loss_KN: (K, N) losses in nats, NaN = missing. float32 stays float32 if both matrices are.
        test_loss_KM: (K, M) losses in nats, NaN = missing.
        inclusion_KN: (K, N) whether example i is in member k's subset (bool), or how often (bootstrap subsets).

    Returns:
        MemberLosses. A member whose row is all NaN in either matrix is left out.

    Raises:
        DataError: wrong shapes, infinite losses, or NaN in the inclusion matrix.
        NotEnoughMembersError: fewer than two members have losses.
    """
    train, test = np.asarray(train_loss_KN), np.asarray(test_loss_KM)
    dtype = np.float32 if train.dtype == test.dtype == np.float32 else np.float64
    train, test = train.astype(dtype, copy=False), test.astype(dtype, copy=False)
    if train.ndim != 2 or test.ndim != 2 or train.shape[0] != test.shape[0] or 0 in train.shape + test.shape:
        raise DataError(
            f"Losses must be (K, N) and (K, M) with the same K members, none empty; got {train.shape} and {test.shape}."
        )
    inclusion = None
    if inclusion_KN is not None:
        inclusion = np.asarray(inclusion_KN)
        if inclusion.shape != train.shape:
            raise DataError(f"Inclusion has shape {inclusion.shape}, training losses {train.shape}; they must agree.")
        if inclusion.dtype.kind == "f" and not np.isfinite(inclusion).all():
            raise DataError(
                "The inclusion matrix has NaN or infinite entries; which example was in which subset is known."
            )
    train_state, test_state = _row_states(train, "training"), _row_states(test, "test")
    usable = (train_state < 2) & (test_state < 2)
    if usable.sum() < 2:
        raise NotEnoughMembersError(
            f"Scores need at least 2 members with training and test losses; {int(usable.sum())} of {train.shape[0]} "
            "have "
            "them. What is scored stays; score more members and repeat."
        )
    kept = np.flatnonzero(usable)
    if kept.size < train.shape[0]:
        train, test = train[kept], test[kept]
        inclusion = None if inclusion is None else inclusion[kept]
    complete = bool((train_state[kept] == 0).all() and (test_state[kept] == 0).all())
    return MemberLosses(train, test, inclusion, kept.astype(np.int64), complete)


def _row_states(loss: Floats, name: str) -> NDArray[np.int64]:
    """(K,) 0: all finite, 1: some NaN, 2: all NaN. Row by row, so that a huge matrix needs no mask of its own size."""
    states = np.zeros(loss.shape[0], dtype=np.int64)
    for k, row in enumerate(loss):
        if np.isfinite(row.sum(dtype=np.float64)):  # one pass; NaN and inf both survive a sum
            continue
        missing = np.isnan(row)
        if np.isinf(row).any():
            raise DataError(
                f"Member {k} has infinite {name} losses. A probability of zero is usually a cut-off list: mark the "
                "entry as "
                "missing (NaN) or give its lower bound and resolve_censored()."
            )
        states[k] = 2 if missing.all() else 1
    return states
