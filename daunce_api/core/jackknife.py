"""Standard errors: what leaving out one member changes; and when a score is different from zero.

A standard error is the jackknife over members (Efron and Stein 1981): with d_k the difference that leaving out member k
makes, ``stderr^2 = (K - 1) / K * sum_k (d_k - mean d)^2``. A member's rows at all stages (`rows`) are left out
together. A difference is a sum over a few terms, each a training-side number times a test-side number of every row of
the member; both are linear in the centred losses of their side, so a term is two maps over rows, whatever the examples
are: groups sum columns first, and some examples need no others.

For `covariance` and `inclusion` they are the deviations themselves (the divisor held fixed where members have different
numbers of rows). For `whitened`, as for any ridge, with R = (G + c)^-1 and P the rows of member k,
``d_k = (R A)_Pi^T R_PP^-1 (R B)_Pj``, exactly (lambda held fixed). `half_whitened` is a mixture of ridges, and d_k the
same mixture. For `correlation` the column norms change too: with unit columns a, b and
c = K_t / (K_t - 1), ``r_-k = (r - sum_t c a b) / sqrt((1 - sum_t c a^2) (1 - sum_t c b^2))``.

Sums of correlations over groups take the norms as known: ``d_k = sum_t c a b``. As a covariance over fixed standard
deviations, a member would change them by K / (K - 2) times its product; but the norms are those of the same members:
without association a correlation has variance 1 / (K - 1), which is what this is expected to give. Simulated groups of
5 to 1,200 pairs at K = 8 to 20 have 95 % intervals that cover .93 to .97 so, and up to .98 where correlations of .5
make norms matter.

Why a filter's changes are taken smaller than they are. With R = (G + c)^-1 and Gaussian rows of second moment T, a
ridge acts in expectation as T (T + kappa)^-1 with 1 / kappa = tr R. What member k changes is a product of two
factors, each of which holds the other K - 1 members. Summed member by member (a martingale), the variance of a score
is C int_0^1 (1 - s gamma)^-2 ds = C / (1 - gamma) with gamma = (1 / K) sum tau^2 / (tau + kappa)^2 over the
eigenvalues tau of T; leaving out one of K from all others gives C / (1 - gamma)^2. The jackknife counts twice what
members do together: it is too large by 1 / (1 - gamma), and since K (1 - gamma) = (tr R)^2 / tr R^2, the sample's own
spectrum says by how much. Nothing for a covariance; 1.3 to 2.8 times on simulated rows with strong whitening, where the
corrected one is .87 to 1.03 times the variance. For a mixture of ridges C and gamma are those of pairs of ridges.

A score is no normal variable and its error depends on it, so under Student's t with K - 1 degrees of freedom the
right variance covers .91 to .94 where .95 is meant. What covers is 1 + 17 / K times as much (measured, see
RESULTS-estimators.md); where that exceeds the jackknife, as it does for nearly every `half_whitened` and weaker filter,
the jackknife stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .estimators import Matrix, Spectrum, Vector
from .rows import Floats

LEAST_FOR_CORRELATION = 4  # of three members two are left, whose correlation is 1 or -1 whatever they are
_RIDGES = 17  # in a mixture: 49 fit half_whitened no better than to 1e-4, and cost three times as much
_SIGNED_RIDGES = np.geomspace(10**-2.5, 1e2, 8)  # relative to the mean eigenvalue; 17 fit no better
_MISFIT = 1e-3  # of a mixture with positive weights, from which on weights of either sign are taken
_DAMPING = 1e-3  # of those, which keeps them from cancelling each other by more than they gain
_ITERATIONS = 10_000  # of the fit, which takes some dozens; SciPy's default is three for each ridge
_STRIP = 128  # rows whose changes stay in cache while members are gone through


@dataclass(frozen=True, eq=False)
class ErrorTerm:
    """One product in the change of a score when member k is left out: the sum over its rows r of
    ``(left_map @ left)_ri * (right_map @ tests)_rj``.

    Attributes:
        left_map: (R, R), symmetric, or None for the identity.
        right_map: (R, R), or (R,) weights of rows.
    """

    left_map: Matrix | None
    right_map: Matrix | Vector

    def left(self, left_RX: Floats) -> Floats:
        """(R, n) training side, from columns of `Scores.left_RN`."""
        return left_RX if self.left_map is None else np.asarray(self.left_map.astype(left_RX.dtype) @ left_RX)

    def right(self, tests_RX: Floats) -> Floats:
        """(R, m) test side, from columns of `Scores.tests_RM`."""
        own = self.right_map.astype(tests_RX.dtype)
        return np.asarray(own @ tests_RX if own.ndim == 2 else own[:, None] * tests_RX)


def filter_terms(spectrum: Spectrum, phi: Vector, ridge: float) -> tuple[ErrorTerm, ...]:
    """Of a filter, as a mixture of ridges, each exact, less what is counted twice (see above).

    Args:
        spectrum, phi: the filter's eigenvalues, eigenvectors and weights.
        ridge: a ridge that the mixture may use besides its own, nats^2: that of `whitened`.
    """
    ridges, weights = _ridge_mixture(spectrum, phi, ridge)
    counted_once = (1 + 17 / spectrum.stages.members) * overcounting(spectrum, ridges, weights)
    weights *= np.sqrt(min(counted_once, 1.0))
    terms = []
    for c, scale in zip(ridges, weights, strict=True):
        resolvent = 1 / (spectrum.w + c)
        # R = (G + c)^-1 lives in the space of centred rows: there it is 1 / c where A is zero.
        whole = (spectrum.u_RD * (resolvent - 1 / c)) @ spectrum.u_RD.T + np.eye(spectrum.u_RD.shape[0]) / c
        changed = scale * _by_own_inverse(spectrum, c, resolvent, whole)
        terms.append(ErrorTerm((spectrum.u_RD * resolvent) @ spectrum.u_RD.T, changed))
    return tuple(terms)


def overcounting(spectrum: Spectrum, ridges: Vector, weights: Vector) -> float:
    """Variance of ``sum_c weight_c A^T (G + c)^-1 B`` over the jackknife's, mean over pairs of examples: 1 - gamma.

    For two ridges ``D gamma = (kappa df - kappa' df') / (kappa - kappa')`` with df = D - c tr R and C as gamma^2; D
    counts the directions of centred rows, also those in which no loss differs.
    """
    freedom = spectrum.stages.freedom
    empty = freedom - spectrum.w.size
    inverse = 1 / (spectrum.w[:, None] + ridges)
    trace, squares = inverse.sum(axis=0) + empty / ridges, (inverse**2).sum(axis=0) + empty / ridges**2
    kappa, df = 1 / trace, freedom - ridges * trace
    own = np.maximum(1 - trace**2 / (freedom * squares), 0.0)
    apart = kappa[:, None] - kappa
    same = np.abs(apart) < 1e-6 * kappa
    gamma = np.sqrt(np.outer(own, own))
    gamma[~same] = ((kappa * df)[:, None] - kappa * df)[~same] / (apart[~same] * freedom)
    shared = np.outer(weights, weights) * gamma**2
    counted = float((shared / (1 - gamma) ** 2).sum())
    return float((shared / (1 - gamma)).sum()) / counted if counted > 0 else 1.0


def _by_own_inverse(spectrum: Spectrum, ridge: float, resolvent_D: Vector, whole_RR: Matrix) -> Matrix:
    """(R, R) ``R_kk^-1 R_k`` for every member k, R_kk the block of its own rows of R = (G + ridge)^-1."""
    stages = spectrum.stages
    u_KTD = stages.by_member(spectrum.u_RD)
    size = stages.present_TK.sum(axis=1)
    own = (u_KTD * (resolvent_D - 1 / ridge)) @ u_KTD.swapaxes(1, 2)
    kept = np.where(stages.present_TK, (1 - 1 / np.maximum(size, 1))[:, None] / ridge, 1.0)
    own += kept.T[:, :, None] * np.eye(stages.count)
    return np.asarray(np.linalg.solve(own, stages.by_member(whole_RR)).swapaxes(0, 1).reshape(whole_RR.shape))


def _ridge_mixture(spectrum: Spectrum, phi: Vector, ridge: float) -> tuple[Vector, Vector]:
    """c and alpha with sum alpha / (w + c) close to phi on the eigenvalues, each weighted as it counts in scores.

    `whitened` is one such term, `half_whitened` a mixture of them with positive weights (it is a Stieltjes function of
    w). Behind a Wiener weight they are not: phi falls towards the noise, which takes weights of
    either sign. Positive ones were up to .23 off there, those up to .03.
    """
    ridges = np.append(spectrum.mean * np.geomspace(1e-4, 1e4, _RIDGES), ridge)
    basis, size = _basis(spectrum.w, ridges)
    norm = float(np.linalg.norm(spectrum.w * phi))
    goal = spectrum.w * phi / norm
    from scipy.optimize import nnls  # slow to import

    weight, misfit = nnls(basis, goal, maxiter=_ITERATIONS)
    if misfit > _MISFIT:
        ridges = np.append(spectrum.mean * _SIGNED_RIDGES, ridge)
        basis, size = _basis(spectrum.w, ridges)
        damped = np.vstack([basis, _DAMPING * np.eye(ridges.size)])
        weight = np.linalg.lstsq(damped, np.append(goal, np.zeros(ridges.size)), rcond=None)[0]
    used = np.abs(weight) > 1e-6 * np.abs(weight).max()
    return ridges[used], (weight / size * norm)[used]


def _basis(w_D: Vector, ridges: Vector) -> tuple[Matrix, Vector]:
    """w / (w + c) for every ridge c, in columns of length 1, and the lengths that they had."""
    basis = w_D[:, None] / (w_D[:, None] + ridges)
    size = np.linalg.norm(basis, axis=0)
    return basis / size, np.asarray(size)


def squared_changes(lefts_KPX: Floats, rights_KPY: Floats) -> Floats:
    """(n, m) sums over members of d_k^2, d_k being a sum over P parts."""
    if lefts_KPX.shape[1] == 1:
        return np.asarray(np.square(lefts_KPX[:, 0]).T @ np.square(rights_KPY[:, 0]))
    left_KXP, right_KPY = np.ascontiguousarray(lefts_KPX.swapaxes(1, 2)), np.ascontiguousarray(rights_KPY)
    squares = np.zeros((left_KXP.shape[1], right_KPY.shape[2]), dtype=left_KXP.dtype)
    for i in range(0, squares.shape[0], _STRIP):
        for left, right in zip(left_KXP[:, i : i + _STRIP], right_KPY, strict=True):
            squares[i : i + _STRIP] += np.square(left @ right)
    return squares


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


# --- when is a score different from zero ------------------------------------------------------------------------------


def significance_threshold(members: int, level: float = 0.95) -> float:
    """|z| that one pair exceeds by chance with probability ``1 - level``: Student's t, K - 1 degrees of freedom."""
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(members - 1, (1 + level) / 2))


