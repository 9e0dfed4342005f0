"""self_lds: the quality of a run, from the run alone.

NESTED CROSS-VALIDATION. Members are split into folds. The estimator is chosen and fitted on the other folds, predicts
the test losses of the held-out members from their inclusion rows, ``-inclusion @ score``, and the prediction is
compared with what was measured by Spearman's rank correlation over members, for each test example. So what is chosen
on some members is judged on others, and no fine-tune is spent on it.

Over K members a sample's rank correlation is expected to be ((K - 2) rho + 3 tau) / (K + 1) (Kendall and Gibbons 1990,
section 9.7), which is K / (K + 1) rho as long as tau = 2 / 3 rho, as in weakly correlated data; that is made good. The
correlation so found, ``raw``, is an LDS against single training runs. The LDS of the literature averages the truth over
several seeds, which takes the seeds' luck out of it: ``value = raw / ceiling``. What the ceiling is depends on the
members, and its constants are measured, not derived (RESULTS-estimators.md).

* Members that share the target's recipe (rho "base"): ``sqrt(R)``, R the correlation of two fine-tunes on the same
  subset, which no run of distinct subsets measures. What N examples do in sum to a loss varies less from subset to
  subset the more there are, luck hardly: over five tasks the log odds of R fall by 1.0 for every tenfold N (`LUCK`),
  which is the prior; scoring noise lowers it. It is updated by 1.05 h, h being the share of the test losses' variance
  that subsets explain linearly (`CrossValidator.explained`), which counts for more the more members there are, and by
  ``raw``, the density of LDS being taken as 2 (1 - LDS): a high ``raw`` tells of a high ceiling, not of perfection.
* Members from the target that answer like it (`choice.answers_like_target`): .83 times the correlation of test losses
  with and without scoring noise.
* Other short members from the target answer more steeply than a retrained model does: with few members that lowers the
  true LDS by about as much as luck lowers ``raw``, with many by less: ``.76 + 2.4 / K``, at most 1, times the fourth
  root of that correlation, since noise hides the directions in which they differ most.
* Where rho is unknown, either of the last two: the value is halfway, the interval covers both.

The interval takes the ceiling to be known to 10 %, besides the error of h. Below 20 members it is a rough guess.

MORE MEMBERS. ``raw(n) = (a + b / n)^-1/2`` is what a correlation does whose prediction carries noise of variance 1 / n.
It goes through the correlations of members that are predicted by all other folds and by half of those. Intervals put
together, draw by draw, the bootstrap over members, the form of the curve (what is left to gain is taken to be right up
to a factor, sd .25 of its logarithm), what is no curve (8 % of raw; 25 % below 20 members), and the members to come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import NotEnoughMembersError
from .choice import Choice, answers_like_target, choose
from .crossval import CrossValidator, folds, weighted_correlation
from .rows import MemberLosses

Vector = NDArray[np.float64]
MINIMUM_MEMBERS = 8
FEW = 20
DRAWS = 400
JUDGED_PAIRS, JUDGED_LEAST = 1_500_000, 50
CEILING_LEAST, CEILING_SPREAD = 0.4, 0.1
LUCK = (0.3, 1.0, 0.4)  # log odds of R for 1,000 examples and subsets of half, their fall a decade, their deviation
MOST_MEASURED = 5_000  # examples; with more, R is taken to fall no further
BEYOND_LINEAR = 1.05
LIKE_TARGET = 0.83
UNLIKE_TARGET = (0.76, 2.4)
NEAR_ZERO = 0.02
FORM = 0.25
OTHERWISE, OTHERWISE_FEW = 0.08, 0.25


@dataclass(frozen=True)
class Curve:
    """raw(n) = (a + b / n)^-1/2: how held-out correlation grows with the number of members; a >= 1."""

    a: float
    b: float

    def at(self, members: ArrayLike) -> Vector:
        """Held-out correlation expected with this many members."""
        return np.asarray(1 / np.sqrt(self.a + self.b / np.asarray(members, dtype=np.float64)))


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of the curve and the ceiling; the first of each array is the estimate itself.

    Attributes:
        raw_D: held-out correlation with K members.
        left_D: raw^-2 less its limit: what is left to gain.
        ceiling_D: with everything that is not known of it.
        share_D: of that, what more members will tell, as a factor.
        growth: (a, b): the ceiling of n members is proportional to min(a + b / n, 1).
        luck_D: standard normal deviations: of members to come, and of whatever is no curve.
    """

    raw_D: Vector
    left_D: Vector
    ceiling_D: Vector
    share_D: Vector
    growth: tuple[float, float]
    luck_D: Vector


