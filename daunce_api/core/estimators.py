"""The estimators: one registry, one form.

Notation and sign are those of `daunce_api.core`: A (R, N) and B (R, M) are training and test losses centred over the
members of their stage, G = A A^T = U diag(w) U^T, and a positive score means that the training example helps the test
example. R = K without earlier checkpoints (`checkpoints`). Every estimator is an inner product over rows,
``score_NM = left_RN.T @ right_RM`` (`Factors`), which is what makes exact top-k, group sums and standard errors
possible without ever holding an N x M matrix. A filter's scores may besides be drawn towards zero, each by a weight of
its own (`shrinkage`).

Adding an estimator is one function from `(MemberLosses, Setting)` to `Factors` (for a spectral filter: from a
`Spectrum` to weights) and one line in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

import numpy as np

from ..errors import ConfigurationError, DataError
from .checkpoints import Floats, Stages, stacked
from .leaving_out import ErrorTerm, filter_terms, moment_terms, unit_terms
from .members import MemberLosses
from .shrinkage import Shrinkage, directions, shrinkage_of, squared_lengths
from .spectrum import Filter, Setting, Spectrum, Vector, shrunk, spectrum_of

Question: TypeAlias = Literal["attribution", "retrieval"]

QUESTIONS: dict[Question, str] = {
    "attribution": "how much each training example moves each test example's loss (judged by LDS)",
    "retrieval": "which training examples belong to a test example, whatever the size of their effect (judged by "
    "average "
    "precision)",
}


@dataclass(frozen=True, eq=False)
class Factors:
    """Scores as an inner product over rows, with what their standard errors need.

    Attributes:
        left_RN: (R, N) training side.
        right_RM: (R, M) test side; ``score = left.T @ right``.
        tests_RM: (R, M) centred test losses, from which the test side of `errors` comes.
        errors: gives what leaving out one member changes, as a sum of products (see `leaving_out`); computed when first
            asked for, since scores do without.
        stages: which rows belong to one member.
        standardised: columns were divided by their standard deviation, whose own error counts too (correlation).
        shrinkage: with it, a score is the product times the pair's weight.
    """

    left_RN: Floats
    right_RM: Floats
    tests_RM: Floats
    errors: Callable[[], tuple[ErrorTerm, ...]]
    stages: Stages
    standardised: bool = False
    shrinkage: Shrinkage | None = None


Factorise: TypeAlias = Callable[[MemberLosses, Setting], Factors]


@dataclass(frozen=True)
class Estimator:
    """An entry of the registry.

    Attributes:
        name: what users write.
        formula: one line.
        question: which question it answers best.
        factorise: complete losses to `Factors`.
        filter: the spectral filter phi(w), for estimators of that family (covariance: a constant).
        moment: covariances of single pairs are all it needs, so that missing entries can be left out pair by pair.
        needs_inclusion, needs_rho: arguments it cannot do without.
    """

    name: str
    formula: str
    question: Question
    factorise: Factorise
    filter: Filter | None = None
    moment: bool = False
    needs_inclusion: bool = False
    needs_rho: bool = False


def _covariance(members: MemberLosses, setting: Setting) -> Factors:
    factors = _moment(members.train_rows(), members.test_rows(), members.stages)
    if setting.shrinkage is None:
        return factors
    shrinkage = spectral_factors(members, spectrum_of(members, setting), _flat, setting).shrinkage
    return replace(factors, shrinkage=shrinkage)


def _moment(a_RN: Floats, b_RM: Floats, stages: Stages) -> Factors:
    """``a^T b / freedom``: with checkpoints, the covariance pooled over stages."""
    return Factors(a_RN, b_RM / stages.freedom, b_RM, lambda: moment_terms(stages), stages)


def _correlation(members: MemberLosses, setting: Setting) -> Factors:
    a, b = _unit_columns(members.train_rows()), _unit_columns(members.test_rows())
    stages = members.stages
    return Factors(a, b, b, lambda: unit_terms(stages), stages, standardised=True)


def _inclusion(members: MemberLosses, setting: Setting) -> Factors:
    if members.inclusion_KN is None:
        raise ConfigurationError("The inclusion estimator needs the inclusion matrix: pass inclusion_KN.")
    stages = members.stages
    included = -members.inclusion_KN.astype(members.train_KN.dtype)
    rows = stacked([stages.centre_stage(t, included) for t in range(stages.count)])
    return _moment(rows, members.test_rows(), stages)


def _unit_columns(a_KX: Floats) -> Floats:
    norm = np.sqrt(np.einsum("kx,kx->x", a_KX, a_KX, dtype=np.float64)).astype(a_KX.dtype)
    return np.asarray(np.divide(a_KX, norm, out=np.zeros_like(a_KX), where=norm > 0))


def _flat(spectrum: Spectrum, setting: Setting) -> Vector:
    """1 / (K - 1): covariance as a filter."""
    return np.full(spectrum.w.shape, 1 / spectrum.stages.freedom)


def whitened_filter(spectrum: Spectrum, setting: Setting) -> Vector:
    """1 / (s + lambda m) behind the Wiener weight; lambda m relative to the mean eigenvalue m (METHOD, items 4 and 5).

    lambda defaults to 1 here; `scores` and `auto` choose it from the run when the inclusion matrix is known.
    """
    ridge = _ridge(spectrum, setting)
    return shrunk(lambda s: 1 / (s + ridge), spectrum)


def _ridge(spectrum: Spectrum, setting: Setting) -> float:
    """lambda m, nats^2."""
    return (1.0 if setting.ridge is None else setting.ridge) * spectrum.mean


def half_whitened_filter(spectrum: Spectrum, setting: Setting) -> Vector:
    """s^-1/2 behind the Wiener weight: the influence estimator where members share the target's recipe (item 6)."""
    return shrunk(lambda s: 1 / np.sqrt(s), spectrum)


