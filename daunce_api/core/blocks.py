"""Blocks of the score matrix and of its standard errors, with or without missing entries.

A standard error is the jackknife over members (Efron and Stein 1981): with d_k the difference that leaving out member k
makes, ``stderr^2 = (K - 1) / K * sum_k (d_k - mean d)^2``. For `covariance` and `inclusion` d_k is a product of one
training-side and one test-side number. So it is for `whitened`, as for any ridge: with R = (G + c)^-1,
``d_k = (R A)_ki (R B)_kj / R_kk``, exactly (lambda and the mean over members held fixed); a block costs one more matrix
product, on squares. `half_whitened` and `matched` are mixtures of ridges and d_k is the same mixture. For
`correlation` the column
norms change too: ``r_-k = (r - c a b) / sqrt((1 - c a^2) (1 - c b^2))`` with unit columns a, b and c = K / (K - 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from daunce_api.core.estimators import Estimator, Factors
from daunce_api.core.members import Floats, MemberLosses
from daunce_api.core.spectrum import Setting, stabilised
from daunce_api.errors import DataError

Mask = NDArray[np.bool_]


PATTERN_PAIRS = 2_000  # decompositions that filters are given for incomplete data; some seconds


def few_patterns(members: MemberLosses) -> bool:
    """Whether the gaps in the losses are regular enough for filters (see `PatternBlocks`)."""
    if members.complete:
        return True
    patterns = [np.unique(np.isfinite(x), axis=1).shape[1] for x in (members.train_KN, members.test_KM)]
    return bool(patterns[0] * patterns[1] <= PATTERN_PAIRS)


class ScoreBlocks(Protocol):
    """Scores that are computed where they are asked for."""

    shape: tuple[int, int]

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores of some training (rows) and test examples (columns); NaN where there is no answer."""
        ...

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) their standard errors."""
        ...


class FactorBlocks:
    """Blocks of complete data.

    Attributes:
        shape: (N, M). factors: what they are computed from.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.shape = (factors.left_KN.shape[1], factors.right_KM.shape[1])

    def select(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> FactorBlocks:
        """Some rows and columns, by index."""
        f = self.factors
        errors = tuple(replace(term, right_KM=term.right_KM[:, columns]) for term in f.errors)
        return FactorBlocks(Factors(f.left_KN[:, rows], f.right_KM[:, columns], errors, f.standardised))

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        return np.asarray(self.factors.left_KN[:, rows].T @ self.factors.right_KM[:, columns])

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors."""
        terms = [(t.left(self.factors.left_KN[:, rows]), t.right_KM[:, columns]) for t in self.factors.errors]
        members, zero = self.factors.left_KN.shape[0], np.zeros((), self.factors.left_KN.dtype)
        squares, total = zero, sum((left.T @ right for left, right in terms), zero)
        if self.factors.standardised:
            left, right = terms[0]
            score, total, squares = total, np.zeros_like(total), np.zeros_like(total)
            for k in range(members):
                change = score - correlation_without(score, left[k][:, None], right[k], members)
                total += change
                squares += change**2
        else:
            squares = sum(
                (
                    (left * other_left).T @ (right * other_right)
                    for left, right in terms
                    for other_left, other_right in terms
                ),
                zero,
            )
        return jackknife(squares, total, members)


def correlation_without(r: Floats, a: Floats, b: Floats, members: int | Floats) -> Floats:
    """Correlation after leaving out the member at which the unit columns are a and b."""
    c = members / (members - 1)
    rest = np.maximum((1 - c * a**2) * (1 - c * b**2), 1e-6)
    return np.asarray(np.clip((r - c * a * b) / np.sqrt(rest), -1, 1))


def jackknife(squares: Floats, total: Floats, members: int) -> Floats:
    """Standard error from sum_k d_k^2 and sum_k d_k; NaN for fewer than three members."""
    if members < 3:
        return np.full_like(squares, np.nan)
    return np.asarray(np.sqrt(np.maximum(squares - total**2 / members, 0) * ((members - 1) / members)))


class PairwiseBlocks:
    """Moment estimators on incomplete data: each pair uses the members that have both of its losses.

    A pair with fewer than two common members has score NaN, one with fewer than three a NaN standard error.
    """

    def __init__(self, estimator: Estimator, members: MemberLosses) -> None:
        self._standardised = estimator.name == "correlation"
        if estimator.needs_inclusion:
            if members.inclusion_KN is None:
                raise DataError("The inclusion estimator needs the inclusion matrix.")
            left = -members.inclusion_KN.astype(np.float64)
        else:
            left = members.train_KN
        self._left, self._left_seen = _filled(left)
        self._right, self._right_seen = _filled(members.test_KM)
        self.shape = (left.shape[1], members.test_KM.shape[1])

    def _moments(self, rows: slice, columns: slice) -> tuple[Any, ...]:
        x, p = self._left[:, rows], self._left_seen[:, rows]
        y, q = self._right[:, columns], self._right_seen[:, columns]
        count = p.T @ q
        with np.errstate(invalid="ignore", divide="ignore"):
            cross = x.T @ y - (x.T @ q) * (p.T @ y) / count
        return x, p, y, q, count, cross

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        x, p, y, q, count, cross = self._moments(rows, columns)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self._standardised:
                left = (x**2).T @ q - (x.T @ q) ** 2 / count
                right = p.T @ y**2 - (p.T @ y) ** 2 / count
                positive = (left > 0) & (right > 0)
                score = np.where(positive, cross / np.sqrt(np.where(positive, left * right, 1.0)), 0.0)
            else:
                score = cross / (count - 1)
        return np.where(count < 2, np.nan, score)

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors; columns are centred on their own observed members."""
        x, _, y, _, count, _ = self._moments(rows, columns)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self._standardised:
                return self._correlation_errors(rows, columns)
            left_out = count / ((count - 1) * (count - 2))
            spread = (x**2).T @ y**2 - (x.T @ y) ** 2 / count
            error = left_out * np.sqrt(np.maximum(spread, 0) * (count - 1) / count)
        return np.where(count < 3, np.nan, error)

    def _correlation_errors(self, rows: slice, columns: slice) -> Floats:
        x, p, y, q, count, _ = self._moments(rows, columns)
        left, right = np.sqrt((x**2).T @ q), np.sqrt(p.T @ y**2)
        score = x.T @ y / (left * right)
        total, squares = np.zeros_like(score), np.zeros_like(score)
        for k in range(x.shape[0]):
            both = np.outer(p[k], q[k])
            without = correlation_without(score, x[k][:, None] / left, y[k] / right, count)
            change = np.where(both > 0, score - without, 0.0)
            total += change
            squares += change**2
        error = np.sqrt(np.maximum(squares - total**2 / count, 0) * (count - 1) / count)
        return np.where(count < 3, np.nan, error)


def _filled(loss_KX: Floats) -> tuple[Floats, Floats]:
    """Columns centred on their observed members with zeros for the missing ones, and the mask of what is observed."""
    seen = np.isfinite(loss_KX)
    count = seen.sum(axis=0)
    mean = np.where(seen, loss_KX, 0).sum(axis=0, dtype=np.float64) / np.maximum(count, 1)
    return np.where(seen, loss_KX - mean, 0.0), seen.astype(np.float64)


class PatternBlocks:
    """Filter estimators on incomplete data: a pair is scored as if only the members that have both its losses existed.

    The spectrum of those members comes from every training example that all of them scored. One decomposition is made
    for each distinct pair of missing patterns.

    Raises:
        DataError: too many patterns, or members without a training example in common.
    """

    def __init__(self, estimator: Estimator, members: MemberLosses, setting: Setting) -> None:
        self.shape = (members.train_KN.shape[1], members.test_KM.shape[1])
        train_seen, test_seen = np.isfinite(members.train_KN), np.isfinite(members.test_KM)
        train_patterns, self._train_of = np.unique(train_seen, axis=1, return_inverse=True)
        test_patterns, self._test_of = np.unique(test_seen, axis=1, return_inverse=True)
        if train_patterns.shape[1] * test_patterns.shape[1] > PATTERN_PAIRS:
            raise DataError(
                f"Entries are missing in {train_patterns.shape[1]} different patterns of training and "
                f"{test_patterns.shape[1]} of test examples, too many for {estimator.name}, which needs one "
                "decomposition for "
                "each pair of patterns. Use estimator='covariance', which leaves out missing entries pair by pair, or "
                "score the missing entries."
            )
        self._parts: dict[tuple[int, int], tuple[FactorBlocks, NDArray[np.int64], NDArray[np.int64]] | None] = {}
        for p in range(train_patterns.shape[1]):
            for q in range(test_patterns.shape[1]):
                common: Mask = train_patterns[:, p] & test_patterns[:, q]
                self._parts[p, q] = self._fit(estimator, members, setting, common, train_seen, test_seen)

    def _fit(
        self, estimator: Estimator, members: MemberLosses, setting: Setting, common: Mask, train: Mask, test: Mask
    ) -> tuple[FactorBlocks, NDArray[np.int64], NDArray[np.int64]] | None:
        if common.sum() < 2:
            return None
        rows, columns = np.flatnonzero(train[common].all(axis=0)), np.flatnonzero(test[common].all(axis=0))
        part = MemberLosses(
            members.train_KN[common][:, rows],
            members.test_KM[common][:, columns],
            None if members.inclusion_KN is None else members.inclusion_KN[common][:, rows],
            members.kept[common],
            True,
        )
        noise = setting.noise
        if isinstance(noise, np.ndarray) and noise.ndim:
            noise = noise[rows]
        factors = estimator.factorise(part, replace(setting, noise=noise))
        row_of, column_of = np.full(self.shape[0], -1), np.full(self.shape[1], -1)
        row_of[rows], column_of[columns] = np.arange(rows.size), np.arange(columns.size)
        return FactorBlocks(factors), row_of, column_of

    def _gather(self, rows: slice, columns: slice, stderr: bool) -> Floats:
        train_of, test_of = self._train_of[rows], self._test_of[columns]
        out = np.full((train_of.size, test_of.size), np.nan)
        first_row, first_column = rows.indices(self.shape[0])[0], columns.indices(self.shape[1])[0]
        for p in np.unique(train_of):
            for q in np.unique(test_of):
                part = self._parts[int(p), int(q)]
                if part is None:
                    continue
                blocks, row_of, column_of = part
                i, j = np.flatnonzero(train_of == p), np.flatnonzero(test_of == q)
                chosen = blocks.select(row_of[i + first_row], column_of[j + first_column])
                everything = slice(None)
                values = chosen.stderr_block(everything, everything) if stderr else chosen.block(everything, everything)
                out[np.ix_(i, j)] = values
        return out

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        return self._gather(rows, columns, stderr=False)

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors."""
        return self._gather(rows, columns, stderr=True)


def score_blocks(estimator: Estimator, members: MemberLosses, setting: Setting) -> ScoreBlocks:
    """Scores of one estimator, ready to be computed block by block."""
    if setting.log_offset is not None:
        members = replace(members, test_KM=stabilised(members.test_KM, setting.log_offset))
    if members.complete:
        return FactorBlocks(estimator.factorise(members, setting))
    if estimator.moment:
        return PairwiseBlocks(estimator, members)
    return PatternBlocks(estimator, members, setting)