@dataclass(frozen=True)
class SelfLDS:
    """An estimate of the LDS of a run, made from the run's own members by nested cross-validation.

    Attributes:
        value: estimated LDS against a truth averaged over seeds; 1 is perfect, 0 is chance.
        low, high: 95 % interval (bootstrap over members, and what is not known of the ceiling).
        estimator: which estimator it is about.
        members: K.
        raw: the measured part: correlation with single held-out members, times (K + 1) / K.
        ceiling: the modeled part: what the luck of single training runs lets ``raw`` reach; value = raw / ceiling.
        curve: raw against the number of members, or None where the run is too poor for one (raw near zero).
    """

    value: float
    low: float
    high: float
    estimator: str
    members: int
    raw: float
    ceiling: float
    curve: Curve | None
    draws: Draws | None = field(default=None, repr=False, compare=False)

    @property
    def rough(self) -> bool:
        """Fewer than 20 members: no more than a guess."""
        return self.members < FEW

    def expected(self, members: ArrayLike) -> NDArray[np.float64]:
        """Estimated LDS with another number of members; NaN without a curve."""
        if self.curve is None:
            return np.full(np.shape(members), np.nan)
        return np.asarray(np.minimum(self.curve.at(members) / (self.ceiling * self._growth(members)), 1.0))

    def interval(self, members: int) -> tuple[float, float]:
        """95 % interval of the LDS with at least K members: ``low`` and ``high`` with K; NaN without a curve."""
        if self.draws is None:
            return np.nan, np.nan
        values = self._raw_with(members) / (self.draws.ceiling_D * self._growth(members))
        return interval_around(np.minimum(values, 1.0), self.members)

    def gain(self, members: int) -> tuple[float, float, float]:
        """What ``members`` more members are expected to add to self_lds, and the 95 % interval of what they will have
        added when they are there; NaN without a curve.

        The luck of the present members is diluted then, that of the new ones comes in, and what they tell of the
        ceiling.
        """
        if self.draws is None:
            return np.nan, np.nan, np.nan
        total = self.members + members
        raw_D, (luck, other), new = self.draws.raw_D, self.draws.luck_D, members / total
        spread, share = float(np.std(raw_D[1:])), OTHERWISE_FEW if self.rough else OTHERWISE
        later = raw_D[0] + self._raw_with(total) - raw_D + new * (raw_D - np.median(raw_D[1:]))
        later += np.sqrt(new * (1 - new)) * spread * luck + new * share * raw_D[0] * other
        later[0] = self._raw_with(total)[0]
        ceiling_D = self.ceiling * self._growth(total) * self.draws.share_D**new
        low, high = interval_around(np.minimum(later / np.maximum(ceiling_D, later), 1.0), self.members)
        return float(self.expected(total)) - self.value, low - self.value, high - self.value

    def _growth(self, members: ArrayLike) -> Vector:
        """The ceiling of so many members over that of K."""
        a, b = (1.0, 0.0) if self.draws is None else self.draws.growth
        return np.asarray(np.minimum(a + b / np.asarray(members), 1.0) / min(a + b / self.members, 1.0))

    def _raw_with(self, members: float) -> Vector:
        assert self.draws is not None
        gone = 1 - self.members / members
        return np.asarray(1 / np.sqrt(self.draws.raw_D**-2 - self.draws.left_D * gone))


def estimate(losses: MemberLosses, estimator: str = "auto", *, chosen: Choice | None = None, seed: int = 0) -> SelfLDS:
    """The quality of an estimator on a run; ``chosen`` is what all members choose, where that is known already.

    Raises:
        NotEnoughMembersError: fewer than 8 members. Otherwise as `choose`.
    """
    count = losses.count
    if count < MINIMUM_MEMBERS:
        raise NotEnoughMembersError(
            f"self_lds needs at least {MINIMUM_MEMBERS} members, {count} are scored. Scores can be computed already; "
            "their quality is known when more members are."
        )
    cv = CrossValidator(losses).some_tests(JUDGED_PAIRS, JUDGED_LEAST)
    predictions = _nested(cv, estimator)
    name = (chosen or choose(losses, estimator)).estimator.name
    rng = np.random.default_rng(seed)
    weights = np.vstack([np.ones(count), rng.multinomial(count, np.full(count, 1 / count), DRAWS)])
    from scipy.stats import rankdata  # slow to import

    target = rankdata(cv.target_KM, axis=0)
    levels = []
    for turns in predictions:
        each = [np.nanmean(weighted_correlation(rankdata(p, axis=0), target, weights), axis=1) for p in turns]
        levels.append(np.clip(np.mean(each, axis=0) * (count + 1) / count, -1, 1))
    raw_D, half_D = levels
    normal_ZD = rng.standard_normal((5, DRAWS + 1))
    normal_ZD[:, 0] = 0
    drawn, growth = _ceilings(cv, float(raw_D[0]), normal_ZD[0])
    ceiling_D = np.maximum(drawn * np.exp(CEILING_SPREAD * normal_ZD[1]), raw_D)
    values = np.minimum(raw_D / ceiling_D, 1.0)
    low, high = interval_around(values, count)
    curve = draws = None
    if min(raw_D[0], half_D[0]) >= NEAR_ZERO:
        full, half = np.maximum(raw_D, NEAR_ZERO), np.maximum(half_D, NEAR_ZERO)
        left = np.maximum(half**-2 - full**-2, 0.0) * np.exp(FORM * normal_ZD[2])
        left = np.minimum(left, full**-2 - 1)  # the limit is a correlation: a >= 1
        draws = Draws(full, left, ceiling_D, drawn / drawn[0], growth, normal_ZD[3:])
        curve = Curve(float(full[0] ** -2 - left[0]), float(left[0] * count))
    return SelfLDS(float(values[0]), low, high, name, count, float(raw_D[0]), float(ceiling_D[0]), curve, draws)


