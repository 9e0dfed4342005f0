from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from daunce_api.core import Setting, confidence_interval, fit, member_losses, scores, significance_threshold
from daunce_api.core.estimators import Spectrum, estimator_named, spectrum_of
from daunce_api.core.jackknife import _ridge_mixture, overcounting, z_values
from daunce_api.core.rows import Stages
from daunce_api.core.topk import fdr_threshold
from tests.core.problems import group_scores, linear_problem, top

WHOLE = slice(None)
P = linear_problem(members=24, train=30, test=7)


def _errors(train: np.ndarray, test: np.ndarray, inclusion: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    blocks = fit(member_losses(train, test, inclusion, rho=0.3), name, Setting(ridge=1.0))
    return blocks.block(), blocks.stderr_block()


@pytest.mark.parametrize("name", ["covariance", "correlation", "inclusion"])
def test_the_standard_error_is_the_jackknife(name: str) -> None:
    without = []
    for k in range(24):
        rest = np.arange(24) != k
        without.append(scores(P.train[rest], P.test[rest], P.inclusion[rest], name))
    expected = np.sqrt(23 / 24 * ((without - np.mean(without, axis=0)) ** 2).sum(axis=0))
    assert np.allclose(_errors(P.train, P.test, P.inclusion, name)[1], expected)


def test_the_jackknife_of_a_ridge_is_exact_too() -> None:
    a = P.train - P.train.mean(axis=0)
    ridge = np.trace(a @ a.T) / 24
    without = []
    for k in range(24):
        rest = np.arange(24) != k
        x, y = (z[rest] - z[rest].mean(axis=0) for z in (P.train, P.test))
        without.append(x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(23), y))
    expected = np.sqrt(23 / 24 * ((without - np.mean(without, axis=0)) ** 2).sum(axis=0))
    got = _errors(P.train, P.test, P.inclusion, "whitened")[1]
    assert np.allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["covariance", "whitened", "half_whitened"])
def test_intervals_cover_what_redrawn_ensembles_give(name: str) -> None:
    pool = linear_problem(members=3000, train=60, test=20)
    rng = np.random.default_rng(0)
    train, test = (x + 0.3 * x.std() * rng.normal(size=x.shape) for x in (pool.train, pool.test))
    size, drawn = 40, 75
    parts = [slice(i * size, (i + 1) * size) for i in range(drawn)]
    score, error = map(
        np.array, zip(*(_errors(train[p], test[p], pool.inclusion[p], name) for p in parts), strict=True)
    )
    # The mean over ensembles stands for the truth; each ensemble is 1 / 75 of it.
    width = significance_threshold(size) * error * np.sqrt(1 - 1 / drawn)
    coverage = (np.abs(score - score.mean(axis=0)) < width).mean()
    assert 0.93 <= coverage <= 0.97


def test_what_members_do_together_is_counted_once() -> None:
    one = Stages(np.ones((1, 3), dtype=bool))
    spectrum = Spectrum(np.array([3.0, 1.0]), np.eye(3)[:, :2], 4 / 3, one)
    # R has 1/4 and 1/2 at a ridge of 1: (3/4)^2 / (2 (1/16 + 1/4)).
    alone = overcounting(spectrum, np.array([1.0]), np.array([5.0]))
    assert alone == pytest.approx(0.9)
    assert overcounting(spectrum, np.array([1.0, 1.0]), np.array([2.0, 3.0])) == pytest.approx(alone)
    assert overcounting(spectrum, np.array([1e9]), np.array([1.0])) == pytest.approx(1)
    # At 1 and 5: kappa = 4/3 and 24/7, df = 5/4 and 13/24, so gamma = (13/7 - 5/3) / (44/21) / 2 = 1/22;
    # alone 1/10 and 1/50.
    gamma, weight = np.array([[1 / 10, 1 / 22], [1 / 22, 1 / 50]]), np.outer([1, 4], [1, 4])
    expected = (weight * gamma**2 / (1 - gamma)).sum() / (weight * gamma**2 / (1 - gamma) ** 2).sum()
    assert overcounting(spectrum, np.array([1.0, 5.0]), np.array([1.0, 4.0])) == pytest.approx(expected)


