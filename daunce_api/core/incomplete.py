"""Scores where losses are missing.

Gaps are those of the final models (`usable_checkpoints` takes them over to earlier ones): a pair uses the members whose
final models have both of its losses, with all their rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from daunce_api.core.checkpoints import Floats, Mask
from daunce_api.core.complete import FactorBlocks, correlation_without
from daunce_api.core.estimators import Estimator
from daunce_api.core.members import MemberLosses
from daunce_api.core.spectrum import Setting
from daunce_api.errors import DataError

PATTERN_PAIRS = 2_000  # decompositions that filters are given for incomplete data; some seconds


def few_patterns(members: MemberLosses) -> bool:
    """Whether the gaps in the losses are regular enough for filters (see `PatternBlocks`)."""
    if members.complete:
        return True
    patterns = [np.unique(np.isfinite(x), axis=1).shape[1] for x in (members.train_KN, members.test_KM)]
    return bool(patterns[0] * patterns[1] <= PATTERN_PAIRS)


class PairwiseBlocks:
    """Moment estimators on incomplete data: each pair uses the members that have both of its losses.

    A pair with fewer than two common members has score NaN, one with fewer than three a NaN standard error.
    """

    def __init__(self, estimator: Estimator, members: MemberLosses) -> None:
        self._standardised = estimator.name == "correlation"
        left = members.train_stages
        if estimator.needs_inclusion:
            if members.inclusion_KN is None:
                raise DataError("The inclusion estimator needs the inclusion matrix.")
            left = (-members.inclusion_KN.astype(np.float64),) * len(left)
        self._left, self._right = [_Filled(x) for x in left], [_Filled(x) for x in members.test_stages]
        self.shape = (members.train_KN.shape[1], members.test_KM.shape[1])

    def _moments(self, rows: slice, columns: slice) -> Iterator[_Moments]:
        for left, right in zip(self._left, self._right, strict=True):
            yield _Moments(left, right, rows, columns)

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        stages = list(self._moments(rows, columns))
        cross, freedom = sum(s.cross for s in stages), np.asarray(sum(s.freedom for s in stages))
        with np.errstate(invalid="ignore", divide="ignore"):
            if self._standardised:
                left, right = sum(s.left_squares for s in stages), sum(s.right_squares for s in stages)
                positive = (left > 0) & (right > 0)
                score = np.where(positive, cross / np.sqrt(np.where(positive, left * right, 1.0)), 0.0)
            else:
                score = cross / freedom
        return np.where(freedom < 1, np.nan, score)

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors; columns are centred on their own observed members."""
        stages = list(self._moments(rows, columns))
        count = stages[-1].count
        change = self._correlation_change if self._standardised else self._covariance_change
        total, squares = change(stages)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(np.maximum(squares - total**2 / count, 0) * (count - 1) / count)
        return np.where(count < 3, np.nan, error)

    def _covariance_change(self, stages: list[_Moments]) -> tuple[Floats, Floats]:
        freedom = np.asarray(sum(s.freedom for s in stages))
        rest = np.maximum(freedom - sum(s.used for s in stages), 1)
        total, squares = np.zeros(freedom.shape), np.zeros(freedom.shape)
        for i, s in enumerate(stages):
            weight = s.inflation / rest
            total += weight * (s.x.T @ s.y)
            squares += weight**2 * ((s.x**2).T @ s.y**2)
            for t in stages[:i]:
                squares += 2 * weight * t.inflation / rest * ((s.x * t.x).T @ (s.y * t.y))
        return total, squares

    def _correlation_change(self, stages: list[_Moments]) -> tuple[Floats, Floats]:
        norms = [sum(s.used * ((s.x**2).T @ s.q) for s in stages), sum(s.used * (s.p.T @ s.y**2) for s in stages)]
        left, right = (np.where(np.asarray(n) > 0, n, 1.0) for n in norms)
        score = sum(s.used * (s.x.T @ s.y) for s in stages) / np.sqrt(left * right)
        total, squares = np.zeros_like(score), np.zeros_like(score)
        for k in range(stages[0].x.shape[0]):
            cross = sum(s.inflation * np.outer(s.x[k], s.y[k]) for s in stages) / np.sqrt(left * right)
            own_left = sum(s.inflation * s.x[k][:, None] ** 2 for s in stages) / left
            own_right = sum(s.inflation * s.y[k] ** 2 for s in stages) / right
            both = np.outer(stages[-1].p[k], stages[-1].q[k])
            change = np.where(both > 0, score - correlation_without(score, cross, own_left, own_right), 0.0)
            total += change
            squares += change**2
        return total, squares


class _Filled:
    """Columns centred on their observed members with zeros for the missing ones, and the mask of what is observed."""

    def __init__(self, loss_KX: Floats) -> None:
        seen = np.isfinite(loss_KX)
        count = seen.sum(axis=0)
        mean = np.where(seen, loss_KX, 0).sum(axis=0, dtype=np.float64) / np.maximum(count, 1)
        self.deviation_KX: Floats = np.where(seen, loss_KX - mean, 0.0)
        self.seen_KX = seen.astype(np.float64)


class _Moments:
    """Sums over the common members of each pair at one stage; zero where there are fewer than two.

    Attributes:
        x, p: (K, n) deviations and mask of the training side. y, q: (K, m) of the test side.
        count: (n, m) common members. used: whether there are two. freedom: how many more than one.
        inflation: count / (count - 1), see `Stages.inflation`.
        cross: (n, m) sums of products about the common means.
    """

    def __init__(self, left: _Filled, right: _Filled, rows: slice, columns: slice) -> None:
        self.x, self.p = left.deviation_KX[:, rows], left.seen_KX[:, rows]
        self.y, self.q = right.deviation_KX[:, columns], right.seen_KX[:, columns]
        self.count: Floats = self.p.T @ self.q
        self.used: Floats = (self.count >= 2).astype(np.float64)
        self.freedom: Floats = self.used * (self.count - 1)
        self.inflation: Floats = self.used * self.count / np.maximum(self.count - 1, 1)
        self.cross = self._about_mean(self.x.T @ self.y, self.x.T @ self.q, self.p.T @ self.y)

    def _about_mean(self, product: Floats, left: Floats, right: Floats) -> Floats:
        return np.asarray(self.used * (product - left * right / np.maximum(self.count, 1)))

    @property
    def left_squares(self) -> Floats:
        """(n, m) sums of squares of the training side about the mean over common members."""
        total = self.x.T @ self.q
        return self._about_mean((self.x**2).T @ self.q, total, total)

    @property
    def right_squares(self) -> Floats:
        """(n, m) of the test side."""
        total = self.p.T @ self.y
        return self._about_mean(self.p.T @ self.y**2, total, total)


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
        some = members.rows(common)
        part = replace(
            some,
            train_KN=some.train_KN[:, rows],
            test_KM=some.test_KM[:, columns],
            inclusion_KN=None if some.inclusion_KN is None else some.inclusion_KN[:, rows],
            complete=True,
            earlier=None if some.earlier is None else some.earlier.columns(rows, columns),
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
