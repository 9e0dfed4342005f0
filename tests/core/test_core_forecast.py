"""What more members are expected to bring, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from daunce_api.core import self_lds
from daunce_api.core.forecast import Ceiling, Curve, Forecast, fit_forecast, interval_around
from daunce_api.core.quality import SelfLDS
from tests.core.problems import linear_problem

P = linear_problem(members=48)
LUCK = P.test + 1.5 * P.test.std(axis=0) * np.random.default_rng(0).normal(size=P.test.shape)


def draws(levels: tuple[float, ...], spread: float, count: int = 400) -> np.ndarray:
    """Levels with normal deviations of their own; the first column is the levels themselves."""
    rng = np.random.default_rng(0)
    out = np.array(levels)[:, None] + spread * rng.normal(size=(len(levels), count + 1))
    out[:, 0] = levels
    return out


def made(
    levels: tuple[float, ...], spread: float = 0.01, members: int = 100, ceiling: Ceiling | None = None
) -> Forecast | None:
    ceiling = ceiling or Ceiling(1.0)
    raw = draws(levels, spread)
    return fit_forecast(raw, members, ceiling, ceiling.expected(np.zeros(raw.shape[1])), np.random.default_rng(1))


def test_the_curve_goes_through_what_it_was_fitted_to() -> None:
    for quarter in ((), (0.3,), (0.4,)):
        forecast = made((0.6, 0.5, *quarter))
        assert forecast is not None
        curve = forecast.curve
        assert curve.at(100) == pytest.approx(0.6)
        assert curve.at(50) == pytest.approx(0.5)
        assert curve.limit > 0.6
    assert Curve(1.0, 0.0).at([5, 50]).tolist() == [1.0, 1.0]


def test_a_run_that_shows_nothing_has_no_curve() -> None:
    assert made((0.6, 0.01, 0.01)) is None
    assert made((0.01, 0.5, 0.5)) is None


def test_the_quarter_bends_the_curve_as_far_as_it_is_known() -> None:
    def power(spread: float) -> float:
        # Rises of raw^-2 that fall to a third from one doubling to the next.
        forecast = made(tuple((3 + x) ** -0.5 for x in (0.0, 1.0, 4.0)), spread)
        assert forecast is not None
        return forecast.curve.power

    assert power(1e-4) == pytest.approx(np.log2(3), abs=0.01)
    assert 1 < power(0.05) < power(0.01) < np.log2(3)
    without = made((0.6, 0.5))
    assert without is not None
    assert without.curve.power == pytest.approx(1)


def test_a_correlation_stays_one() -> None:
    forecast = made((0.95, 0.5, 0.2))
    assert forecast is not None
    assert forecast.curve.limit <= 1
    assert forecast.interval(100_000)[1] <= 1
    assert forecast.gain(100_000)[1] <= 0.05 + 1e-9


def test_the_interval_starts_as_the_runs_own_and_widens() -> None:
    judged = self_lds(P.train, LUCK, P.inclusion, "covariance")
    assert judged.interval(48) == pytest.approx((judged.low, judged.high))
    noisy = made((0.5, 0.4, 0.28))
    assert noisy is not None
    widths = [np.diff(noisy.interval(n))[0] for n in (100, 150, 200, 400)]
    assert (np.diff(widths) > 0).all()


def test_more_members_are_expected_to_help() -> None:
    judged = self_lds(P.train, LUCK, P.inclusion, "covariance")
    assert judged.expected(48) == pytest.approx(judged.value)
    expected = judged.expected([48, 60, 90])
    assert (np.diff(expected) > 0).all()
    assert (expected <= 1).all()
    gain, low, high = judged.gain(42)
    assert gain == pytest.approx(expected[2] - judged.value)
    assert low < gain < high


def test_no_more_members_add_nothing() -> None:
    forecast = made((0.5, 0.4, 0.28), ceiling=Ceiling(1.15, 0.6, 0.1, (0.55, 0.2), 0.4))
    assert forecast is not None
    assert forecast.gain(100) == pytest.approx((0, 0))
    low, high = forecast.gain(101)
    assert -0.02 < low < 0 < high < 0.03


def test_without_a_forecast_nothing_is_said() -> None:
    blind = SelfLDS(0.0, -0.1, 0.1, "whitened", 20, 0.0, 1.0, None)
    assert np.isnan([*blind.gain(10), *blind.interval(40), float(blind.expected(40))]).all()


def test_what_will_be_learned_of_the_share_counts_and_no_more() -> None:
    ceiling = Ceiling(1.0, 0.5, 0.2, (0.5, 0.2))
    assert ceiling.learned(1.0) == 0
    assert ceiling.learned(1e6) == pytest.approx(1)
    assert ceiling.learned(2.0) == pytest.approx(1 - 2 / 5)
    assert Ceiling(1.0).learned(2.0) == Ceiling(1.0, 0.5, np.inf).learned(2.0) == 0
    one = np.ones(1)
    assert ceiling.expected(one)[0] ** 2 == pytest.approx(0.5 + np.sqrt(0.5) * 0.2)
    assert ceiling.expected(one, 0.25)[0] ** 2 == pytest.approx(0.5 + np.sqrt(0.125) * 0.2)


def test_few_members_have_wider_intervals() -> None:
    value = np.concatenate([[0.5], np.random.default_rng(0).normal(0.4, 0.01, 400)])
    low, high = interval_around(value, 10_000)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.002)
    few = np.diff(interval_around(value, 10))[0] / (high - low)
    assert few == pytest.approx(2.262 / 1.96 * np.sqrt(10 / 9), abs=0.002)


def test_gains_fall_into_their_interval_as_often_as_they_should() -> None:
    """A linear problem with luck in every loss: forecasts from 25 members against the 50 that then are there."""
    inside = []
    for seed in range(24):
        problem = linear_problem(members=50, train=120, test=12, rank=40, seed=seed)
        rng = np.random.default_rng(seed)
        sides = [x + 0.7 * x.std(axis=0) * rng.normal(size=x.shape) for x in (problem.train, problem.test)]
        before, after = (self_lds(sides[0][:n], sides[1][:n], problem.inclusion[:n], "half_whitened") for n in (25, 50))
        _, low, high = before.gain(25)
        inside.append(low <= after.value - before.value <= high)
    assert np.mean(inside) >= 0.85


def test_a_ceiling_may_depend_on_the_number_of_members() -> None:
    ceiling = Ceiling(0.8, few=2.0, members=20)
    assert float(ceiling.expected()) == pytest.approx(0.9)
    assert float(ceiling.growth(20)) == 1.0
    assert float(ceiling.growth(100)) == pytest.approx(0.82 / 0.9)
    assert float(Ceiling(0.8, few=2.0, members=5).expected()) == 1.0
    assert float(Ceiling(1.1, share=0.5).growth(50)) == 1.0
    assert made((0.4, 0.3), members=20, ceiling=Ceiling(0.82)) is not None
    plain, falling = (made((0.4, 0.3), members=20, ceiling=c) for c in (Ceiling(0.9), ceiling))
    assert plain is not None
    assert falling is not None
    assert falling.interval(20) == plain.interval(20)
    for low, high in ((plain.interval(100), falling.interval(100)), (plain.gain(100), falling.gain(100))):
        assert high[0] > low[0]
        assert high[1] > low[1]


def test_what_is_expected_follows_the_ceiling() -> None:
    quality = self_lds(P.train, LUCK, P.inclusion, "covariance", rho=1e-6)
    assert quality.forecast is not None
    assert quality.curve is not None
    later = min((0.84 + 1.6 / 200), 1)
    assert float(quality.expected(200)) == pytest.approx(float(quality.curve.at(200)) / later)
    assert float(quality.expected(48)) == pytest.approx(quality.value)
