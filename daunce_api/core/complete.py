"""Blocks of the score matrix and of its standard errors, from complete losses.

A standard error is the jackknife over members (Efron and Stein 1981): with d_k the difference that leaving out member k
makes, ``stderr^2 = (K - 1) / K * sum_k (d_k - mean d)^2``. A member's rows at all stages (`checkpoints`) are left out
together, so d_k is a sum over them: ``d_k = sum_t l_ti r_tj`` with one training-side and one test-side number for each
row, and ``sum_k d_k^2 = sum_tt' (l_t l_t')^T (r_t r_t')``: matrix products on products of two stages, on squares where
there is one. Where there are many parts (a mixture of ridges at several stages), d_k itself is made, member by member,
so that the cost grows with their number and not with its square.

For `covariance` and `inclusion` l and r are the deviations themselves (the divisor held fixed where members have
different numbers of rows). For `whitened`, as for any ridge, with R = (G + c)^-1 and P the rows of member k,
``d_k = (R A)_Pi^T R_PP^-1 (R B)_Pj``, exactly (lambda held fixed). `half_whitened` and `matched` are mixtures of ridges
and d_k is the same mixture. For `correlation` the column norms change too: with unit columns a, b and
c = K_t / (K_t - 1), ``r_-k = (r - sum_t c a b) / sqrt((1 - sum_t c a^2) (1 - sum_t c b^2))``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Floats
from .estimators import Factors
from .grouping import Groups, group_error, group_sums, is_single, sum_groups
from .shrinkage import Shrinkage

_TILE = (2_048, 512)
_STRIP = 128  # rows whose changes stay in cache while members are gone through
LEAST_FOR_CORRELATION = 4  # of three members two are left, whose correlation is 1 or -1 whatever they are
_PAIRS = 1_000_000  # that are weighted at a time
_CHANGES = 10_000_000  # of groups by members that are held at a time
_ALL = slice(None)
_FEW_PARTS = 5  # up to which products on pairs of parts are faster than one member after the other


class FactorBlocks:
    """Blocks of complete data.

    Attributes:
        shape: (N, M). factors: what they are computed from.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.shape = (factors.left_RN.shape[1], factors.right_RM.shape[1])

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        score, shrinkage = self._unweighted(rows, columns), self.factors.shrinkage
        return score if shrinkage is None else shrinkage.shrunk(score, rows, columns)

    def _unweighted(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores before weights."""
        return np.asarray(self.factors.left_RN[:, rows].T @ self.factors.right_RM[:, columns])

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors."""
        f = self.factors
        left_RX, tests_RX = f.left_RN[:, rows], f.tests_RM[:, columns]
        if f.standardised:
            return self._correlation_errors(left_RX, tests_RX)
        terms = f.errors()
        out = np.empty((left_RX.shape[1], tests_RX.shape[1]), dtype=left_RX.dtype)
        for i in range(0, out.shape[0], _TILE[0]):
            left_RT = left_RX[:, i : i + _TILE[0]]
            lefts = np.stack([t.left(left_RT) for t in terms])
            for j in range(0, out.shape[1], _TILE[1]):
                rights = np.stack([t.right(tests_RX[:, j : j + _TILE[1]]) for t in terms])
                # The left maps are symmetric, so the sum over members is one product, however many terms there are.
                total = left_RT.T @ sum(t.left(right) for t, right in zip(terms, rights, strict=True))
                out[i : i + _TILE[0], j : j + _TILE[1]] = jackknife(
                    self._squares(lefts, rights), total, f.stages.members
                )
        return out if f.shrinkage is None else out * f.shrinkage.weight(self._unweighted(rows, columns), rows, columns)

    def count_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) members that have both losses: all of them."""
        size = (len(range(*x.indices(count))) for x, count in zip((rows, columns), self.shape, strict=True))
        return np.full(tuple(size), self.factors.stages.members)

    def group_block(self, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(G, H) sums of scores over groups of examples, and their standard errors.

        Sums of columns come before the product, so it costs no more than single examples do; where pairs have weights,
        about what all pairs cost. Norms of summed correlations are taken as known, see `unit_terms`.
        """
        whole = slice(None)
        if is_single(row_of) and is_single(column_of):
            return self.block(whole, whole), self.stderr_block(whole, whole)
        f = self.factors
        if f.shrinkage is not None:
            return group_sums(self, row_of, column_of), self._weighted_group_errors(f.shrinkage, row_of, column_of)
        left, right, tests = (
            sum_groups(x, of) for x, of in ((f.left_RN, row_of), (f.right_RM, column_of), (f.tests_RM, column_of))
        )
        sums = FactorBlocks(replace(f, left_RN=left, right_RM=right, tests_RM=tests, standardised=False))
        error = sums.stderr_block(whole, whole)
        if f.standardised and f.stages.members < LEAST_FOR_CORRELATION:
            error[:] = np.nan
        return sums.block(whole, whole), error

    def changes(self, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> Floats:
        """(K, G, H) what each member adds to sums over groups of a filter's scores, about their mean; their standard
        error is the root of the sum of squares."""
        f = self.factors
        if f.shrinkage is not None:
            change = self._weighted_changes(f.shrinkage, row_of, column_of)
        else:
            left, tests = sum_groups(f.left_RN, row_of), sum_groups(f.tests_RM, column_of)
            change = self._lefts(left).swapaxes(1, 2) @ self._rights(tests)
        return np.asarray((change - change.mean(axis=0)) * np.sqrt(1 - 1 / f.stages.members))

    def _lefts(self, left_RX: Floats) -> Floats:
        """(K, P, n) training side of each member's parts: a term at a stage is a part."""
        return self._by_member([t.left(left_RX) for t in self.factors.errors()])

    def _rights(self, tests_RX: Floats) -> Floats:
        """(K, P, m) test side."""
        return self._by_member([t.right(tests_RX) for t in self.factors.errors()])

    def _by_member(self, terms: list[Floats]) -> Floats:
        stacked = np.concatenate(terms)
        return stacked.reshape(-1, self.factors.stages.members, stacked.shape[1]).swapaxes(0, 1)

    def _weighted_changes(
        self, shrinkage: Shrinkage, row_of: NDArray[np.int64], column_of: NDArray[np.int64]
    ) -> Floats:
        """(K, G, H) sums over groups of what each member changes in a pair's score before weights, times what that
        makes of the weighted one: in a sum, that weights follow chance does not average out."""
        right_KPM = self._rights(self.factors.tests_RM)
        change = np.zeros((right_KPM.shape[0], int(row_of.max()) + 1, int(column_of.max()) + 1))
        step = max(1, _PAIRS // right_KPM.shape[2])
        for start in range(0, row_of.size, step):
            rows = slice(start, start + step)
            slope, own = shrinkage.slope(self._unweighted(rows, _ALL), rows, _ALL), Groups.of(row_of[rows])
            for into, left, right in zip(change, self._lefts(self.factors.left_RN[:, rows]), right_KPM, strict=True):
                into[own.present] += own.sums(sum_groups((left.T @ right) * slope, column_of))
        return change

    def _weighted_group_errors(
        self, shrinkage: Shrinkage, row_of: NDArray[np.int64], column_of: NDArray[np.int64]
    ) -> Floats:
        """(G, H) standard errors of sums of weighted scores, some groups of training examples after the others, since
        changes of all members in all of them may be many."""
        f = self.factors
        error = np.empty((int(row_of.max()) + 1, int(column_of.max()) + 1), dtype=f.left_RN.dtype)
        step = max(1, _CHANGES // (f.stages.members * error.shape[1]))
        for start in range(0, error.shape[0], step):
            rows = np.flatnonzero((row_of >= start) & (row_of < start + step))
            part = FactorBlocks(replace(f, left_RN=f.left_RN[:, rows], shrinkage=shrinkage.some(rows)))
            error[start : start + step] = group_error(part.changes(row_of[rows] - start, column_of))
        return error

    def _squares(self, lefts_PRX: Floats, rights_PRY: Floats) -> Floats:
        """(n, m) sums over members of d_k^2."""
        # (parts, K, n): a term at a stage is a part, and the change is the sum over parts.
        left, right = (x.reshape(-1, self.factors.stages.members, x.shape[2]) for x in (lefts_PRX, rights_PRY))
        squares = np.zeros((left.shape[2], right.shape[2]), dtype=left.dtype)
        if left.shape[0] <= _FEW_PARTS:
            for p in range(left.shape[0]):
                squares += (left[p] * left[p]).T @ (right[p] * right[p])
                for q in range(p):
                    squares += 2 * ((left[p] * left[q]).T @ (right[p] * right[q]))
        else:
            left_KXP, right_KPY = (np.ascontiguousarray(x) for x in (left.transpose(1, 2, 0), right.swapaxes(0, 1)))
            change = np.empty((min(_STRIP, squares.shape[0]), squares.shape[1]), dtype=squares.dtype)
            for i in range(0, squares.shape[0], _STRIP):
                into = squares[i : i + _STRIP]
                part = change[: into.shape[0]]
                for one, other in zip(left_KXP[:, i : i + _STRIP], right_KPY, strict=True):
                    np.matmul(one, other, out=part)
                    part *= part
                    into += part
        return squares

    def _correlation_errors(self, left_RX: Floats, right_RY: Floats) -> Floats:
        stages = self.factors.stages
        score = left_RX.T @ right_RY
        root = np.sqrt(stages.inflation()).astype(left_RX.dtype)[:, None]
        a_KTX, b_KTY = stages.by_member(left_RX * root), stages.by_member(right_RY * root)
        total, squares = np.zeros_like(score), np.zeros_like(score)
        for a, b in zip(a_KTX, b_KTY, strict=True):
            change = score - correlation_without(score, a.T @ b, (a**2).sum(axis=0)[:, None], (b**2).sum(axis=0))
            total += change
            squares += change**2
        return jackknife(squares, total, stages.members, least=LEAST_FOR_CORRELATION)


def correlation_without(r: Floats, cross: Floats, left: Floats, right: Floats) -> Floats:
    """Correlation after leaving out a member that adds ``cross`` to the product of the unit columns, ``left`` and
    ``right`` to their squares."""
    rest = np.maximum((1 - left) * (1 - right), 1e-6)
    return np.asarray(np.clip((r - cross) / np.sqrt(rest), -1, 1))


def jackknife(squares: Floats, total: Floats, members: int, least: int = 3) -> Floats:
    """Standard error from sum_k d_k^2 and sum_k d_k; NaN for fewer than ``least`` members."""
    if members < least:
        return np.full_like(squares, np.nan)
    return np.asarray(np.sqrt(np.maximum(squares - total**2 / members, 0) * ((members - 1) / members)))
