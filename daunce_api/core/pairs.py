"""Scores of one estimator: computed where they are needed, block by block, with standard errors and sums over groups.

Every estimator is an inner product over rows, ``score_NM = left_RN.T @ right_RM``, which is what makes exact top-k,
group sums and standard errors possible without ever holding an N x M matrix. Two things may come on top.

SHRINKAGE. A filter's score is an inner product of two vectors, a of the training and b of the test example, which K
members spread over d directions. Unrelated vectors are not orthogonal: their product has a standard deviation of
|a| |b| / sqrt(d). And influence is heavy-tailed: most of what the many small scores add up to is chance. With
z = score sqrt(d) / (|a| |b|) every score is therefore multiplied by z^2 / (z^2 + c), which leaves what stands out as it
is and takes the rest away: for c = 1 an empirical Wiener filter with the pair's own square as the estimate of its
signal (Ghael, Sayeed and Baraniuk 1997); the sparser the influence, the larger the c that is right. The result grows
with the score and never exceeds it. With the filter phi, a = phi^1/2 U^T A_i and b likewise, and p = w phi spreads over
d = (sum p)^2 / sum p^2 directions (the participation ratio).

PRIOR. What is known of a pair before any member is trained is added, so many root mean squares of the test example's
scores (`choice.prior_weight`). Where the prior is borne out, a pair that it relates is also more likely to have an
influence that is not chance: c is exp(-g p) times as much for a pair with (standardized) prior p. Standard errors and
z-values are those of the evidence alone; z does not depend on weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from ..errors import ConfigurationError, DataError
from .estimators import Setting, Spectrum, estimator_named, ridge_of, spectrum_of, stabilized
from .jackknife import (
    LEAST_FOR_CORRELATION,
    ErrorTerm,
    correlation_without,
    filter_terms,
    jackknife,
    squared_changes,
    z_values,
)
from .rows import Floats, Index, MemberLosses, Stages, stacked

_ROWS = 8_192
_TILE = (2_048, 512)
_ALL = slice(None)
_ROOT_OF_FIVE = 5**0.5


@dataclass(frozen=True, eq=False)
class Shrinkage:
    """What the weights of all pairs are made of.

    Attributes:
        left_N: (N,) 1 / |a|, zero for a vector of zeros.
        right_M: (M,) sqrt(d / c) / |b|, likewise.
        most: sqrt(d / c), what a score's size can be at most in units of left_N and right_M.
        tilt_NM: exp(g p), by which a pair's z^2 counts more, or None.
    """

    left_N: Floats
    right_M: Floats
    most: float
    tilt_NM: Floats | None = None

    @staticmethod
    def of(amount: float, filtered_D: Floats, left_square_N: Floats, right_square_M: Floats) -> Shrinkage:
        """From c, the filtered spectrum w phi, and the squared lengths of all vectors."""
        directions = float(filtered_D.sum() ** 2 / (filtered_D**2).sum())
        left, right = (
            np.divide(1, np.sqrt(x), out=np.zeros_like(x), where=x > 0) for x in (left_square_N, right_square_M)
        )
        most = float(np.sqrt(directions / amount))
        return Shrinkage(left, right * right.dtype.type(most), most)

    def weight(self, score: Floats, rows: slice | Index, columns: slice | Index) -> Floats:
        """Weights in [0, 1) of unweighted scores: (n, m) of a block, or (p,) of single pairs without a prior."""
        square = self.square(score, rows, columns)
        return np.asarray(square / (1 + square))

    def square(self, score: Floats, rows: slice | Index, columns: slice | Index) -> Floats:
        """z^2 / c."""
        left = self.left_N[rows]
        square = score * (left[:, None] if score.ndim == 2 else left)
        square *= self.right_M[columns]
        square *= square
        if self.tilt_NM is not None:
            square *= self.tilt_NM[rows][:, columns]
        return np.asarray(square)

    def swapped(self) -> Shrinkage:
        """The two sides exchanged."""
        return Shrinkage(self.right_M, self.left_N, self.most, None if self.tilt_NM is None else self.tilt_NM.T)

    def rows(self, pick: Index) -> Shrinkage:
        """Of some training examples."""
        tilt = None if self.tilt_NM is None else self.tilt_NM[pick]
        return replace(self, left_N=self.left_N[pick], tilt_NM=tilt)

    def lengths(self) -> list[Floats]:
        """|a| and |b|, this times the largest weight there is: no weighted score exceeds their product."""
        left, right = (np.divide(1, x, out=np.zeros_like(x), where=x > 0) for x in (self.left_N, self.right_M))
        return [left, right * right.dtype.type(self.most**3 / (1 + self.most**2))]

    def least(self, weighted_m: Floats, rows: slice, columns: slice) -> Floats:
        """(m,) what a score of these rows is before its weight where it is ``weighted_m`` after, or less: the root of
        q^2 s^3 = t (1 + q^2 s^2), a little too small; -inf where nothing bounds it."""
        q2 = np.square(self.left_N[rows].max() * self.right_M[columns])
        known = (weighted_m > 0) & (q2 > 0)
        t, q2 = weighted_m[known], q2[known]
        s = t + np.cbrt(t / q2)
        for _ in range(5):  # Newton, from above
            s -= ((s - t) * s * s * q2 - t) / ((3 * s - 2 * t) * s * q2)
        out = np.full_like(weighted_m, -np.inf)
        out[known] = s * (1 - 1e-4)
        return out

    def slope(self, score: Floats, rows: slice | Index, columns: slice | Index) -> Floats:
        """What a deviation of the score makes of the weighted one, root mean square: w (5^1/2 - (5^1/2 - 1) w).

        1 for a score that stands out. For one that is chance alone, normal about zero, a small weighted score is its
        cube, whose variance is 15 where that of w times it, with E w^2 = 3, is 3: five times as much.
        """
        weight = self.weight(score, rows, columns)
        return np.asarray(weight * (_ROOT_OF_FIVE - (_ROOT_OF_FIVE - 1) * weight))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all pairs, with what their standard errors need.

    Attributes:
        left_RN: (R, N) training side. right_RM: (R, M) test side; ``left.T @ right`` is the score before weights.
        tests_RM: (R, M) centred test losses, from which the test side of the errors comes.
        make_terms: what leaving out one member changes, as a sum of products (see `jackknife`); made when first used.
        stages: which rows belong to one member.
        kept_N, kept_M, shape: where these examples are among all, as in `MemberLosses`.
        standardized: columns were divided by their standard deviation, whose own error counts too (correlation).
        shrinkage: with it, a score is the product times the pair's weight.
        prior_NM: what is added to the evidence, in its units.
    """

    left_RN: Floats
    right_RM: Floats
    tests_RM: Floats
    make_terms: Callable[[], tuple[ErrorTerm, ...]]
    stages: Stages
    kept_N: Index
    kept_M: Index
    shape: tuple[int, int]
    standardized: bool = False
    shrinkage: Shrinkage | None = None
    prior_NM: Floats | None = None

    @property
    def of_sides(self) -> bool:
        """Whether scores follow from their two sides alone, without a prior of the pair."""
        return self.prior_NM is None and (self.shrinkage is None or self.shrinkage.tilt_NM is None)

    @cached_property
    def terms(self) -> tuple[ErrorTerm, ...]:
        """See `make_terms`."""
        return self.make_terms()

    def dense(self) -> Floats:
        """(N, M) all scores; NaN for examples without losses."""
        parts = [self.block(slice(i, i + _ROWS)) for i in range(0, self.shape[0], _ROWS)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def block(self, rows: slice = _ALL) -> Floats:
        """(n, M) scores of some training examples; NaN for examples without losses."""
        return self._placed(rows, lambda inner: self.inner(inner, _ALL))

    def stderr_block(self, rows: slice = _ALL) -> Floats:
        """(n, M) their standard errors."""
        return self._placed(rows, lambda inner: self.inner_stderr(inner, _ALL))

    def z_block(self, rows: slice = _ALL) -> Floats:
        """(n, M) how many standard errors the evidence is from zero."""
        return self._placed(
            rows,
            lambda inner: z_values(
                self.evidence(inner, _ALL), self.inner_stderr(inner, _ALL), correlation=self.standardized
            ),
        )

    def _placed(self, rows: slice, values: Callable[[slice], Floats]) -> Floats:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = np.searchsorted(self.kept_N, (start, stop))
        inner = values(slice(int(first), int(last)))
        if inner.shape == (stop - start, self.shape[1]):
            return inner
        out = np.full((max(stop - start, 0), self.shape[1]), np.nan, dtype=inner.dtype)
        out[np.ix_(self.kept_N[first:last] - start, self.kept_M)] = inner
        return out

    # --- below, rows and columns are those of the examples that have losses ---

    def product(self, rows: slice | Index, columns: slice | Index) -> Floats:
        """(n, m) scores before weights."""
        return np.asarray(self.left_RN[:, rows].T @ self.right_RM[:, columns])

    def evidence(self, rows: slice, columns: slice) -> Floats:
        """(n, m) what the members say."""
        score = self.product(rows, columns)
        return score if self.shrinkage is None else score * self.shrinkage.weight(score, rows, columns)

    def inner(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores: evidence and prior."""
        score = self.evidence(rows, columns)
        return score if self.prior_NM is None else score + self.prior_NM[rows, columns]

    def inner_stderr(self, rows: slice | Index, columns: slice | Index) -> Floats:
        """(n, m) standard errors of the evidence."""
        left_RX, tests_RX = self.left_RN[:, rows], self.tests_RM[:, columns]
        if self.standardized:
            return self._correlation_errors(left_RX, tests_RX)
        out = np.empty((left_RX.shape[1], tests_RX.shape[1]), dtype=left_RX.dtype)
        members = self.stages.members
        for i in range(0, out.shape[0], _TILE[0]):
            left = left_RX[:, i : i + _TILE[0]]
            lefts = self.stages.by_member(np.concatenate([t.left(left) for t in self.terms]))
            for j in range(0, out.shape[1], _TILE[1]):
                rights = [t.right(tests_RX[:, j : j + _TILE[1]]) for t in self.terms]
                # The left maps are symmetric, so the sum over members is one product, however many terms there are.
                total = left.T @ sum(t.left(right) for t, right in zip(self.terms, rights, strict=True))
                squares = squared_changes(lefts, self.stages.by_member(np.concatenate(rights)))
                out[i : i + _TILE[0], j : j + _TILE[1]] = jackknife(squares, total, members)
        return (
            out if self.shrinkage is None else out * self.shrinkage.weight(self.product(rows, columns), rows, columns)
        )

    def _correlation_errors(self, left_RX: Floats, right_RY: Floats) -> Floats:
        score = left_RX.T @ right_RY
        root = np.sqrt(self.stages.inflation()).astype(left_RX.dtype)[:, None]
        a_KTX, b_KTY = self.stages.by_member(left_RX * root), self.stages.by_member(right_RY * root)
        total, squares = np.zeros_like(score), np.zeros_like(score)
        for a, b in zip(a_KTX, b_KTY, strict=True):
            change = score - correlation_without(score, a.T @ b, (a**2).sum(axis=0)[:, None], (b**2).sum(axis=0))
            total += change
            squares += change**2
        return jackknife(squares, total, self.stages.members, least=LEAST_FOR_CORRELATION)


def fit(losses: MemberLosses, name: str, setting: Setting | None = None) -> Scores:
    """Scores by a named estimator.

    Raises:
        ConfigurationError: unknown, or something that it needs is not given.
        DataError: the training losses are the same in all members, or the scoring noise leaves nothing above it.
    """
    setting, entry = setting or Setting(), estimator_named(name)
    if not setting.checkpoints:
        losses = losses.final()
    stages, left = losses.stages, losses.train_rows()
    tests = stacked([stages.centre_stage(t, stabilized(x, setting.log_offset)) for t, x in enumerate(losses.test)])
    place = losses.kept_N, losses.kept_M, losses.shape
    if name == "inclusion":
        if losses.inclusion_KN is None:
            raise ConfigurationError("The inclusion estimator needs the inclusion matrix: pass inclusion_KN.")
        included = -losses.inclusion_KN.astype(left.dtype)
        left = stacked([stages.centre_stage(t, included) for t in range(stages.count)])
    if name == "correlation":
        left, tests = _unit_columns(left), _unit_columns(tests)
        known_norms = (ErrorTerm(None, stages.inflation()),)
        return Scores(left, tests, tests, lambda: known_norms, stages, *place, standardized=True)
    moments = (ErrorTerm(None, stages.left_out()),)
    if name == "inclusion" or (name == "covariance" and setting.shrinkage is None):
        scores = Scores(left, tests / stages.freedom, tests, lambda: moments, stages, *place)
        return _with_prior(scores, losses, setting)
    assert entry.filter is not None
    spectrum = spectrum_of(losses)
    phi = entry.filter(spectrum, setting)
    if not (phi > 0).any():
        raise DataError(
            f"Scoring noise ({spectrum.noise_energy:.3g} nats^2 over all training examples) is larger than every "
            f"direction in which members differ (largest {spectrum.w[0]:.3g}). The losses stay usable with "
            "estimator='covariance'; larger members (more epochs, a higher learning rate, a larger subset) or repeated "
            "scoring would help."
        )
    right = (spectrum.u_RD @ (phi[:, None] * (spectrum.u_RD.T @ tests))).astype(left.dtype)
    terms: Callable[[], tuple[ErrorTerm, ...]] = partial(filter_terms, spectrum, phi, ridge_of(spectrum, setting))
    if name == "covariance":
        right, terms = tests / stages.freedom, lambda: moments
    shrinkage = _shrinkage(setting.shrinkage, spectrum, phi, left, tests)
    if shrinkage is not None and setting.tilt and losses.prior_NM is not None:
        shrinkage = replace(shrinkage, tilt_NM=tilted(losses.prior_NM, setting.tilt).astype(left.dtype))
    scores = Scores(left, right, tests, terms, stages, *place, shrinkage=shrinkage)
    return _with_prior(scores, losses, setting)


def _shrinkage(
    amount: float | None, spectrum: Spectrum, phi: Floats, left_RN: Floats, tests_RM: Floats
) -> Shrinkage | None:
    if amount is None:
        return None
    half_DR = (np.sqrt(phi)[:, None] * spectrum.u_RD.T).astype(left_RN.dtype)
    squares = []
    for side_RX in (left_RN, tests_RM.astype(left_RN.dtype, copy=False)):
        parts = [half_DR @ side_RX[:, i : i + _ROWS] for i in range(0, side_RX.shape[1], _ROWS)]
        squares.append(np.concatenate([np.einsum("dx,dx->x", p, p) for p in parts] or [np.zeros(0, left_RN.dtype)]))
    return Shrinkage.of(amount, spectrum.w * phi, *squares)


def tilted(prior: Floats, tilt: float) -> Floats:
    """exp(g p). Priors are skewed: beyond -2 and 3 standard deviations they say no more."""
    return np.asarray(np.exp(tilt * np.clip(prior, -2, 3)))


def _with_prior(scores: Scores, losses: MemberLosses, setting: Setting) -> Scores:
    if losses.prior_NM is None or not setting.prior:
        return scores
    square_M = np.zeros(losses.kept_M.size)
    for start in range(0, losses.kept_N.size, _ROWS):
        square_M += np.square(scores.evidence(slice(start, start + _ROWS), _ALL)).sum(axis=0, dtype=np.float64)
    rms_M = np.sqrt(square_M / losses.kept_N.size)
    return replace(scores, prior_NM=(losses.prior_NM * (setting.prior * rms_M)).astype(scores.left_RN.dtype))


def _unit_columns(a_KX: Floats) -> Floats:
    norm = np.sqrt(np.einsum("kx,kx->x", a_KX, a_KX, dtype=np.float64)).astype(a_KX.dtype)
    return np.asarray(np.divide(a_KX, norm, out=np.zeros_like(a_KX), where=norm > 0))