def test_intervals_of_strong_whitening_are_no_wider_than_they_need_be() -> None:
    rng = np.random.default_rng(0)
    size, drawn = 40, 100
    gradient, other = rng.normal(size=(60, 80)), rng.normal(size=(20, 80))
    fitted = []
    for _ in range(drawn):
        moved = rng.normal(size=(size, 80))
        members = member_losses(moved @ gradient.T, moved @ other.T)
        blocks = fit(members, "whitened", Setting(ridge=0.001))
        fitted.append((blocks.block(), blocks.stderr_block()))
    score, error = map(np.array, zip(*fitted, strict=True))
    width = significance_threshold(size) * error * np.sqrt(1 - 1 / drawn)
    assert 0.93 <= (np.abs(score - score.mean(axis=0)) < width).mean() <= 0.97


@pytest.mark.parametrize("name", ["whitened", "half_whitened"])
def test_the_mixture_follows_a_filter_behind_a_wiener_weight(name: str) -> None:
    p = linear_problem(members=40, train=400, test=4)
    noisy = p.train + 0.3 * p.train.std() * np.random.default_rng(0).normal(size=p.train.shape)
    setting = Setting(ridge=0.1)
    spectrum = spectrum_of(member_losses(noisy, p.test, noise=0.3 * p.train.std()))
    apply = estimator_named(name).filter
    assert apply is not None
    phi = apply(spectrum, setting)
    ridges, weights = _ridge_mixture(spectrum, phi, 0.1 * spectrum.mean)
    found = (weights / (spectrum.w[:, None] + ridges)).sum(axis=1)
    assert (weights < 0).any(), "no sum of ridges falls towards the noise"
    assert np.linalg.norm(spectrum.w * (found - phi)) < 0.02 * np.linalg.norm(spectrum.w * phi)


def test_two_members_have_no_standard_error() -> None:
    ranking = top(P.train[:2], P.test[:2], 3, "covariance")
    assert ranking.stderr_Mk is not None
    assert np.isnan(ranking.stderr_Mk).all()
    assert ranking.distinguishable_Mk is not None
    assert not ranking.distinguishable_Mk.any()


def test_the_threshold_is_students() -> None:
    assert significance_threshold(20) == pytest.approx(2.093, abs=1e-3)
    assert significance_threshold(10_000) == pytest.approx(1.960, abs=1e-3)


def test_noise_is_not_distinguishable_and_signal_is() -> None:
    rng = np.random.default_rng(3)
    train, test = rng.normal(size=(60, 400)), rng.normal(size=(60, 10))
    plain = top(train, test, 400, "covariance")
    strict = top(train, test, 400, "covariance", fdr=0.1)
    assert plain.distinguishable_Mk is not None
    assert strict.distinguishable_Mk is not None
    assert plain.distinguishable_Mk.mean() == pytest.approx(0.05, abs=0.02)
    assert strict.distinguishable_Mk.mean() < 0.002
    test += 2 * train[:, :10]
    found = top(train, test, 400, "covariance", fdr=0.1)
    marked = found.distinguishable_Mk
    assert marked is not None
    true = found.index_Mk == np.arange(10)[:, None]
    assert marked[true].all(), "the planted pairs are found"
    assert (marked & ~true).sum() <= 0.25 * marked.sum()


def test_the_histogram_is_never_less_strict_than_benjamini_hochberg() -> None:
    rng = np.random.default_rng(4)
    train, test = rng.normal(size=(40, 300)), rng.normal(size=(40, 8))
    test += 3 * train[:, :8]
    blocks = fit(member_losses(train, test), "covariance")
    z = np.abs(blocks.block() / blocks.stderr_block()).ravel()
    p = np.sort(2 * stats.t.sf(z, 39))
    passed = np.flatnonzero(p <= 0.1 * np.arange(1, p.size + 1) / p.size)
    marked = (z >= fdr_threshold(blocks, 0.1)).sum()
    assert 0.8 * (passed[-1] + 1) <= marked <= passed[-1] + 1


