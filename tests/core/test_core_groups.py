from __future__ import annotations

import numpy as np
import pytest

from daunce_api.core import ESTIMATORS, fit, member_losses, scores, self_influence, significance_threshold
from daunce_api.core.groups import group_sums
from daunce_api.errors import DataError
from tests.core.problems import group_scores, linear_problem, top

P = linear_problem(members=19, train=40, test=6)
SOURCES = ["b", "a", "c", "a"] * 10
AUTHORS = ["x", "y", "x", "x", "y", "z"]


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
def test_a_groups_score_is_the_sum_of_its_members(name: str) -> None:
    score = scores(P.train, P.test, P.inclusion, name, rho=0.3)
    got = group_scores(P.train, P.test, SOURCES, AUTHORS, name, inclusion_KN=P.inclusion, rho=0.3)
    assert got.train_groups == ("b", "a", "c")
    assert got.test_groups == ("x", "y", "z")
    rows = np.array([[s == g for s in SOURCES] for g in got.train_groups], dtype=float)
    columns = np.array([[a == g for a in AUTHORS] for g in got.test_groups], dtype=float)
    assert np.allclose(got.score_GH, rows @ score @ columns.T)
    assert (got.stderr_GH > 0).all()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_groups_of_one_are_the_examples(name: str) -> None:
    got = group_scores(P.train, P.test, estimator=name, inclusion_KN=P.inclusion, rho=0.3)
    ranking = top(P.train, P.test, 40, name, inclusion_KN=P.inclusion, rho=0.3)
    assert ranking.stderr_Mk is not None
    assert np.allclose(np.take_along_axis(got.stderr_GH.T, ranking.index_Mk, axis=1), ranking.stderr_Mk)


def test_a_groups_error_counts_what_its_examples_share() -> None:
    twice = np.repeat(P.train[:, :1], 4, axis=1)
    one = group_scores(P.train[:, :1], P.test, estimator="covariance")
    four = group_scores(twice, P.test, ["same"] * 4, estimator="covariance")
    assert np.allclose(four.stderr_GH, 4 * one.stderr_GH)


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
def test_an_example_without_losses_leaves_its_groups_theirs(name: str) -> None:
    train, test = P.train.copy(), P.test.copy()
    train[:, [0, 5]] = test[:, 2] = np.nan
    seen, asked = np.isfinite(train).all(axis=0), np.isfinite(test).all(axis=0)
    labels = ["only", *SOURCES[1:]]
    arguments = {"inclusion_KN": P.inclusion, "rho": 0.3, "noise": 1e-3}
    got = group_scores(train, test, labels, AUTHORS, name, **arguments)
    arguments |= {"inclusion_KN": P.inclusion[:, seen], "noise": 1e-3}
    rest = group_scores(
        train[:, seen],
        test[:, asked],
        [s for s, known in zip(labels, seen, strict=True) if known],
        [s for s, known in zip(AUTHORS, asked, strict=True) if known],
        name,
        **arguments,
    )
    assert got.train_groups == ("only", "a", "c", "b")
    assert np.isnan(got.score_GH[0]).all()
    assert np.isnan(got.stderr_GH[0]).all()
    order = [rest.train_groups.index(g) for g in got.train_groups[1:]]
    assert np.allclose(got.score_GH[1:], rest.score_GH[order])
    assert np.allclose(got.stderr_GH[1:], rest.stderr_GH[order])
    assert got.estimator == rest.estimator


@pytest.mark.parametrize("size", [8, 10, 20])
def test_intervals_of_summed_correlations_cover(size: int) -> None:
    drawn = 500
    pool = linear_problem(members=size * drawn, train=20, test=6)
    rng = np.random.default_rng(0)
    train, test = (x + x.std() * rng.normal(size=x.shape) for x in (pool.train, pool.test))
    groups = np.arange(20) % 4, np.arange(6) // 3
    found = []
    for i in range(0, len(train), size):
        members = member_losses(train[i : i + size], test[i : i + size])
        found.append(group_sums(fit(members, "correlation"), *groups))
    score, error = (np.array(x) for x in zip(*found, strict=True))
    width = significance_threshold(size) * error * np.sqrt(1 - 1 / drawn)
    assert 0.93 <= (np.abs(score - score.mean(axis=0)) < width).mean() <= 0.97


def test_every_example_needs_a_label() -> None:
    with pytest.raises(DataError, match="39 labels"):
        group_scores(P.train, P.test, SOURCES[:-1])


def test_self_influence_is_variance_and_memorisation() -> None:
    loss = np.array([[1.0, 2.0], [3.0, 2.5], [2.0, 9.0], [6.0, 10.0]])
    inclusion = np.array([[1, 1], [1, 1], [0, 0], [0, 0]], dtype=bool)
    got = self_influence(loss, inclusion)
    assert np.allclose(got.variance_N, loss.var(axis=0, ddof=1))
    assert got.memorised_N is not None
    assert np.allclose(got.memorised_N, [2.0, 7.25])
    assert np.allclose(self_influence(loss, noise=0.5).variance_N, loss.var(axis=0, ddof=1) - 0.25)
    assert np.allclose(got.variance_N, np.diag(scores(loss, loss, estimator="covariance")), atol=1e-12), (
        "the covariance score of an example to itself"
    )


def test_self_influence_leaves_out_what_is_missing() -> None:
    loss = np.array([[1.0, np.nan], [3.0, np.nan], [2.0, 9.0]])
    got = self_influence(loss, np.array([[1, 0], [1, 1], [1, 0]]))
    assert np.isnan(got.variance_N).tolist() == [False, True]
    assert got.memorised_N is not None
    assert np.isnan(got.memorised_N).all()
    with pytest.raises(DataError):
        self_influence(loss, np.ones((2, 2)))
