"""What leaving out one member changes: the parts that standard errors are made of.

The score of a pair without member k differs by a sum over the rows of that member (`checkpoints`) and over a few terms,
each a training-side number times a test-side number. Both are linear in the centred losses of their side, so a term is
two maps over rows, whatever the examples are: groups sum columns first, and some examples need no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from daunce_api.core.checkpoints import Floats, Stages
from daunce_api.core.spectrum import Matrix, Spectrum, Vector

_RIDGES = 17  # in a mixture: 49 fit half_whitened no better than to 1e-4, and cost three times as much
MOST_MATRICES = 2 * (_RIDGES + 1)  # (R, R), that the terms of a filter hold
_ITERATIONS = 10_000  # of the fit, which takes some dozens; SciPy's default is three for each ridge


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
        """(R, n) training side, from columns of `Factors.left_RN`."""
        return left_RX if self.left_map is None else np.asarray(self.left_map.astype(left_RX.dtype) @ left_RX)

    def right(self, tests_RX: Floats) -> Floats:
        """(R, m) test side, from columns of `Factors.tests_RM`."""
        own = self.right_map.astype(tests_RX.dtype)
        return np.asarray(own @ tests_RX if own.ndim == 2 else own[:, None] * tests_RX)


def moment_terms(stages: Stages) -> tuple[ErrorTerm, ...]:
    """Of a covariance: the deviations themselves, with the divisor held fixed."""
    return (ErrorTerm(None, stages.left_out()),)


def unit_terms(stages: Stages) -> tuple[ErrorTerm, ...]:
    """Of a covariance of columns of length 1: a correlation with its norms taken as known, for sums over groups.

    Left out as a covariance would be, over fixed standard deviations, a member would change it by K / (K - 2) times its
    product. But the norms are those of the same members: without association a correlation has variance 1 / (K - 1),
    which is what the jackknife of K / (K - 1) times the product is expected to give. Simulated groups of 5 to 1,200
    pairs at K = 8 to 20 have 95 % intervals that cover .93 to .97 so (.96 to .99 with K - 2, .91 to .95 without either,
    .92 to .99 with the norms of every pair left out too), and up to .98 where correlations of .5 make norms matter.
    """
    return (ErrorTerm(None, stages.inflation()),)


def filter_terms(spectrum: Spectrum, phi: Vector, ridge: float) -> tuple[ErrorTerm, ...]:
    """Of a filter, as a mixture of ridges, each of which is exact (see `complete`).

    Args:
        spectrum, phi: the filter's eigenvalues, eigenvectors and weights.
        ridge: a ridge that the mixture may use besides its own, nats^2: that of `whitened`.
    """
    terms = []
    for c, scale in _ridge_mixture(spectrum, phi, ridge):
        resolvent = 1 / (spectrum.w + c)
        # R = (G + c)^-1 lives in the space of centred rows: there it is 1 / c where A is zero.
        whole = (spectrum.u_RD * (resolvent - 1 / c)) @ spectrum.u_RD.T + np.eye(spectrum.u_RD.shape[0]) / c
        changed = scale * _by_own_inverse(spectrum, c, resolvent, whole)
        terms.append(ErrorTerm((spectrum.u_RD * resolvent) @ spectrum.u_RD.T, changed))
    return tuple(terms)


def _by_own_inverse(spectrum: Spectrum, ridge: float, resolvent_D: Vector, whole_RR: Matrix) -> Matrix:
    """(R, R) ``R_kk^-1 R_k`` for every member k, R_kk the block of its own rows of R = (G + ridge)^-1."""
    stages = spectrum.stages
    u_KTD = stages.by_member(spectrum.u_RD)
    size = stages.present_TK.sum(axis=1)
    own = (u_KTD * (resolvent_D - 1 / ridge)) @ u_KTD.swapaxes(1, 2)
    kept = np.where(stages.present_TK, (1 - 1 / np.maximum(size, 1))[:, None] / ridge, 1.0)
    own += kept.T[:, :, None] * np.eye(stages.count)
    return np.asarray(np.linalg.solve(own, stages.by_member(whole_RR)).swapaxes(0, 1).reshape(whole_RR.shape))


def _ridge_mixture(spectrum: Spectrum, phi: Vector, ridge: float) -> list[tuple[float, float]]:
    """(c, alpha) pairs with sum alpha / (w + c) close to phi on the eigenvalues, each weighted as it counts in scores.

    `whitened` is one such term, `half_whitened` and `matched` are mixtures of them (all are Stieltjes functions of w).
    """
    w = spectrum.w
    grid = np.append(spectrum.mean * np.geomspace(1e-4, 1e4, _RIDGES), ridge)
    basis = w[:, None] / (w[:, None] + grid)
    norm, size = np.sqrt((basis**2).sum(axis=0)), float(np.linalg.norm(w * phi))
    weight, _ = nnls(basis / norm, w * phi / size, maxiter=_ITERATIONS)
    used = np.flatnonzero(weight > 1e-6 * weight.max())
    return [(float(grid[t]), float(size * weight[t] / norm[t])) for t in used]
