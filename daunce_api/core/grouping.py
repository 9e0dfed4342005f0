"""Sums over groups of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Floats

ROWS = 4_096  # of a block at a time


class _Scored(Protocol):
    shape: tuple[int, int]

    def block(self, rows: slice, columns: slice) -> Floats: ...


def is_single(group_of: NDArray[np.int64]) -> bool:
    """Whether every example is its own group, in order."""
    return np.array_equal(group_of, np.arange(group_of.size))


def sum_groups(values_RX: Floats, group_of: NDArray[np.int64]) -> Floats:
    """(R, G) sums of columns by the group that each belongs to; all groups from 0 to G - 1 have columns."""
    order = np.argsort(group_of, kind="stable")
    starts = np.flatnonzero(np.diff(group_of[order], prepend=-1))
    return np.asarray(np.add.reduceat(values_RX[:, order], starts, axis=1))


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups that some of the examples belong to, numbered without gaps.

    Attributes:
        present: their numbers among all groups, ascending. number: of each example, its group's place in ``present``.
    """

    present: NDArray[np.int64]
    number: NDArray[np.int64]

    @staticmethod
    def of(group_of: NDArray[np.int64]) -> Groups:
        """Those of examples with these groups."""
        present, number = np.unique(group_of, return_inverse=True)
        return Groups(present, number.ravel())

    def sums(self, values_XH: Floats) -> Floats:
        """(G, H) sums of rows."""
        return sum_groups(values_XH.T, self.number).T


def group_sums(blocks: _Scored, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> Floats:
    """(G, H) sums of scores; pairs without a score count as zero."""
    score = np.zeros((int(row_of.max()) + 1, int(column_of.max()) + 1))
    for start in range(0, blocks.shape[0], ROWS):
        piece = slice(start, start + ROWS)
        own = Groups.of(row_of[piece])
        score[own.present] += own.sums(sum_groups(np.nan_to_num(blocks.block(piece, slice(None))), column_of))
    return score


def group_error(change_KGH: Floats) -> Floats:
    """(G, H) standard errors from what each member adds to a sum of scores.

    A member adds to the pairs of which it has both losses, each about the mean over the members of that pair, and
    nothing to the others; members are independent of each other, so that their shares add up in squares. For a single
    pair, and where nothing is missing, this is the jackknife of `complete`. NaN where one of the pairs has a score but
    too few members for an error of its own.
    """
    return np.asarray(np.sqrt((change_KGH**2).sum(axis=0)))
