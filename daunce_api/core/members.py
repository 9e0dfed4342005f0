"""The two loss matrices and the inclusion matrix, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError, NotEnoughMembersError
from .checkpoints import Checkpoints, Floats, Mask, Stages, stacked, usable_checkpoints


@dataclass(frozen=True, eq=False)
class MemberLosses:
    """Losses of the members that can be used, all of one floating type.

    Attributes:
        train_KN: (K, N) loss of training example i under member k, nats.
        test_KM: (K, M) loss of test example j under member k, nats.
        inclusion_KN: (K, N) bool or multiplicities, or None when unknown.
        kept: (K,) indices of these members among the rows that were given.
        complete: no entry of the final models is NaN.
        earlier: the same members' losses at earlier checkpoints, with the gaps of the final losses, or None.
        present_SK: (S, K) which of those count, or None.
    """

    train_KN: Floats
    test_KM: Floats
    inclusion_KN: Floats | None
    kept: NDArray[np.int64]
    complete: bool
    earlier: Checkpoints | None = None
    present_SK: Mask | None = None

    @property
    def count(self) -> int:
        """K, the number of usable members."""
        return int(self.train_KN.shape[0])

    @property
    def stages(self) -> Stages:
        """Which member has a row at which stage of training, the final models last."""
        final = np.ones((1, self.count), dtype=np.bool_)
        return Stages.of(final if self.present_SK is None else np.concatenate([self.present_SK, final]))

    @property
    def train_stages(self) -> tuple[Floats, ...]:
        """T = S + 1 arrays (K, N), the final models last."""
        return (*(() if self.earlier is None else self.earlier.train_loss_SKN), self.train_KN)

    @property
    def test_stages(self) -> tuple[Floats, ...]:
        """T = S + 1 arrays (K, M), the final models last."""
        return (*(() if self.earlier is None else self.earlier.test_loss_SKM), self.test_KM)

    def train_rows(self) -> Floats:
        """(R, N) training losses of complete members, each stage centred over its members."""
        return stacked([self.stages.centre_stage(t, x) for t, x in enumerate(self.train_stages)])

    def test_rows(self) -> Floats:
        """(R, M) test losses, likewise."""
        return stacked([self.stages.centre_stage(t, x) for t, x in enumerate(self.test_stages)])

    def final(self) -> MemberLosses:
        """The final models alone."""
        return replace(self, earlier=None, present_SK=None)

    def rows(self, members: ArrayLike) -> MemberLosses:
        """The same losses of some members only (indices or a boolean mask over the K usable ones)."""
        pick = np.asarray(members)
        return MemberLosses(
            self.train_KN[pick],
            self.test_KM[pick],
            None if self.inclusion_KN is None else self.inclusion_KN[pick],
            self.kept[pick],
            self.complete,
            None if self.earlier is None else self.earlier.members(pick),
            None if self.present_SK is None else self.present_SK[:, pick],
        )

    def columns(self, train: ArrayLike | slice = slice(None), test: ArrayLike | slice = slice(None)) -> MemberLosses:
        """The same members with some training and test examples only."""
        rows, columns = (x if isinstance(x, slice) else np.asarray(x) for x in (train, test))
        return replace(
            self,
            train_KN=self.train_KN[:, rows],
            test_KM=self.test_KM[:, columns],
            inclusion_KN=None if self.inclusion_KN is None else self.inclusion_KN[:, rows],
            earlier=None if self.earlier is None else self.earlier.columns(rows, columns),
        )

    def observed(self) -> tuple[MemberLosses, NDArray[np.int64], NDArray[np.int64]]:
        """Without the examples that no member has a loss of, and the indices of the training and test examples left.

        Such an example has no score and tells nothing about others, but one would make everything incomplete. This
        object itself where there are none.
        """
        everything = np.arange(self.train_KN.shape[1]), np.arange(self.test_KM.shape[1])
        if self.complete:
            return self, *everything
        rows, columns = (np.flatnonzero(np.isfinite(x).any(axis=0)) for x in (self.train_KN, self.test_KM))
        if rows.size == everything[0].size and columns.size == everything[1].size:
            return self, *everything
        part = self.columns(rows, columns)
        complete = bool(np.isfinite(part.train_KN).all() and np.isfinite(part.test_KM).all())
        return replace(part, complete=complete), rows, columns


def member_losses(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike | None = None,
    earlier: Checkpoints | None = None,
) -> MemberLosses:
    """Check the loss matrices and leave out members that have no losses at all.

    Args:
        train_loss_KN: (K, N) losses in nats, NaN = missing. float32 stays float32 if both matrices are.
        test_loss_KM: (K, M) losses in nats, NaN = missing.
        inclusion_KN: (K, N) whether example i is in member k's subset (bool), or how often (bootstrap subsets).
        earlier: losses of the same K members at earlier checkpoints of their training; see `Checkpoints`.

    Returns:
        MemberLosses. A member whose row is all NaN in either matrix is left out, with its checkpoints. A checkpoint
        that lacks a loss that its member's final model has is left out for that member.

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
    if earlier is None or not len(earlier):
        return MemberLosses(train, test, inclusion, kept.astype(np.int64), complete)
    if earlier.train_loss_SKN.shape[1] != usable.size:
        raise DataError(
            f"Checkpoints are of {earlier.train_loss_SKN.shape[1]} members, the final losses of {usable.size}; a "
            "member without checkpoints has NaN there."
        )
    cleaned, present = usable_checkpoints(earlier, train, test, kept, complete)
    return MemberLosses(train, test, inclusion, kept.astype(np.int64), complete, cleaned, present)


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
