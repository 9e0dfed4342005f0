"""How much more members would help: held-out correlation against their number, and how far that can be trusted.

The curve is ``raw(n) = (a + b / n^p)^-1/2``: with p = 1 what a correlation does whose prediction carries noise of
variance 1 / n. Three levels fix it: members predicted by all other folds, by half of those, and by a quarter of them.
p is 1 in theory and between .8 and 1.4 on the fine-tunes of tests/benchmarks; what the quarters say about it is drawn
towards 1 by its standard error, and below 20 members, where a quarter is two to four of them, it is taken to be 1.

Intervals put together what is known to be unknown, draw by draw: the bootstrap over members of all three levels; p; the
form of the curve, which is taken to be right up to a factor in what is left to gain (standard deviation .25 of its
logarithm) and up to 5 % of raw for everything that is not a curve (another lambda is chosen with more members; below 20
members, where none is chosen yet, 25 %); and, in `Forecast.gain`, the luck of the members to come. The constants are
measured (RESULTS-estimators.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Vector = NDArray[np.float64]

NEAR_ZERO = 0.02
FEW = 20
POWER_RATIO = (0.5, 0.25)  # 2^-p, and the spread of its logarithm
FORM = 0.25
OTHERWISE, OTHERWISE_FEW = 0.05, 0.25


@dataclass(frozen=True)
class Curve:
    """raw(n) = (a + b / n^power)^-1/2: how held-out correlation grows with the number of members.

    Attributes:
        a, b, power: the constants; a >= 1.
    """

    a: float
    b: float
    power: float = 1.0

    def at(self, members: ArrayLike) -> Vector:
        """Held-out correlation expected with so many members."""
        squared: Vector = self.a + self.b / np.asarray(members, dtype=np.float64) ** self.power
        return np.asarray(1 / np.sqrt(squared))

    @property
    def limit(self) -> float:
        """Held-out correlation with endlessly many members."""
        return float(self.a**-0.5)


@dataclass(frozen=True)
class Ceiling:
    """What raw can reach at most (see `quality`), as far as it is known.

    Attributes:
        middle: the expected ceiling where it does not depend on the explained share, otherwise the factor before its
            root.
        share, error: the explained share of the test losses' variance and its standard error; None where it is not
            used.
        prior: mean and spread of such shares.
        least: of any ceiling.
        few: what few members add to ``middle``, times their number.
        members: K.
    """

    middle: float
    share: float | None = None
    error: float = 0.0
    prior: tuple[float, float] = (0.0, 1.0)
    least: float = 0.0
    few: float = 0.0
    members: int = 1

    def growth(self, members: ArrayLike) -> Vector:
        """The ceiling of another number of members over that of these; 1 where it does not depend on it."""
        return np.minimum(self.middle + self.few / np.asarray(members), 1) / min(
            self.middle + self.few / self.members, 1
        )

    def expected(self, luck: ArrayLike = 0.0, gained: float = 1.0) -> Vector:
        """The ceiling at standard normal deviations of what is not known of it.

        Args:
            luck: deviations, any shape.
            gained: of the variance of the share, the part that counts: 1 for all that is not known.
        """
        if self.share is None:
            middle = np.full(np.shape(luck), self.middle + self.few / self.members)
            return np.asarray(np.clip(middle, self.least, 1))
        mean, spread = self.prior
        weight = spread**2 / (spread**2 + self.error**2)
        share = weight * self.share + (1 - weight) * mean
        share = share + np.sqrt((1 - weight) * gained) * spread * np.asarray(luck)
        return np.asarray(np.clip(self.middle * np.sqrt(np.maximum(share, 0)), self.least, 1))

    def learned(self, growth: float) -> float:
        """Of what is not known of the share, the part that ``growth`` times as many members will tell.

        The standard error of a share falls as 1 / members.
        """
        if not np.isfinite(self.error) or self.error == 0:
            return 0.0
        prior, now = self.prior[1] ** -2, self.error**-2
        return 1 - (prior + now) / (prior + now * growth**2)


@dataclass(frozen=True, eq=False)
class Forecast:
    """Draws of the curve, the first of each array being the estimate itself.

    Attributes:
        members: K.
        raw_D: held-out correlation with K members.
        left_D: raw^-2 less its limit: what is left to gain.
        power_D: p.
        ceiling: what is known of the ceiling.
        ceiling_D: draws of it, with everything that is not known.
        luck_ZD: (3, D) standard normal deviations: members to come, whatever is not a curve, the share.
    """

    members: int
    raw_D: Vector
    left_D: Vector
    power_D: Vector
    ceiling: Ceiling
    ceiling_D: Vector
    luck_ZD: Vector

    @property
    def curve(self) -> Curve:
        """The curve through the estimate."""
        return self._curve(self.raw_D[0], self.left_D[0], self.power_D[0])

    def _curve(self, raw: float, left: float, power: float) -> Curve:
        return Curve(float(raw**-2 - left), float(left * self.members**power), float(power))

    def _raw(self, members: float) -> Vector:
        """(D,) held-out correlation with another number of members."""
        gone = 1 - (self.members / members) ** self.power_D
        return np.asarray(1 / np.sqrt(self.raw_D**-2 - self.left_D * gone))

    def interval(self, members: float) -> tuple[float, float]:
        """95 % interval of the LDS with so many members."""
        value_D = np.minimum(self._raw(members) / (self.ceiling_D * self.ceiling.growth(members)), 1.0)
        return interval_around(value_D, self.members)

    def gain(self, members: float) -> tuple[float, float]:
        """95 % interval of what self_lds will have gained when so many members are there, these among them.

        The luck of these members is diluted then, that of the new ones comes in. What is not known of the ceiling
        besides the explained share stays as it is and does not count.
        """
        new = 1 - self.members / members
        raw, rise_D = self.raw_D[0], self._raw(members) - self.raw_D
        spread = float(np.std(self.raw_D[1:]))
        luck, other, share = self.luck_ZD
        other_share = OTHERWISE_FEW if self.members < FEW else OTHERWISE
        raw_D = raw + rise_D + new * (self.raw_D - np.median(self.raw_D[1:]))
        raw_D += np.sqrt(new * (1 - new)) * spread * luck + new * other_share * raw * other
        raw_D[0] = raw + rise_D[0]
        ceiling_D = self.ceiling.expected(share, self.ceiling.learned(members / self.members))
        ceiling_D = ceiling_D * self.ceiling.growth(members)
        now = min(raw / max(float(self.ceiling.expected()), raw), 1.0)
        low, high = interval_around(np.minimum(raw_D / np.maximum(ceiling_D, raw_D), 1.0), self.members)
        return low - now, high - now


def interval_around(value_D: Vector, members: int) -> tuple[float, float]:
    """95 % interval around the first value, from bootstrap draws over members, which are the others.

    Repeated members shift the bootstrap's centre; its spread is what counts. That of few members is too small by
    sqrt((K - 1) / K), and its percentiles are those of a normal distribution where Student's are due (Hesterberg 2015,
    section 3.2).
    """
    wider = stats.t.ppf(0.975, members - 1) / stats.norm.ppf(0.975) * np.sqrt(members / (members - 1))
    low, high = wider * np.quantile(value_D[1:] - np.median(value_D[1:]), [0.025, 0.975])
    return float(value_D[0] + low), min(float(value_D[0] + high), 1.0)


def fit_forecast(
    raw_LD: Vector, members: int, ceiling: Ceiling, ceiling_D: Vector, rng: np.random.Generator
) -> Forecast | None:
    """Fit a curve to each draw of the three levels; None where the run is too poor for one (raw near zero).

    Args:
        raw_LD: (2 or 3, D) held-out correlations from all other folds, half and, if there are enough, a quarter of
            them; first the estimates.
        members: K.
        ceiling, ceiling_D: as in `Forecast`.
        rng: for what the bootstrap does not draw.
    """
    if raw_LD[:2, 0].min() < NEAR_ZERO:
        return None
    full, *_ = levels = np.maximum(raw_LD, NEAR_ZERO)
    rise, *earlier = np.maximum(np.diff(levels**-2, axis=0), 0.0)
    normal_ZD = rng.standard_normal((5, full.size))
    normal_ZD[:, 0] = 0
    power = -np.log2(_ratios(rise, earlier, normal_ZD[0]))
    left = rise / (2**power - 1) * np.exp(FORM * normal_ZD[1])
    left = np.minimum(left, full**-2 - 1)  # the limit is a correlation: a >= 1
    return Forecast(members, full, left, power, ceiling, ceiling_D, normal_ZD[2:])


def _ratios(rise_D: Vector, earlier_D: list[Vector], normal_D: Vector) -> Vector:
    """(D,) draws of 2^-p: by what factor the rise of raw^-2 shrinks from one doubling of the members to the next."""
    mean, spread = POWER_RATIO
    middle, rest = np.log(mean), spread
    good = np.logical_and.reduce([rise_D > 0, *(rise > 0 for rise in earlier_D)])
    if earlier_D and good[0] and good.sum() > 2:
        found = np.log(rise_D[good] / earlier_D[0][good])
        weight = spread**2 / (spread**2 + float(np.var(found[1:])))
        middle, rest = weight * found[0] + (1 - weight) * middle, np.sqrt(1 - weight) * spread
    return np.asarray(np.clip(np.exp(middle + rest * normal_D), 0.2, 0.8))
