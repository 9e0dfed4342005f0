"""Blocks of the score matrix and of its standard errors, from complete losses.

A standard error is the jackknife over members (Efron and Stein 1981): with d_k the difference that leaving out member k
makes, ``stderr^2 = (K - 1) / K * sum_k (d_k - mean d)^2``. A member's rows at all stages (`checkpoints`) are left out
together, so d_k is a sum over them: ``d_k = sum_t l_ti r_tj`` with one training-side and one test-side number for each
row, and ``sum_k d_k^2 = sum_tt' (l_t l_t')^T (r_t r_t')``: matrix products on products of two stages, on squares where
there is one.

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

from daunce_api.core.checkpoints import Floats
from daunce_api.core.estimators import Factors


class FactorBlocks:
    """Blocks of complete data.

    Attributes:
        shape: (N, M). factors: what they are computed from.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.shape = (factors.left_RN.shape[1], factors.right_RM.shape[1])

    def select(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> FactorBlocks:
        """Some training (rows) and test examples (columns), by index."""
        f = self.factors
        errors = tuple(replace(term, right_RM=term.right_RM[:, columns]) for term in f.errors)
        return FactorBlocks(replace(f, left_RN=f.left_RN[:, rows], right_RM=f.right_RM[:, columns], errors=errors))

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        return np.asarray(self.factors.left_RN[:, rows].T @ self.factors.right_RM[:, columns])

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors."""
        f = self.factors
        terms = [(t.left(f.left_RN[:, rows]), t.right_RM[:, columns]) for t in f.errors]
        if f.standardised:
            return self._correlation_errors(*terms[0])
        total = sum((left.T @ right for left, right in terms), np.zeros((), f.left_RN.dtype))
        parts = [
            pair
            for left, right in terms
            for pair in zip(np.split(left, f.stages.count), np.split(right, f.stages.count), strict=True)
        ]
        squares = np.zeros_like(total)
        for p, (left, right) in enumerate(parts):
            squares += (left * left).T @ (right * right)
            for other_left, other_right in parts[:p]:
                squares += 2 * ((left * other_left).T @ (right * other_right))
        return jackknife(squares, total, f.stages.members)

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
        return jackknife(squares, total, stages.members)


def correlation_without(r: Floats, cross: Floats, left: Floats, right: Floats) -> Floats:
    """Correlation after leaving out a member that adds ``cross`` to the product of the unit columns, ``left`` and
    ``right`` to their squares."""
    rest = np.maximum((1 - left) * (1 - right), 1e-6)
    return np.asarray(np.clip((r - cross) / np.sqrt(rest), -1, 1))


def jackknife(squares: Floats, total: Floats, members: int) -> Floats:
    """Standard error from sum_k d_k^2 and sum_k d_k; NaN for fewer than three members."""
    if members < 3:
        return np.full_like(squares, np.nan)
    return np.asarray(np.sqrt(np.maximum(squares - total**2 / members, 0) * ((members - 1) / members)))