def z_values(score: Floats, stderr: Floats, *, correlation: bool = False) -> Floats:
    """How many standard errors scores are from zero; NaN where the error is zero or unknown.

    A correlation's error shrinks as it nears 1, so correlations are compared on Fisher's scale (1921):
    ``arctanh(r) / (stderr / (1 - r^2))``.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        z = _fisher(score) * (1 - np.square(score)) if correlation else score
        return np.asarray(np.where(stderr > 0, z / stderr, np.nan))


def confidence_interval(
    score: Floats, stderr: Floats, members: int, *, correlation: bool = False, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Lower and upper end of an interval for the expected score: Student's t with K - 1 degrees of freedom.

    Args:
        score, stderr: any matching shape. members: K. level: nominal coverage.
        correlation: scores are correlations; the interval is symmetric on Fisher's scale and stays within -1 to 1.
    """
    from scipy.special import stdtrit  # slow to import

    width = stdtrit(max(members - 1, 1), (1 + level) / 2) * np.asarray(stderr)
    if not correlation:
        return np.asarray(score - width), np.asarray(score + width)
    middle = _fisher(score)
    with np.errstate(invalid="ignore", divide="ignore"):
        width = width / (1 - np.tanh(middle) ** 2)
    return np.asarray(np.tanh(middle - width)), np.asarray(np.tanh(middle + width))


def _fisher(correlation: Floats) -> Floats:
    return np.asarray(np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6)))
