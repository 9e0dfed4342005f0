"""self_lds: the quality of a run, from the run alone.

Members are split into folds. Scores fitted on the other folds predict the test losses of a held-out member from its
inclusion row, ``-inclusion @ score``, and the prediction is compared with what was measured, by Spearman's rank
correlation over members, for each test example. No fine-tune is spent on it.

Over K members a sample's rank correlation is expected to be ((K - 2) rho + 3 tau) / (K + 1) (Kendall and Gibbons 1990,
section 9.7), which is K / (K + 1) rho as long as tau = 2 / 3 rho, as in weakly correlated data; that is made good. The
correlation so found, ``raw``, is an LDS against single training runs. The LDS of the literature averages the truth over
several seeds, which takes the seeds' luck out of it: ``value = raw / ceiling``. What the ceiling is depends on the
members.

* Members that share the target's recipe (no rho): ``1.1 sqrt(h)``. h is the share of the test losses' variance that
  subsets explain linearly (`HeldOut.explained`), drawn towards .55 +- .2 by its standard error. Luck and scoring noise
  are no part of h; the factor stands for what subsets do beyond the linear, which h misses, and for the luck left in
  the truth. It is measured on three tasks, not derived.
* Members from the target that answer like it (`Spectrum.answers_like_target`): .92 times the correlation of test
  losses with and without scoring noise. .92 is measured on one task, the language model's.
* Other short members from the target answer more steeply than a retrained model does: with few members that lowers the
  true LDS by about as much as luck and noise lower ``raw``, with many by less. ``.84 + 1.6 / K``, at most 1, was
  measured on two tasks.

The interval takes the ceiling to be known to 10 %, besides the error of h. What it covers is measured in
RESULTS-estimators.md. Below 20 members it is a rough guess: nine members predict one, and the estimator is
not yet chosen by what they say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ..errors import NotEnoughMembersError
from .checkpoints import Floats
from .forecast import FEW, Ceiling, Curve, Forecast, fit_forecast, interval_around
from .heldout import Candidate, HeldOut
from .spectrum import Setting

FOLDS = 10
MINIMUM_MEMBERS = 8
DRAWS = 400
JUDGED_PAIRS, JUDGED_LEAST = 1_500_000, 50
"""Of weighted scores as many pairs are made for each fold as so many make, or those of so many test examples."""
CEILING_LEAST = 0.4
CEILING_SPREAD = 0.1
EXPLAINED = (0.55, 0.2)
BEYOND_LINEAR = 1.1
LIKE_TARGET = 0.92
UNLIKE_TARGET = (0.84, 1.6)
PARTS = (1, 2, 4)
"""Of the members of the other folds: all, a half, a quarter. The curve goes through the three."""


@dataclass(frozen=True)
class SelfLDS:
    """An estimate of the LDS of a run, made from the run's own members.

    Attributes:
        value: estimated LDS against a truth averaged over seeds; 1 is perfect, 0 is chance.
        low, high: 95 % bootstrap interval over members.
        estimator: which estimator it is about.
        members: K.
        raw: correlation with single held-out members, times (K + 1) / K.
        ceiling: what the luck of single training runs lets ``raw`` reach at most.
        curve: raw against the number of members, or None where the run is too poor for one (raw near zero).
        forecast: what intervals for other numbers of members are read from, or None likewise.
    """

    value: float
    low: float
    high: float
    estimator: str
    members: int
    raw: float
    ceiling: float
    curve: Curve | None
    forecast: Forecast | None = field(default=None, repr=False, compare=False)

    @property
    def rough(self) -> bool:
        """Fewer than 20 members: no more than a guess."""
        return self.members < FEW

    def expected(self, members: ArrayLike) -> NDArray[np.float64]:
        """Estimated LDS with another number of members; NaN without a curve."""
        if self.curve is None:
            return np.full(np.shape(members), np.nan)
        growth = 1.0 if self.forecast is None else self.forecast.ceiling.growth(members)
        return np.asarray(np.minimum(self.curve.at(members) / (self.ceiling * growth), 1.0))

    def interval(self, members: int) -> tuple[float, float]:
        """95 % interval of the LDS with at least K members: ``low`` and ``high`` with K, wider with more; NaN without a
        forecast."""
        return (np.nan, np.nan) if self.forecast is None else self.forecast.interval(members)

    def gain(self, members: int) -> tuple[float, float, float]:
        """What ``members`` more members are expected to add to self_lds, and the 95 % interval of what they will have
        added when they are there; NaN without a forecast."""
        if self.forecast is None:
            return np.nan, np.nan, np.nan
        total = self.members + members
        return float(self.expected(total)) - self.value, *self.forecast.gain(total)


def column_spearman(x_SM: ArrayLike, y_SM: ArrayLike) -> NDArray[np.float64]:
    """(M,) Spearman correlation of matching columns, over the rows where both are observed; 0 for a constant column.

    NaN where fewer than 3 rows are observed.
    """
    x, y = _ranks(x_SM, y_SM)
    return np.asarray(_weighted_correlation(x, y, np.ones((1, x.shape[0])))[0])


def _ranks(x_SM: ArrayLike, y_SM: ArrayLike) -> tuple[Floats, Floats]:
    """Ranks over the rows where both are observed, NaN elsewhere."""
    x, y = np.array(x_SM, dtype=np.float64), np.array(y_SM, dtype=np.float64)
    gap = ~(np.isfinite(x) & np.isfinite(y))
    x[gap] = y[gap] = np.nan
    policy = "omit" if gap.any() else "propagate"  # "omit" is many times slower
    return rankdata(x, axis=0, nan_policy=policy), rankdata(y, axis=0, nan_policy=policy)


def _weighted_correlation(x_SM: Floats, y_SM: Floats, weight_DS: Floats) -> NDArray[np.float64]:
    """(D, M) Pearson correlation of columns under each row of weights; NaN with fewer than 3 rows, 0 if constant."""
    seen = np.isfinite(x_SM).astype(np.float64)
    few = seen.sum(axis=0) < 3
    middle = (x_SM.shape[0] + 1) / 2  # keeps the sums of squares small
    x, y = np.nan_to_num(x_SM - middle), np.nan_to_num(y_SM - middle)
    total = np.maximum(weight_DS @ seen, 1e-300)
    mean_x, mean_y = weight_DS @ x / total, weight_DS @ y / total
    cross = weight_DS @ (x * y) / total - mean_x * mean_y
    scale = (weight_DS @ (x * x) / total - mean_x**2) * (weight_DS @ (y * y) / total - mean_y**2)
    good = scale > 1e-9 * np.maximum(total, 1)
    out = np.where(good, cross / np.sqrt(np.where(good, scale, 1.0)), 0.0)
    out[:, few] = np.nan
    return np.asarray(out)


def estimate(held: HeldOut, candidate: Candidate, *, seed: int = 0) -> SelfLDS:
    """The quality of one candidate.

    Raises:
        NotEnoughMembersError: fewer than 8 members.
    """
    count = held.members.count
    if count < MINIMUM_MEMBERS:
        raise NotEnoughMembersError(
            f"self_lds needs at least {MINIMUM_MEMBERS} members, {count} are scored. Scores can be computed already; "
            "their "
            "quality is known when more members are."
        )
    estimator, setting = candidate
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    weights = np.vstack([np.ones(count), draws])
    parts = PARTS if count >= FEW else PARTS[:2]
    judged = held if setting.shrinkage is None else held.some_tests(JUDGED_PAIRS, JUDGED_LEAST)
    raw_LD = np.stack([_raws(judged, candidate, weights, part) for part in parts])
    ceiling = _ceiling(held, setting)
    normal = np.random.default_rng([seed, 1]).standard_normal((2, DRAWS + 1))
    normal[:, 0] = 0
    ceilings = np.maximum(ceiling.expected(normal[0]) * np.exp(CEILING_SPREAD * normal[1]), raw_LD[0])
    values = np.minimum(raw_LD[0] / ceilings, 1.0)
    low, high = interval_around(values, count)
    forecast = fit_forecast(raw_LD, count, ceiling, ceilings, np.random.default_rng([seed, 2]))
    return SelfLDS(
        float(values[0]),
        low,
        high,
        estimator.name,
        count,
        float(raw_LD[0, 0]),
        float(ceilings[0]),
        None if forecast is None else forecast.curve,
        forecast,
    )


def _raws(held: HeldOut, candidate: Candidate, weights: Floats, part: int) -> NDArray[np.float64]:
    """Mean held-out correlation under each row of weights over members, with the small sample made good.

    Each member is predicted by one ``part``-th of the members of the other folds; every one of these parts in turn.
    """
    count = held.members.count
    total = np.zeros(len(weights))
    for turn in range(part):
        ranks = _ranks(held.folded([candidate], FOLDS, part, turn)[0], held.target_KM)
        total += np.nanmean(_weighted_correlation(*ranks, weights), axis=1) / part
    return np.asarray(np.clip(total * (count + 1) / count, -1, 1))


def _ceiling(held: HeldOut, setting: Setting) -> Ceiling:
    """What is known of the ceiling; see the module's text."""
    if setting.rho is None:
        return Ceiling(BEYOND_LINEAR, *held.explained(), EXPLAINED, CEILING_LEAST)
    if not held.spectrum(setting).answers_like_target(setting.rho):
        middle, few = UNLIKE_TARGET
        return Ceiling(middle, few=few, members=held.members.count)
    noise = 0.0 if setting.noise is None else float(np.mean(np.square(setting.noise)))
    spread_M = np.nanvar(held.target_KM.astype(np.float64), axis=0)
    kept = np.maximum(spread_M - noise, 0) / np.where(spread_M > 0, spread_M, 1)
    return Ceiling(LIKE_TARGET * float(np.sqrt(kept).mean()), least=CEILING_LEAST)
