from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from daunce_api.core import Setting, choose, member_losses, scores, self_lds
from daunce_api.core.choice import RIDGES, SHORTFALL, shortfall
from daunce_api.core.estimators import estimator_named
from daunce_api.core.heldout import HeldOut
from daunce_api.core.quality import column_spearman, estimate
from daunce_api.errors import ConfigurationError, NotEnoughMembersError
from tests.core.problems import linear_problem

P = linear_problem(members=48)
MEMBERS = member_losses(P.train, P.test, P.inclusion)


@pytest.mark.parametrize("name", ["covariance", "whitened", "half_whitened", "matched", "correlation", "inclusion"])
def test_held_out_predictions_are_inclusion_times_scores(name: str) -> None:
    setting = Setting(noise=0.01, rho=0.3, ridge=0.5)
    fit, held = np.arange(5, 48), np.arange(5)
    got = HeldOut(MEMBERS).predict([(estimator_named(name), setting)], fit, held)[0]
    from daunce_api.core.blocks import score_blocks

    everything = slice(None)
    score = score_blocks(estimator_named(name), MEMBERS.rows(fit), setting).block(everything, everything)
    expected = -(P.inclusion[held] - P.inclusion[fit].mean(axis=0)) @ score
    # matched reads the dispersion of the inclusion matrix, which is taken over all members there and over some here.
    tolerance = 2e-3 if name == "matched" else 1e-9
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


def test_incomplete_members_are_judged_too() -> None:
    test = P.test.copy()
    test[3, 4] = np.nan
    value = self_lds(P.train, test, P.inclusion, "covariance")
    assert value.raw == pytest.approx(self_lds(P.train, P.test, P.inclusion, "covariance").raw, abs=0.02)


def test_a_good_run_is_recognised_and_noise_is_too() -> None:
    good = self_lds(P.train, P.test, P.inclusion)
    assert good.value > 0.9
    assert good.low <= good.value <= good.high
    rng = np.random.default_rng(0)
    noise = self_lds(P.train, rng.normal(size=P.test.shape), P.inclusion, "half_whitened")
    assert abs(noise.value) < 0.15
    assert noise.low < 0 < noise.high


def test_the_ceiling_takes_the_luck_of_single_runs_out() -> None:
    rng = np.random.default_rng(1)
    problem = linear_problem(members=200)
    luck = problem.test + rng.normal(size=problem.test.shape) * problem.test.std(axis=0)
    judged = self_lds(problem.train, luck, problem.inclusion, "half_whitened")
    assert judged.raw < 0.75, "single runs are half luck"
    assert judged.raw < judged.ceiling < 0.85
    fresh = linear_problem(members=400, seed=0)
    truth = fresh.test[200:]  # the same problem's further members, without luck
    prediction = -(
        fresh.inclusion[200:].astype(float) @ scores(problem.train, luck, problem.inclusion, "half_whitened")
    )
    without_luck = column_spearman(prediction, truth).mean()
    assert abs(judged.value - without_luck) < 0.5 * abs(judged.raw - without_luck)


def test_the_ceiling_of_members_from_the_target_depends_on_how_alike_they_answer() -> None:
    rng = np.random.default_rng(2)
    test = P.test + rng.normal(size=P.test.shape) * P.test.std(axis=0)  # keeps raw below any ceiling
    assert self_lds(P.train, test, P.inclusion, "covariance", rho=1e-6).ceiling == pytest.approx(0.84 + 1.6 / 48)
    alike = self_lds(P.train, test, P.inclusion, "covariance", rho=1e6)
    assert alike.ceiling == pytest.approx(0.92)
    noise = 0.2 * float(test.std(axis=0).min())
    noisy = self_lds(P.train, test, P.inclusion, "covariance", rho=1e6, noise=noise)
    expected = 0.92 * np.sqrt(1 - noise**2 / test.var(axis=0)).mean()
    assert noisy.ceiling == pytest.approx(expected)


def test_the_explained_share_is_what_subsets_explain() -> None:
    problem = linear_problem(members=400)
    rng = np.random.default_rng(3)
    for luck, share in ((0.0, 1.0), (1.0, 0.5)):
        test = problem.test + luck * rng.normal(size=problem.test.shape) * problem.test.std(axis=0)
        found, error = HeldOut(member_losses(problem.train, test, problem.inclusion)).explained()
        assert 0 < error < 0.1
        assert abs(found - share) < 3 * error
    nothing, error = HeldOut(member_losses(problem.train, np.ones_like(problem.test), problem.inclusion)).explained()
    assert (nothing, error) == (0.0, float("inf"))


