"""Member space: the R x R spectrum of the training losses, and filters over it.

With A (R, N) the centred training losses and B (R, M) the centred test losses, G = A A^T = U diag(w) U^T and every
filter estimator is ``score = A^T U diag(phi(w)) U^T B`` (METHOD in `daunce_api.core`, items 4 to 6). There are R = K
rows, one for each member, or as many more as earlier checkpoints are given (`checkpoints`). This module holds w, U and
the functions phi.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError, DataError
from .checkpoints import Floats, Stages
from .members import MemberLosses

Vector: TypeAlias = NDArray[np.float64]
Matrix: TypeAlias = NDArray[np.float64]
_BLOCK = 65_536
SAME_ANSWER = 10.0  # f R / rho of the leading direction up to which members answer like the target (see choice.py)


@dataclass(frozen=True)
class Setting:
    """What is known of a run besides its losses.

    Attributes:
        noise: standard deviation of the scoring noise of one loss, nats: one number, or (N,) one for each training
            example.
        rho: (member's steps x mean learning rate) / (target's steps x mean learning rate), for members that start from
            the target; METHOD item 6. None: unknown, or members trained from the base.
        ridge: lambda of ``whitened`` relative to the mean eigenvalue; None means 1.
        log_offset: c of `stabilised`, nats, or None to take test losses as they are.
        checkpoints: whether losses at earlier checkpoints are used, where they are given.
        shrinkage: c of `shrinkage`, by which a filter's scores are drawn towards zero; None takes them as they are.
    """

    noise: float | Vector | None = None
    rho: float | None = None
    ridge: float | None = None
    log_offset: float | None = None
    checkpoints: bool = True
    shrinkage: float | None = None

    def __post_init__(self) -> None:
        if self.noise is not None and not (np.isfinite(self.noise).all() and (np.asarray(self.noise) >= 0).all()):
            raise ConfigurationError("Scoring noise is a standard deviation in nats: finite and not negative.")
        if self.rho is not None and not (np.isfinite(self.rho) and self.rho > 0):
            raise ConfigurationError(f"rho is a ratio of learning-rate times and must be positive, not {self.rho}.")
        if self.ridge is not None and not (np.isfinite(self.ridge) and self.ridge > 0):
            raise ConfigurationError(f"The ridge lambda must be positive, not {self.ridge}.")
        if self.log_offset is not None and not (np.isfinite(self.log_offset) and self.log_offset > 0):
            raise ConfigurationError(f"The offset under the logarithm must be positive, not {self.log_offset}.")
        if self.shrinkage is not None and not (np.isfinite(self.shrinkage) and self.shrinkage > 0):
            raise ConfigurationError(f"The amount of shrinkage must be positive, not {self.shrinkage}.")

    def of_examples(self, train: NDArray[np.int64], count: int) -> Setting:
        """The same setting for some of ``count`` training examples, by index.

        Raises:
            DataError: the noise is that of another number of examples.
        """
        sigma = self._sigma(count)
        return replace(self, noise=sigma[train]) if sigma.ndim else self

    def noise_energy(self, count: int) -> float:
        """Sum over ``count`` training examples of the noise variance, nats^2: what noise adds to every eigenvalue."""
        sigma = self._sigma(count)
        return float((sigma**2).sum() if sigma.ndim else count * sigma**2)

    def _sigma(self, count: int) -> Vector:
        sigma = np.asarray(0.0 if self.noise is None else self.noise, dtype=np.float64)
        if sigma.ndim and sigma.shape != (count,):
            raise DataError(
                f"Noise has shape {sigma.shape}; it must be one number or one for each of {count} examples."
            )
        return sigma


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues and eigenvectors of G = A A^T with the null directions left out.

    Attributes:
        w: (D,) eigenvalues, nats^2, descending, all positive. D <= K - 1, since centring removes one direction (with
            checkpoints: at most `Stages.freedom`).
        u_RD: (R, D) eigenvectors.
        mean: tr(G) / (number of rows), the unit in which a ridge lambda is measured.
        stages: which member has a row at which stage.
        noise_energy: N sigma^2, what scoring noise, which is another in every row, adds to every eigenvalue.
        dispersion: var(inclusion) / mean(inclusion)^2 = (1 - r) / r for subsets of ratio r, or None when unknown.
    """

    w: Vector
    u_RD: Matrix
    mean: float
    stages: Stages
    noise_energy: float = 0.0
    dispersion: float | None = None

    @property
    def signal(self) -> Vector:
        """(D,) eigenvalues less the noise energy, at least zero: s of METHOD item 5."""
        return np.maximum(self.w - self.noise_energy, 0.0)

    @property
    def response(self) -> Vector:
        """(D,) f R, the unitless response of the training recipe in each direction: sqrt(s / (R dispersion)), item 6.

        R is the number of rows; with checkpoints this is the root mean square of the responses at all stages.

        Raises:
            ConfigurationError: the inclusion matrix is not known.
        """
        if self.dispersion is None:
            raise ConfigurationError("This estimator needs the inclusion matrix: pass inclusion_KN.")
        return np.asarray(np.sqrt(self.signal / (self.stages.rows * self.dispersion)))

    def answers_like_target(self, rho: float | None) -> bool:
        """Whether members and target answer to re-weighting alike: no rho, or a leading f R of at most 10 rho."""
        return rho is None or bool(self.response[0] <= SAME_ANSWER * rho)

    def with_noise(self, noise_energy: float) -> Spectrum:
        """The same spectrum under another scoring noise."""
        return replace(self, noise_energy=noise_energy)


