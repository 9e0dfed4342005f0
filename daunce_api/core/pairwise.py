"""Moment estimators where losses are missing, pair by pair; which members count is as in `incomplete`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .checkpoints import Floats
from .complete import LEAST_FOR_CORRELATION, correlation_without
from .estimators import Estimator
from .grouping import ROWS, Groups, group_error, group_sums, is_single, sum_groups
from .members import MemberLosses


class PairwiseBlocks:
    """Moment estimators on incomplete data: each pair uses the members that have both of its losses.

    A pair with fewer than two common members has score NaN, one with fewer than three (of `correlation`: four) a NaN
    standard error.
    """

    def __init__(self, estimator: Estimator, members: MemberLosses) -> None:
        self._standardised = estimator.name == "correlation"
        self._least = LEAST_FOR_CORRELATION if self._standardised else 3
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
        return np.where(count < self._least, np.nan, error)

    def count_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) members that have both losses."""
        return np.asarray(self._left[-1].seen_KX[:, rows].T @ self._right[-1].seen_KX[:, columns])

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
        left, right = self._norms(stages)
        score = sum(s.used * (s.x.T @ s.y) for s in stages) / np.sqrt(left * right)
        total, squares = np.zeros_like(score), np.zeros_like(score)
        for k, cross in enumerate(self._products(stages)):
            own_left = sum(s.inflation * s.x[k][:, None] ** 2 for s in stages) / left
            own_right = sum(s.inflation * s.y[k] ** 2 for s in stages) / right
            both = np.outer(stages[-1].p[k], stages[-1].q[k])
            change = np.where(both > 0, score - correlation_without(score, cross, own_left, own_right), 0.0)
            total += change
            squares += change**2
        return total, squares

    def _norms(self, stages: list[_Moments]) -> tuple[Floats, Floats]:
        """(n, m) sums of squares of either side over the common members; 1 for columns that do not vary."""
        left = np.asarray(sum(s.used * ((s.x**2).T @ s.q) for s in stages))
        right = np.asarray(sum(s.used * (s.p.T @ s.y**2) for s in stages))
        return np.where(left > 0, left, 1.0), np.where(right > 0, right, 1.0)

    def _products(self, stages: list[_Moments]) -> Iterator[Floats]:
        """(n, m) what a member adds to the sum that a score is, for one member after the other; zero where it lacks a
        loss. Divisors and norms are held fixed (`moment_terms`, `unit_terms`)."""
        if self._standardised:
            left, right = self._norms(stages)
            weights = [s.inflation / np.sqrt(left * right) for s in stages]
        else:
            rest = np.maximum(sum(s.freedom for s in stages) - np.asarray(sum(s.used for s in stages)), 1)
            weights = [s.inflation / rest for s in stages]
        for k in range(stages[0].x.shape[0]):
            yield np.asarray(sum(w * np.outer(s.x[k], s.y[k]) for w, s in zip(weights, stages, strict=True)))

    def group_block(self, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(G, H) sums of scores over groups of examples, and their standard errors (`group_error`)."""
        whole = slice(None)
        if is_single(row_of) and is_single(column_of):
            return self.block(whole, whole), self.stderr_block(whole, whole)
        out = np.zeros((self._left[-1].seen_KX.shape[0], int(row_of.max()) + 1, int(column_of.max()) + 1))
        for start in range(0, self.shape[0], ROWS):
            piece = slice(start, start + ROWS)
            stages = list(self._moments(piece, whole))
            count, own = stages[-1].count, Groups.of(row_of[piece])
            with np.errstate(invalid="ignore", divide="ignore"):
                scale = np.where(count < self._least, np.nan, np.sqrt((count - 1) / count))
            scale[count < 2] = 0.0  # without a score, nothing is added
            mean = sum(self._products(stages), np.zeros_like(count)) / np.maximum(count, 1)
            for k, change in enumerate(self._products(stages)):
                both = np.outer(stages[-1].p[k], stages[-1].q[k])
                out[k][own.present] += own.sums(sum_groups(both * (change - mean) * scale, column_of))
        return group_sums(self, row_of, column_of), group_error(out)


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
