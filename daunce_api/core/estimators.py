"""The estimators: filters over the spectrum of the training losses, and the registry.

Notation and sign are those of `daunce_api.core`: A (R, N) and B (R, M) are training and test losses centred over the
members of their stage, G = A A^T = U diag(w) U^T, and every filter is ``score = A^T U diag(phi(w)) U^T B`` (METHOD,
items 4 to 6). There are R = K rows, one for each member, or as many more as earlier checkpoints are given (`rows`).

Adding a filter is one function from (`Spectrum`, `Setting`) to weights and one line in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError, DataError
from .rows import Floats, MemberLosses, Stages

Vector: TypeAlias = NDArray[np.float64]
Matrix: TypeAlias = NDArray[np.float64]
Question: TypeAlias = Literal["attribution", "retrieval"]
_BLOCK = 8_192

QUESTIONS: dict[Question, str] = {
    "attribution": "how much each training example moves each test example's loss (judged by LDS)",
    "retrieval": "which training examples belong to a test example, whatever the size of their effect (judged by "
    "average precision)",
}


@dataclass(frozen=True)
class Setting:
    """The parameters of an estimator.

    Attributes:
        ridge: lambda of ``whitened`` relative to the mean eigenvalue; None means 1.
        log_offset: c of `stabilized`, nats, or None to take test losses as they are.
        checkpoints: whether losses at earlier checkpoints are used, where they are given.
        shrinkage: c of `pairs.Shrinkage`, by which a filter's scores are shrunk towards zero; None: not at all.
        prior: weight of the prior, in root mean squares of each test example's scores.
        tilt: g of `pairs.Shrinkage`: c is exp(-g p) times as much for a pair with prior p.
    """

    ridge: float | None = None
    log_offset: float | None = None
    checkpoints: bool = True
    shrinkage: float | None = None
    prior: float = 0.0
    tilt: float = 0.0


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
    """

    w: Vector
    u_RD: Matrix
    mean: float
    stages: Stages
    noise_energy: float = 0.0

    @property
    def signal(self) -> Vector:
        """(D,) eigenvalues less the noise energy, at least zero: s of METHOD item 5."""
        return np.maximum(self.w - self.noise_energy, 0.0)

    def wiener(self, phi: Callable[[Vector], Vector]) -> Vector:
        """(D,) (s / w)^2 phi(s): a filter of the signal's eigenvalue s behind a Wiener weight (METHOD, item 5)."""
        signal, out = self.signal, np.zeros_like(self.w)
        alive = signal > 0
        out[alive] = (signal[alive] / self.w[alive]) ** 2 * phi(signal[alive])
        return out


def spectrum_of(losses: MemberLosses) -> Spectrum:
    """Decompose the centred training losses.

    Raises:
        DataError: the training losses are the same in all members, or all subsets are empty or the whole training set.
    """
    if losses.inclusion_KN is not None:
        _ = losses.dispersion  # raises for subsets that tell nothing apart
    rows_RN, stages = losses.train_rows(), losses.stages
    gram: Matrix = np.zeros((rows_RN.shape[0],) * 2)
    for start in range(0, rows_RN.shape[1], _BLOCK):
        block = rows_RN[:, start : start + _BLOCK].astype(np.float64)
        gram += block @ block.T
    return decompose(gram, stages, losses.noise_energy)


def decompose(gram_RR: Matrix, stages: Stages, noise_energy: float) -> Spectrum:
    """Eigendecomposition of a Gram matrix, centred over the members of each stage, null directions dropped.

    Raises:
        DataError: the matrix is zero.
    """
    centred = stages.centre(stages.centre(gram_RR).T)
    w, u = np.linalg.eigh((centred + centred.T) / 2)
    keep = w > 100 * w.size * np.finfo(np.float64).eps * max(float(w[-1]), 0.0)
    if not keep.any():
        raise DataError("All members give every training example the same loss, so nothing tells examples apart.")
    mean = float(np.trace(centred)) / stages.rows
    return Spectrum(w[keep][::-1].copy(), np.ascontiguousarray(u[:, keep][:, ::-1]), mean, stages, noise_energy)


def stabilized(test_KM: Floats, log_offset: float | None) -> Floats:
    """One stage's test losses on the scale on which they answer linearly to parameters; the plain losses with None.

    ``(mean + c) log(loss + c)``: a loss near zero is about exp(-margin), and it is the margin that moves linearly.
    Each column keeps its order over members, and to first order its deviations in nats. c must be well above the
    scoring noise, which the logarithm would blow up.
    """
    if log_offset is None:
        return test_KM
    level = test_KM.mean(axis=0)
    return np.asarray((level + log_offset) * np.log(np.maximum(test_KM + log_offset, log_offset / 2)), test_KM.dtype)


def _flat(spectrum: Spectrum, setting: Setting) -> Vector:
    return np.full(spectrum.w.shape, 1 / spectrum.stages.freedom)


def ridge_of(spectrum: Spectrum, setting: Setting) -> float:
    """lambda m, nats^2."""
    return (1.0 if setting.ridge is None else setting.ridge) * spectrum.mean


def _whitened(spectrum: Spectrum, setting: Setting) -> Vector:
    return spectrum.wiener(lambda s: 1 / (s + ridge_of(spectrum, setting)))


def _half_whitened(spectrum: Spectrum, setting: Setting) -> Vector:
    return spectrum.wiener(lambda s: 1 / np.sqrt(s))


@dataclass(frozen=True)
class Estimator:
    """An entry of the registry.

    Attributes:
        name: what users write.
        filter: the spectral filter phi(w), or None for `correlation` and `inclusion`.
        question: which question it answers best.
    """

    name: str
    filter: Callable[[Spectrum, Setting], Vector] | None = None
    question: Question = "attribution"


ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator("covariance", _flat),
        Estimator("correlation", question="retrieval"),
        Estimator("inclusion"),
        Estimator("whitened", _whitened),
        Estimator("half_whitened", _half_whitened),
    )
}


def estimator_named(name: str) -> Estimator:
    """The registry entry of that name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in ESTIMATORS:
        raise ConfigurationError(f"Unknown estimator {name!r}; there are: {', '.join(['auto', *ESTIMATORS])}.")
    return ESTIMATORS[name]