def _nested(cv: CrossValidator, estimator: str) -> list[list[NDArray[np.float64]]]:
    """Predictions of every member by what is chosen and fitted on the other folds, and by what is fitted on each half
    of those.

    What is chosen differs from fold to fold, and with it the scale of predictions: each is taken relative to its spread
    over the members that it was fitted on.
    """
    losses, every = cv.losses, np.arange(cv.losses.count)
    out = [[np.empty(cv.target_KM.shape) for _ in range(part)] for part in (1, 2)]
    for held, rest in folds(losses.count):
        inner = cv.members(rest)
        choice = choose(inner.losses, estimator, cv=inner)
        candidate = (choice.estimator.name, choice.setting)
        for part, turns in enumerate(out, start=1):
            for turn, filled in enumerate(turns):
                fitted = rest[turn::part]
                predicted = cv.predict([candidate], fitted, every)[0]
                spread = predicted[fitted].std(axis=0)
                filled[held] = np.divide(predicted[held], spread, out=np.zeros_like(predicted[held]), where=spread > 0)
    return out


def _ceilings(cv: CrossValidator, raw: float, normal_D: Vector) -> tuple[Vector, tuple[float, float]]:
    """(D,) draws of what raw can reach at most, and how that changes with the number of members (`Draws.growth`)."""
    losses = cv.losses
    variance_M = np.var(losses.test_KM.astype(np.float64), axis=0)
    kept_M = np.maximum(variance_M - (losses.noise or 0.0) ** 2, 0) / np.where(variance_M > 0, variance_M, 1)
    if losses.rho == "base":
        from scipy.special import expit, ndtr  # slow to import

        share, error = cv.explained()
        level, fall, spread = LUCK
        odds = level - fall * np.log10(min(losses.train_KN.shape[1], MOST_MEASURED) / 1_000) + np.log(losses.dispersion)
        z = np.linspace(-4, 4, 161)
        answer_Z = kept_M.mean() * expit(odds + spread * z)
        ceiling_Z = np.clip(np.sqrt(answer_Z), CEILING_LEAST, 1)
        likely_Z = np.exp(-(z**2) / 2 - ((share - answer_Z / BEYOND_LINEAR) / error) ** 2 / 2)
        likely_Z *= np.maximum(1 - raw / ceiling_Z, 1e-9) / ceiling_Z
        return np.interp(ndtr(normal_D), np.cumsum(likely_Z) / likely_Z.sum(), ceiling_Z), (1.0, 0.0)
    middle, few = UNLIKE_TARGET
    kept = float(np.sqrt(kept_M).mean())
    level = min(middle + few / losses.count, 1.0)
    like, unlike = max(LIKE_TARGET * kept, CEILING_LEAST), max(level * kept**0.25, CEILING_LEAST)
    if losses.rho == "unknown":
        ceiling_D = np.where(normal_D > 0, unlike, like)
        ceiling_D[0] = (unlike + like) / 2
        return ceiling_D, (1.0, 0.0)
    if answers_like_target(losses, cv.spectrum()):
        return np.full(normal_D.shape, like), (1.0, 0.0)
    return np.full(normal_D.shape, unlike), UNLIKE_TARGET


def interval_around(value_D: Vector, members: int) -> tuple[float, float]:
    """95 % interval around the first value, from bootstrap draws over members, which are the others.

    Repeated members shift the bootstrap's centre; its spread is what counts. That of few members is too small by
    sqrt((K - 1) / K), and its percentiles are those of a normal distribution where Student's are due (Hesterberg 2015,
    section 3.2).
    """
    from scipy import stats  # slow to import

    wider = stats.t.ppf(0.975, members - 1) / stats.norm.ppf(0.975) * np.sqrt(members / (members - 1))
    low, high = wider * np.quantile(value_D[1:] - np.median(value_D[1:]), [0.025, 0.975])
    return float(value_D[0] + low), min(float(value_D[0] + high), 1.0)
