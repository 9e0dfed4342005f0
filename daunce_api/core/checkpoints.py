"""Losses at earlier checkpoints of the same fine-tunes, and how the rows of several stages of training are handled.

A job that trained a member passed through earlier models for nothing. Their losses are further rows of the same loss
matrices: the subset moved each of them too, by another mixture of directions, so K members with S earlier checkpoints
give up to (S + 1) (K - 1) directions instead of K - 1. Two things set these rows apart from further members, and this
module holds both: every stage is centred over its own members, since losses fall as training goes on; and the rows of
one member are not independent, so whatever leaves members out (folds, jackknife, bootstrap) leaves out all of a
member's rows.

Rows are ordered by stage, the earliest first and the final models last, and within a stage by member: row s K + k. A
member whose checkpoint is missing has a row of zeros there, which adds nothing anywhere.
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


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Losses of the same K members at S earlier checkpoints of their training.

    The final models are not among them. A checkpoint of a member counts if it has every loss that the member's final
    model has; otherwise this stage is left out for this member (the member's other rows stay).

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

    def columns(self, train: ArrayLike | slice = slice(None), test: ArrayLike | slice = slice(None)) -> Checkpoints:
        """The same checkpoints with some training and test examples only."""
        rows, columns = (x if isinstance(x, slice) else np.asarray(x) for x in (train, test))
        return Checkpoints(self.train_loss_SKN[:, :, rows], self.test_loss_SKM[:, :, columns])


@dataclass(frozen=True, eq=False)
class Stages:
    """Which member has a row at which stage.

    Attributes:
        present_TK: (T, K) bool, T = S + 1 stages, the final models last. A stage that a single member reached tells
            nothing and counts as missing.
    """

    present_TK: Mask

    @staticmethod
    def of(present_TK: Mask) -> Stages:
        """Stages with at least two members each."""
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

    def some(self, members: NDArray[Any]) -> Stages:
        """The same stages of some members."""
        return Stages.of(self.present_TK[:, members])

    def centre(self, rows_RX: Floats) -> Floats:
        """Rows less the mean of their stage; missing ones are zero. The dtype is kept, the mean taken in float64."""
        return np.concatenate([self.centre_stage(t, x) for t, x in enumerate(np.split(rows_RX, self.count))])

    def centre_stage(self, stage: int, loss_KX: Floats) -> Floats:
        """One stage of `centre`."""
        present = self.present_TK[stage]
        if present.all():
            return centred(loss_KX)
        out = np.zeros_like(loss_KX)
        if present.any():
            out[present] = centred(loss_KX[present])
        return out

    def members_rows(self, members: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of all rows of some members, by stage."""
        return (np.arange(self.count)[:, None] * self.members + members).ravel()

    def left_out(self) -> NDArray[np.float64]:
        """(R,) what a row's product counts for in a covariance when its member is left out.

        With D degrees of freedom: K_t / ((K_t - 1) (D - n_k)) for one of the n_k rows of member k, at a stage with K_t
        members.
        """
        size = self.present_TK.sum(axis=1, keepdims=True)
        rest = np.maximum(self.freedom - self.present_TK.sum(axis=0), 1)
        return np.where(self.present_TK, size / (np.maximum(size - 1, 1) * rest), 0.0).ravel()

    def inflation(self) -> NDArray[np.float64]:
        """(R,) K_t / (K_t - 1): by how much more than its square a deviation shortens its column when left out."""
        size = self.present_TK.sum(axis=1, keepdims=True)
        return np.where(self.present_TK, size / np.maximum(size - 1, 1), 0.0).ravel()

    def by_member(self, rows_RX: Floats) -> Floats:
        """(K, T, X) view of rows, the rows of a member together."""
        return rows_RX.reshape(self.count, self.members, -1).swapaxes(0, 1)


def centred(loss_KX: Floats) -> Floats:
    """Columns less their mean over members; the dtype is kept, the mean is taken in float64."""
    mean = loss_KX.mean(axis=0, dtype=np.float64)
    return np.asarray(loss_KX - mean.astype(loss_KX.dtype))


def usable_checkpoints(
    earlier: Checkpoints, train_KN: Floats, test_KM: Floats, members: NDArray[np.int64], complete: bool
) -> tuple[Checkpoints, Mask]:
    """Checkpoints of some members in the type of the final losses, and (S, K) which of them count; NaN in the others.

    Where a final loss is missing the earlier one is taken as missing too, so that gaps are the same at all stages.
    """
    part = earlier if members.size == earlier.train_loss_SKN.shape[1] else earlier.members(members)
    sides: list[Floats] = []
    present = np.ones((len(earlier), members.size), dtype=np.bool_)
    for name, given, final in (("training", part.train_loss_SKN, train_KN), ("test", part.test_loss_SKM, test_KM)):
        if given.shape[1:] != final.shape:
            raise DataError(
                f"Checkpoints have {name} losses {given.shape[1:]} for each stage, the final models {final.shape}; "
                "they are of the same members and examples."
            )
        loss = given.astype(final.dtype, copy=False)
        for s, k in np.ndindex(*present.shape):
            present[s, k] &= _has_all(loss[s, k], final[k], f"Checkpoint {s} of member {k} has infinite {name} losses.")
        sides.append(loss)
    if not (complete and present.all()):
        finals = (train_KN, test_KM)
        gap = ~present[:, :, None]
        sides = [np.where(gap | np.isnan(final), np.nan, x) for x, final in zip(sides, finals, strict=True)]
        sides = [x.astype(final.dtype, copy=False) for x, final in zip(sides, finals, strict=True)]
    return Checkpoints(*sides), present


def _has_all(loss_X: Floats, final_X: Floats, infinite: str) -> bool:
    """Whether a checkpoint has every loss that the final model has."""
    if np.isfinite(loss_X.sum(dtype=np.float64)):  # one pass; NaN and inf both survive a sum
        return True
    if np.isinf(loss_X).any():
        raise DataError(infinite + " Mark such entries as missing (NaN).")
    return not (np.isnan(loss_X) & ~np.isnan(final_X)).any()


def stacked(stages_KX: Sequence[Floats]) -> Floats:
    """Rows of all stages below each other; no copy of a single stage."""
    return stages_KX[0] if len(stages_KX) == 1 else np.concatenate(stages_KX)
