"""Stages of training: the final models, and earlier checkpoints of the same fine-tunes as further rows.

Losses at earlier checkpoints of the same fine-tunes are further rows of the same matrices: the subset moved each of
those models too, by another mixture of directions, so K members with S earlier checkpoints give up to (S + 1) (K - 1)
directions instead of K - 1. Two things set these rows apart from further members. Every stage of training is centred
over its own members, since losses fall as training goes on. And the rows of one member are not independent, so whatever
leaves members out (folds, jackknife, bootstrap) leaves out all of a member's rows.

Rows are ordered by stage, the final models last, and within a stage by member: row t K + k. A member whose checkpoint
is missing has a row of zeros there, which adds nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError

Floats: TypeAlias = NDArray[Any]  # float32 or float64; NumPy's own float generics do not survive most operations
Mask: TypeAlias = NDArray[np.bool_]
Index: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Losses of the same K members at S earlier checkpoints of their training, the final models not among them.

    A checkpoint of a member counts if it has every loss that the final models have; otherwise this stage is left out
    for this member, whose other rows stay.

    Attributes:
        train_loss_SKN: (S, K, N) loss of training example i under member k at checkpoint s, nats, ascending in training
            time; NaN = missing.
        test_loss_SKM: (S, K, M) loss of test example j, nats; NaN = missing.

    Raises:
        DataError: the shapes do not belong together.
    """

    train_loss_SKN: Floats
    test_loss_SKM: Floats

    def __post_init__(self) -> None:
        train, test = np.asarray(self.train_loss_SKN), np.asarray(self.test_loss_SKM)
        if train.ndim != 3 or test.ndim != 3 or train.shape[:2] != test.shape[:2]:
            raise DataError(
                f"Losses at checkpoints must be (S, K, N) and (S, K, M) with the same S checkpoints and K members; got "
                f"{train.shape} and {test.shape}."
            )
        object.__setattr__(self, "train_loss_SKN", train)
        object.__setattr__(self, "test_loss_SKM", test)

    def __len__(self) -> int:
        """S, the number of earlier checkpoints."""
        return int(self.train_loss_SKN.shape[0])

    def members(self, pick: ArrayLike | slice) -> Checkpoints:
        """The same checkpoints of some members only (a slice, indices or a boolean mask)."""
        chosen = pick if isinstance(pick, slice) else np.asarray(pick)
        return Checkpoints(self.train_loss_SKN[:, chosen], self.test_loss_SKM[:, chosen])


@dataclass(frozen=True, eq=False)
class Stages:
    """Which member has a row at which stage of training.

    Attributes:
        present_TK: (T, K) bool, T = S + 1 stages, the final models last.
    """

    present_TK: Mask

    @staticmethod
    def of(present_TK: Mask) -> Stages:
        """Stages with at least two members each; one that a single member reached tells nothing."""
        return Stages(present_TK & (present_TK.sum(axis=1, keepdims=True) >= 2))

    @property
    def count(self) -> int:
        """T, the number of stages."""
        return int(self.present_TK.shape[0])

    @property
    def members(self) -> int:
        """K."""
        return int(self.present_TK.shape[1])

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.present_TK.sum())

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the rows, sum over stages of (members at that stage - 1): covariance's divisor."""
        return int(np.maximum(self.present_TK.sum(axis=1) - 1, 0).sum())

    def centre(self, rows_RX: Floats) -> Floats:
        """Rows less the mean of their stage; missing ones are zero. The dtype is kept, the mean taken in float64."""
        return np.concatenate([self.centre_stage(t, x) for t, x in enumerate(np.split(rows_RX, self.count))])

    def centre_stage(self, stage: int, loss_KX: Floats) -> Floats:
        """One stage of `centre`."""
        present = self.present_TK[stage]
        if present.all():
            return centered(loss_KX)
        out = np.zeros_like(loss_KX)
        if present.any():
            out[present] = centered(loss_KX[present])
        return out

    def rows_of(self, members: Index) -> Index:
        """Indices of all rows of some members, by stage."""
        return np.asarray((np.arange(self.count)[:, None] * self.members + members).ravel())

    def left_out(self) -> NDArray[np.float64]:
        """(R,) what a row's product counts for in a covariance when its member is left out.

        With D degrees of freedom: K_t / ((K_t - 1) (D - n_k)) for one of the n_k rows of member k, at a stage with K_t
        members.
        """
        rest = np.maximum(self.freedom - self.present_TK.sum(axis=0), 1)
        return np.asarray((self.inflation().reshape(self.present_TK.shape) / rest).ravel())

    def inflation(self) -> NDArray[np.float64]:
        """(R,) K_t / (K_t - 1): by how much more than its square a deviation shortens its column when left out."""
        size = self.present_TK.sum(axis=1, keepdims=True)
        return np.where(self.present_TK, size / np.maximum(size - 1, 1), 0.0).ravel()

    def by_member(self, rows_RX: Floats) -> Floats:
        """(K, T, X) view of rows, the rows of a member together."""
        return rows_RX.reshape(self.count, self.members, -1).swapaxes(0, 1)


def centered(loss_KX: Floats) -> Floats:
    """Columns less their mean over members; the dtype is kept, the mean is taken in float64."""
    mean = loss_KX.mean(axis=0, dtype=np.float64)
    return np.asarray(loss_KX - mean.astype(loss_KX.dtype))


def stacked(stages_KX: Sequence[Floats]) -> Floats:
    """Rows of all stages below each other; no copy of a single stage."""
    return stages_KX[0] if len(stages_KX) == 1 else np.concatenate(stages_KX)