def test_intervals_of_correlations_cover_at_few_members() -> None:
    rng = np.random.default_rng(5)
    size, drawn, true = 10, 300, 0.8
    x = rng.normal(size=(drawn, size, 40))
    y = true * x + np.sqrt(1 - true**2) * rng.normal(size=x.shape)
    covered, plain = [], []
    for a, b in zip(x, y, strict=True):
        blocks = fit(member_losses(a, b), "correlation")
        score, error = np.diag(blocks.block()), np.diag(blocks.stderr_block())
        low, high = confidence_interval(score, error, size, correlation=True)
        assert (low >= -1).all()
        assert (high <= 1).all()
        covered.append((low < true) & (true < high))
        low, high = confidence_interval(score, error, size)
        plain.append((low < true) & (true < high))
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(plain) < 0.91, "without Fisher's scale they would not"


def test_z_values_of_correlations_are_on_fishers_scale() -> None:
    score, error = np.array([0.5, 0.5, 0.1]), np.array([0.1, 0.0, np.nan])
    assert np.allclose(z_values(score, error), [5, np.nan, np.nan], equal_nan=True)
    assert np.allclose(
        z_values(score, error, correlation=True), [np.arctanh(0.5) * 7.5, np.nan, np.nan], equal_nan=True
    )
    ranking = top(P.train, P.test, 3, "correlation")
    assert ranking.z_Mk is not None
    assert ranking.stderr_Mk is not None
    assert np.allclose(ranking.z_Mk, z_values(ranking.score_Mk, ranking.stderr_Mk, correlation=True))
    low, high = confidence_interval(np.array([2.0]), np.array([1.0]), 20)
    assert (low[0], high[0]) == pytest.approx((2 - 2.093, 2 + 2.093), abs=1e-3)


def test_scores_do_not_pay_for_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("nobody asked for standard errors")

    monkeypatch.setattr("daunce_api.core.pairs.filter_terms", refuse)
    for name in ("whitened", "half_whitened"):
        assert np.isfinite(scores(P.train, P.test, P.inclusion, name, rho=0.05)).all()
        assert top(P.train, P.test, 3, name, stderr=False, inclusion_KN=P.inclusion, rho=0.05).stderr_Mk is None
        with pytest.raises(AssertionError):
            top(P.train, P.test, 3, name, inclusion_KN=P.inclusion, rho=0.05)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_a_filter_is_a_mixture_of_few_ridges_whatever_the_unit(unit: float) -> None:
    p = linear_problem(members=100, train=400, test=4)
    noisy = p.train + 0.1 * np.random.default_rng(0).normal(size=p.train.shape)
    blocks = fit(member_losses(noisy, p.test), "half_whitened")
    assert 4 < len(blocks.terms) <= 18
    plain, scaled = (_errors(x, p.test, p.inclusion, "half_whitened")[1] for x in (noisy, unit * noisy))
    assert np.allclose(plain, scaled, rtol=1e-3)


def test_three_members_have_no_error_of_a_correlation() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(3, 500)), rng.normal(size=(3, 40))
    found = top(train, test, 500, "correlation", fdr=0.1)
    assert found.distinguishable_Mk is not None
    assert not found.distinguishable_Mk.any()
    assert found.stderr_Mk is not None
    assert np.isnan(found.stderr_Mk).all()
    groups = group_scores(train, test, ["a", "b"] * 250, estimator="correlation")
    assert np.isnan(groups.stderr_GH).all()
    four = top(rng.normal(size=(4, 50)), rng.normal(size=(4, 4)), 5, "correlation")
    assert four.stderr_Mk is not None
    assert np.isfinite(four.stderr_Mk).all()