Filter: TypeAlias = Callable[[Spectrum, Setting], Vector]


def gram(a_RN: Floats, stages: Stages) -> Matrix:
    """A A^T in float64, block by block, with both sides centred over the members of each stage."""
    total: Matrix = np.zeros((a_RN.shape[0],) * 2)
    for start in range(0, a_RN.shape[1], _BLOCK):
        block = a_RN[:, start : start + _BLOCK].astype(np.float64)
        total += block @ block.T
    return centred_gram(total, stages)


def centred_gram(gram_RR: Matrix, stages: Stages) -> Matrix:
    """A Gram matrix centred over the members of each stage on both sides."""
    total = stages.centre(stages.centre(gram_RR).T)
    return np.asarray((total + total.T) / 2)


def inclusion_dispersion(inclusion_KN: NDArray[Any]) -> float:
    """var(inclusion) / r^2 within members, r being the mean: (1 - r) / r for subsets of ratio r, about 1 / r for
    bootstrap subsets. Where examples are weighed by noise, whose mean says nothing, r is the share that has a weight:
    an objective is a mean over its examples.
    """
    counts = inclusion_KN.dtype.kind != "f" or bool((inclusion_KN == np.rint(inclusion_KN)).all())
    mean = float(inclusion_KN.mean(dtype=np.float64) if counts else (inclusion_KN != 0).mean())
    if mean <= 0:
        raise DataError("Every subset is empty: no member was trained on any example.")
    within = float(np.mean([np.var(row, dtype=np.float64) for row in inclusion_KN]))
    if within <= 0:
        raise DataError(
            "Every member was trained on every example: subsets of the training set are what attribution reads."
        )
    return within / mean**2


def spectrum_of(members: MemberLosses, setting: Setting) -> Spectrum:
    """Decompose the centred training losses of complete members.

    Raises:
        DataError: the training losses are the same in all members.
    """
    stages = members.stages
    return decompose(
        gram(members.train_rows(), stages),
        stages=stages,
        dispersion=None if members.inclusion_KN is None else inclusion_dispersion(members.inclusion_KN),
        noise_energy=setting.noise_energy(members.train_KN.shape[1]),
    )


def decompose(gram_RR: Matrix, *, stages: Stages, dispersion: float | None, noise_energy: float) -> Spectrum:
    """Eigendecomposition of a centred Gram matrix, null directions dropped.

    Raises:
        DataError: the matrix is zero.
    """
    w, u = np.linalg.eigh(gram_RR)
    keep = w > 100 * w.size * np.finfo(np.float64).eps * max(float(w[-1]), 0.0)
    if not keep.any():
        raise DataError("All members give every training example the same loss, so nothing tells examples apart.")
    return Spectrum(
        w[keep][::-1].copy(),
        np.ascontiguousarray(u[:, keep][:, ::-1]),
        float(np.trace(gram_RR)) / stages.rows,
        stages,
        noise_energy,
        dispersion,
    )


def stabilised(test_KM: Floats, log_offset: float | None) -> Floats:
    """One stage's test losses on the scale on which they answer linearly to parameters; the plain losses with None.

    ``(mean + c) log(loss + c)``: a loss near zero is about exp(-margin), and it is the margin that moves linearly.
    Each column keeps its order over members, and to first order its deviations in nats. c must be well above the
    scoring noise, which the logarithm would blow up.
    """
    if log_offset is None:
        return test_KM
    level = np.nanmean(test_KM, axis=0) if np.isnan(test_KM).any() else test_KM.mean(axis=0)
    return np.asarray((level + log_offset) * np.log(np.maximum(test_KM + log_offset, log_offset / 2)), test_KM.dtype)


def shrunk(phi: Callable[[Vector], Vector], spectrum: Spectrum) -> Vector:
    """(s / w)^2 phi(s): a filter of the signal's eigenvalue s behind a Wiener weight (METHOD, items 5 and 6)."""
    signal = spectrum.signal
    alive = signal > 0
    out = np.zeros_like(signal)
    out[alive] = (signal[alive] / spectrum.w[alive]) ** 2 * phi(signal[alive])
    return out
