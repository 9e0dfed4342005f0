"""Exact k largest inner products, streamed in blocks that stay in cache.

The two inputs are point sets P (n, K) and Q (m, K); for every row of Q the k rows of P with the largest inner product
are found. Three things make it about as cheap as the bare product:

* P is visited in order of falling norm. |p.q| <= |p||q|, so a query is finished, exactly, as soon as the next norm
  cannot beat its k-th best value. Loss deviations are heavy-tailed, so on real data this ends early.
* What beats its query's threshold is found with one comparison and a search over eight mask bytes at a time.
* Candidates are gathered and folded into the best k only when there are many of them: a threshold that is a little old
  lets a few more through and costs less than keeping it fresh.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Floats
from .shrinkage import Shrinkage

QUERY_TILE = 512
POINT_TILE = 2_048
WHOLE = 20
"""Up to how many times k points whole rows of products are partitioned."""
_COPY = 8_192
Index = NDArray[np.int64]


class Best:
    """The k largest values seen so far for each of m queries.

    Attributes:
        value_mk: (m, k) descending within no order, -inf where fewer than k were offered.
        index_mk: (m, k) their indices, -1 where empty.
        threshold: (m,) the k-th largest value: what a new one has to beat.
    """

    def __init__(self, queries: int, k: int, dtype: np.dtype[np.floating]) -> None:
        self.k = k
        self.value_mk: Floats = np.full((queries, k), -np.inf, dtype=dtype)
        self.index_mk: Index = np.full((queries, k), -1, dtype=np.int64)
        self.threshold: Floats = np.full(queries, -np.inf, dtype=dtype)
        self._waiting: list[tuple[Index, Floats, Index]] = []
        self._count = 0

    def offer(self, query: Index, value: Floats, index: Index) -> None:
        """Add candidates (flat, same length, any order); they count from the next `settle` on."""
        if query.size:
            self._waiting.append((query, value, index))
            self._count += query.size
            if self._count >= self.value_mk.size:
                self.settle()

    def settle(self) -> None:
        """Fold what waits into the best k and raise the thresholds."""
        if not self._waiting:
            return
        query, value, index = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        alive = np.flatnonzero(value > self.threshold[query])
        query, value, index = query[alive], value[alive], index[alive]
        if query.size == 0:
            return
        small = self.value_mk.shape[0] <= np.iinfo(np.uint16).max
        order = np.argsort(
            query.astype(np.uint16) if small else query, kind="stable"
        )  # short integers sort in one pass
        query, value, index = query[order], value[order], index[order]
        count = np.bincount(query)
        touched = np.flatnonzero(count)
        count = count[touched]
        start = np.cumsum(count) - count
        width = self.k + int(count.max())
        values = np.full((touched.size, width), -np.inf, dtype=self.value_mk.dtype)
        indices = np.full((touched.size, width), -1, dtype=np.int64)
        values[:, : self.k], indices[:, : self.k] = self.value_mk[touched], self.index_mk[touched]
        row = np.repeat(np.arange(touched.size), count)
        place = self.k + np.arange(query.size) - np.repeat(start, count)
        values[row, place], indices[row, place] = value, index
        keep = np.argpartition(values, width - self.k, axis=1)[:, width - self.k :]
        self.value_mk[touched] = np.take_along_axis(values, keep, axis=1)
        self.index_mk[touched] = np.take_along_axis(indices, keep, axis=1)
        self.threshold[touched] = self.value_mk[touched].min(axis=1)

    def sorted(self) -> tuple[Index, Floats]:
        """(m, k) indices and values, largest first, equal values by index."""
        self.settle()
        return _in_order(self.index_mk, self.value_mk)


def _in_order(index_mk: Index, value_mk: Floats) -> tuple[Index, Floats]:
    """Largest first, equal values by index."""
    order = np.argsort(-value_mk, axis=1)
    index_mk, value_mk = np.take_along_axis(index_mk, order, axis=1), np.take_along_axis(value_mk, order, axis=1)
    tied = np.flatnonzero((value_mk[:, 1:] == value_mk[:, :-1]).any(axis=1))
    index_mk[tied] = np.take_along_axis(index_mk[tied], np.lexsort((index_mk[tied], -value_mk[tied]), axis=1), axis=1)
    return index_mk, value_mk


def above(block_mn: Floats, threshold_m: Floats, mask_mn: NDArray[np.bool_] | None = None) -> tuple[Index, Index]:
    """Row and column of every entry above its row's threshold; n must be a multiple of 8. ``mask_mn`` is
    overwritten."""
    mask = np.greater(block_mn, threshold_m[:, None], out=mask_mn)
    eights = mask.view(np.uint64).ravel()
    words = np.flatnonzero(eights != 0)
    if words.size == 0:
        return words, words
    inner = np.flatnonzero(eights[words].view(np.bool_))
    flat = words[inner >> 3] * 8 + (inner & 7)
    row, column = np.divmod(flat, block_mn.shape[1])
    return row, column


@dataclass(frozen=True, eq=False)
class Points:
    """P ready for searching.

    Attributes:
        rows_nK: rows in order of falling norm, padded with zero rows to a multiple of 8.
        order: (n,) original index of each row.
        norm: (n,) norms, descending.
    """

    rows_nK: Floats
    order: Index
    norm: Floats


def prepare_points(points_Kn: Floats) -> Points:
    """Sort by norm (one copy of P)."""
    width, count = points_Kn.shape
    norm = np.sqrt(np.einsum("kn,kn->n", points_Kn, points_Kn))
    order = np.argsort(-norm, kind="stable")
    rows = np.zeros((-(-count // 8) * 8, width), dtype=points_Kn.dtype)
    place = np.empty_like(order)
    place[order] = np.arange(count)
    for start in range(0, count, _COPY):  # read in sequence, write by whole rows
        piece = slice(start, start + _COPY)
        rows[place[piece]] = np.ascontiguousarray(points_Kn[:, piece].T)
    return Points(rows, order, norm[order])


def largest(points: Points, queries_Km: Floats, k: int, shrinkage: Shrinkage | None = None) -> tuple[Index, Floats]:
    """For every query the k points with the largest inner product, or the largest such product times its weight.

    Args:
        points: from `prepare_points`.
        queries_Km: (K, m).
        k: at most the number of points.
        shrinkage: weights, with points on the left. None is above 1 and they grow with the product, so that a product
            below a threshold of weighted ones need not be weighted.

    Returns:
        (m, k) original indices and (m, k) values, largest first, equal values by index.
    """
    queries = np.ascontiguousarray(queries_Km.T)
    index, value = np.empty((queries.shape[0], k), dtype=np.int64), np.empty((queries.shape[0], k), dtype=queries.dtype)
    find = _partitioned if points.order.size <= WHOLE * k else _search
    for start in range(0, queries.shape[0], QUERY_TILE):
        tile = slice(start, start + QUERY_TILE)
        some = None if shrinkage is None else Shrinkage(shrinkage.left_N, shrinkage.right_M[tile])
        index[tile], value[tile] = find(points, queries[tile], k, some)
    return index, value


def _partitioned(points: Points, queries_mK: Floats, k: int, shrinkage: Shrinkage | None) -> tuple[Index, Floats]:
    """All products at once, where so few points are there that most of them are candidates at some time."""
    count = points.order.size
    block = queries_mK @ points.rows_nK[:count].T
    if shrinkage is not None:
        block = Shrinkage(shrinkage.right_M, shrinkage.left_N[points.order]).shrunk(block, slice(None), slice(None))
    keep = np.argpartition(block, count - k, axis=1)[:, count - k :]
    return _in_order(points.order[keep], np.take_along_axis(block, keep, axis=1))


def _search(points: Points, queries_mK: Floats, k: int, shrinkage: Shrinkage | None) -> tuple[Index, Floats]:
    count, dtype = points.order.size, queries_mK.dtype
    best = Best(queries_mK.shape[0], k, dtype)
    query_norm = np.sqrt((queries_mK**2).sum(axis=1))
    slack = 1 + 1e-5 if dtype == np.float32 else 1 + 1e-12  # rounding of norms against rounding of products
    active: Index = np.arange(queries_mK.shape[0])
    queries = queries_mK
    # Memory that is used again stays in cache and costs no page faults.
    products, masks = np.empty(QUERY_TILE * POINT_TILE, dtype), np.empty(QUERY_TILE * POINT_TILE, np.bool_)
    start, width = 0, min(POINT_TILE, -(-2 * k // 8) * 8)  # the first thresholds come from few points
    while start < count:
        alive = points.norm[start] * query_norm[active] * slack > best.threshold[active]
        if not alive.all():
            active, queries = active[alive], queries[alive]
            if active.size == 0:
                break
        rows_nK = points.rows_nK[start : start + width]
        shape = (active.size, rows_nK.shape[0])
        block = products[: shape[0] * shape[1]].reshape(shape)
        np.matmul(queries, rows_nK.T, out=block)
        if count - start < shape[1]:
            block[:, count - start :] = -np.inf
        row, column = above(block, best.threshold[active], masks[: block.size].reshape(shape))
        value, query, index = block[row, column], active[row], points.order[start + column]
        if shrinkage is not None:
            value = shrinkage.shrunk(value, index, query)
        best.offer(query, value, index)
        start += shape[1]
        width = min(POINT_TILE, 2 * width)
    return best.sorted()
