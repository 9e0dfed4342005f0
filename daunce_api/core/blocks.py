"""Scores of one estimator block by block, whether or not losses are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Checkpoints, Floats
from .complete import FactorBlocks
from .estimators import Estimator
from .incomplete import PatternBlocks
from .members import MemberLosses
from .pairwise import PairwiseBlocks
from .spectrum import Setting, stabilised

__all__ = ["FactorBlocks", "ScoreBlocks", "score_blocks"]


class ScoreBlocks(Protocol):
    """Scores that are computed where they are asked for."""

    shape: tuple[int, int]

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores of some training (rows) and test examples (columns); NaN where there is no answer."""
        ...

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) their standard errors."""
        ...

    def group_block(self, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(G, H) sums of scores over groups and their standard errors, by the number of each example's group; every
        number up to the highest is that of some example."""
        ...

    def count_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) how many members have both losses of a pair; their number less one is its degrees of freedom."""
        ...


class PlacedBlocks:
    """Scores of the examples that have any, in the places that they have among all examples; NaN in the others."""

    def __init__(
        self, inner: ScoreBlocks, rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]
    ) -> None:
        self._inner, self._rows, self._columns, self.shape = inner, rows, columns, shape

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        return self._placed(self._inner.block, rows, columns, np.nan)

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors."""
        return self._placed(self._inner.stderr_block, rows, columns, np.nan)

    def count_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) members that have both losses."""
        return self._placed(self._inner.count_block, rows, columns, 0)

    def group_block(self, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(G, H) sums of scores over the examples that have any; NaN for groups without one."""
        rows, own_row = np.unique(row_of[self._rows], return_inverse=True)
        columns, own_column = np.unique(column_of[self._columns], return_inverse=True)
        found = self._inner.group_block(own_row.ravel(), own_column.ravel())
        out = [np.full((int(row_of.max()) + 1, int(column_of.max()) + 1), np.nan, dtype=x.dtype) for x in found]
        for whole, part in zip(out, found, strict=True):
            whole[np.ix_(rows, columns)] = part
        return out[0], out[1]

    def _placed(self, of: Callable[[slice, slice], Floats], rows: slice, columns: slice, missing: float) -> Floats:
        inner, places, size = [], [], []
        for wanted, kept, count in ((rows, self._rows, self.shape[0]), (columns, self._columns, self.shape[1])):
            start, stop, _ = wanted.indices(count)
            first, last = np.searchsorted(kept, (start, stop))
            inner.append(slice(int(first), int(last)))
            places.append(kept[first:last] - start)
            size.append(max(stop - start, 0))
        values = of(inner[0], inner[1])
        out = np.full((size[0], size[1]), missing, dtype=values.dtype)
        out[np.ix_(places[0], places[1])] = values
        return out


def score_blocks(estimator: Estimator, members: MemberLosses, setting: Setting) -> ScoreBlocks:
    """Scores of one estimator, ready to be computed block by block.

    Examples without a single loss are set aside: the others are scored as if they did not exist.
    """
    part, rows, columns = members.observed()
    if part is not members:
        shape = (members.train_KN.shape[1], members.test_KM.shape[1])
        return PlacedBlocks(score_blocks(estimator, part, setting.of_examples(rows, shape[0])), rows, columns, shape)
    if not setting.checkpoints:
        members = members.final()
    if setting.log_offset is not None:
        members = _on_log_scale(members, setting.log_offset)
    if members.complete:
        return FactorBlocks(estimator.factorise(members, setting))
    if estimator.moment:
        return PairwiseBlocks(estimator, members)
    return PatternBlocks(estimator, members, setting)


def _on_log_scale(members: MemberLosses, log_offset: float) -> MemberLosses:
    *earlier, final = (stabilised(loss_KM, log_offset) for loss_KM in members.test_stages)
    if members.earlier is None:
        return replace(members, test_KM=final)
    checkpoints = Checkpoints(members.earlier.train_loss_SKN, np.stack(earlier))
    return replace(members, test_KM=final, earlier=checkpoints)