def matched_filter(spectrum: Spectrum, setting: Setting) -> Vector:
    """1 / (sqrt(s) (f R + rho)) behind the Wiener weight, for short members started from the target (item 6)."""
    if setting.rho is None:
        raise ConfigurationError(
            "The matched estimator needs rho, the ratio of the member's to the target's learning-rate time "
            "(steps x mean learning rate). For members trained from the base use half_whitened."
        )
    rho = setting.rho
    scale = np.sqrt(spectrum.stages.rows * _dispersion(spectrum))
    return shrunk(lambda s: 1 / (np.sqrt(s) * (np.sqrt(s) / scale + rho)), spectrum)


def _dispersion(spectrum: Spectrum) -> float:
    if spectrum.dispersion is None:
        raise ConfigurationError("The matched estimator needs the inclusion matrix: pass inclusion_KN.")
    return spectrum.dispersion


def spectral_factors(members: MemberLosses, spectrum: Spectrum, apply: Filter, setting: Setting) -> Factors:
    """Factors of ``A^T U diag(phi) U^T B``.

    Raises:
        DataError: the scoring noise leaves no direction above it.
    """
    phi = apply(spectrum, setting)
    if not (phi > 0).any():
        raise DataError(
            f"Scoring noise ({spectrum.noise_energy:.3g} nats^2 over all training examples) is larger than every "
            "direction "
            f"in which members differ (largest {spectrum.w[0]:.3g}). The losses stay usable with "
            "estimator='covariance'; "
            "larger members (more epochs, a higher learning rate, a larger subset) or repeated scoring would help."
        )
    a, b = members.train_rows(), members.test_rows()
    right = spectrum.u_RD @ (phi[:, None] * (spectrum.u_RD.T @ b))

    @cache
    def errors() -> tuple[ErrorTerm, ...]:
        return filter_terms(spectrum, phi, _ridge(spectrum, setting))

    shrinkage = None
    if setting.shrinkage is not None:
        half_DR = (np.sqrt(phi)[:, None] * spectrum.u_RD.T).astype(a.dtype)
        squares = (squared_lengths(half_DR, x) for x in (a, b.astype(a.dtype, copy=False)))
        shrinkage = shrinkage_of(setting.shrinkage, directions(spectrum.w * phi), *squares)
    return Factors(a, right.astype(a.dtype), b, errors, spectrum.stages, shrinkage=shrinkage)


def _spectral(apply: Filter) -> Factorise:
    def factorise(members: MemberLosses, setting: Setting) -> Factors:
        return spectral_factors(members, spectrum_of(members, setting), apply, setting)

    return factorise


def _entry(name: str, formula: str, apply: Filter, *, needs_rho: bool = False) -> Estimator:
    return Estimator(
        name, formula, "attribution", _spectral(apply), apply, needs_inclusion=needs_rho, needs_rho=needs_rho
    )


ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator("covariance", "A^T B / (K - 1)", "attribution", _covariance, _flat, moment=True),
        Estimator("correlation", "covariance / (sd_i sd_j)", "retrieval", _correlation, moment=True),
        Estimator(
            "inclusion", "-inclusion_c^T B / (K - 1)", "attribution", _inclusion, moment=True, needs_inclusion=True
        ),
        _entry("whitened", "A^T (G + lambda tr(G)/K I)^-1 B", whitened_filter),
        _entry("half_whitened", "A^T G^-1/2 B", half_whitened_filter),
        _entry("matched", "A^T U diag(1 / (sqrt(w) (f R + rho))) U^T B", matched_filter, needs_rho=True),
    )
}


def estimator_named(name: str) -> Estimator:
    """The registry entry of that name.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return ESTIMATORS[name]
    except KeyError:
        known = ", ".join(["auto", *ESTIMATORS])
        raise ConfigurationError(f"Unknown estimator {name!r}; there are: {known}.") from None