def test_auto_follows_held_out_members_where_they_answer_like_the_target() -> None:
    def ridge(rho: float | None) -> float:
        choice = choose(member_losses(P.train, P.test, P.inclusion), setting=Setting(rho=rho))
        return choice.setting.ridge or 0.0

    assert ridge(1e6) == ridge(None)
    held = HeldOut(member_losses(P.train, P.test, P.inclusion))
    assert shortfall(held, Setting()) == shortfall(held, Setting(rho=1e6)) == 0
    assert shortfall(held, Setting(rho=1e-6)) == pytest.approx(SHORTFALL)
    energy = 0.5 * held.spectrum(Setting()).w[-1]
    noise = float(np.sqrt(energy / P.train.shape[1]))
    spectrum = held.spectrum(Setting(noise=noise))
    share = spectrum.signal.sum() / spectrum.w.sum()
    assert share < 1
    assert shortfall(held, Setting(noise=noise, rho=1e-6)) == pytest.approx(SHORTFALL * share**4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_column_spearman_is_scipys(seed: int, gaps: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, (14, 5)).astype(float), rng.normal(size=(14, 5))
    if gaps:
        x[rng.random(x.shape) < 0.2] = np.nan
        y[rng.random(y.shape) < 0.2] = np.nan
    both = np.isfinite(x) & np.isfinite(y)
    got = column_spearman(x, y)
    for j in range(5):
        if both[:, j].sum() >= 3 and np.ptp(x[both[:, j], j]) > 0:
            assert got[j] == pytest.approx(spearmanr(x[both[:, j], j], y[both[:, j], j]).statistic, abs=1e-9)


def test_constant_columns_and_few_rows() -> None:
    x = np.array([[1.0, 1.0], [1.0, np.nan], [1.0, 2.0], [1.0, np.nan]])
    got = column_spearman(x, np.arange(8.0).reshape(4, 2))
    assert got[0] == 0.0
    assert np.isnan(got[1])


def test_what_self_lds_needs() -> None:
    with pytest.raises(NotEnoughMembersError, match="at least 8"):
        self_lds(P.train[:7], P.test[:7], P.inclusion[:7])
    with pytest.raises(ConfigurationError, match="inclusion_KN"):
        HeldOut(member_losses(P.train, P.test))


def test_auto_takes_what_predicts_held_out_members_best() -> None:
    choice = choose(MEMBERS)
    held = HeldOut(MEMBERS)
    best = estimate(held, (choice.estimator, choice.setting)).raw
    for name in ("covariance", "half_whitened"):
        assert best >= estimate(held, (estimator_named(name), choice.setting)).raw - 1e-9
    assert "held-out" in choice.why
    assert choice.question == "attribution"


def test_auto_whitens_short_members_more() -> None:
    short = linear_problem(members=60, response="flat")
    members = member_losses(short.train, short.test, short.inclusion)
    own, target = choose(members), choose(members, setting=Setting(rho=0.05))
    assert target.estimator.name == "whitened"
    assert target.setting.ridge is not None
    assert own.setting.ridge is None or target.setting.ridge <= own.setting.ridge
    assert target.setting.ridge in RIDGES
    assert "short runs from the target" in target.why


def test_auto_falls_back_where_there_is_too_little_to_judge_by() -> None:
    few = choose(member_losses(P.train[:10], P.test[:10], P.inclusion[:10]))
    assert (few.estimator.name, few.setting.ridge) == ("whitened", 1.0)
    assert "10 members" in few.why
    blind = choose(member_losses(P.train, P.test))
    assert "no inclusion matrix" in blind.why
    drowned = choose(member_losses(P.train, P.test), setting=Setting(noise=10.0))
    assert drowned.estimator.name == "covariance"
    assert choose(MEMBERS, setting=Setting(noise=10.0)).estimator.name == "covariance"


def test_whitened_chooses_its_lambda() -> None:
    choice = choose(MEMBERS, "whitened")
    assert choice.setting.ridge in RIDGES
    assert "lambda" in choice.why
    assert choose(MEMBERS, "whitened", Setting(ridge=0.7)).setting.ridge == 0.7
