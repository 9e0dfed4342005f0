from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from daunce_api.core import (
    ESTIMATORS,
    Setting,
    group_scores,
    member_losses,
    per_example_losses,
    scores,
    self_influence,
    token_scores,
    top,
)
from daunce_api.core.blocks import score_blocks
from daunce_api.core.estimators import estimator_named
from daunce_api.core.uncertainty import significance_threshold
from daunce_api.errors import ConfigurationError, DataError
from tests.core.problems import linear_problem

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


def test_groups_with_missing_losses_still_add_up() -> None:
    train = P.train.copy()
    train[3, 5] = np.nan
    got = group_scores(train, P.test, SOURCES, estimator="covariance")
    score = scores(train, P.test, estimator="covariance")
    assert np.allclose(got.score_GH[1], score[[i for i, s in enumerate(SOURCES) if s == "a"]].sum(axis=0))
    assert np.isfinite(got.stderr_GH).all()
    alone = group_scores(train, P.test, estimator="covariance")
    assert np.isfinite(alone.stderr_GH).all()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("columns", [AUTHORS, None])
def test_a_groups_error_does_not_depend_on_how_it_was_found(name: str, columns: list[str] | None) -> None:
    """Marked as incomplete without a gap, losses take the way of incomplete ones."""
    members = member_losses(P.train, P.test, P.inclusion)
    marked = replace(members, complete=False)
    row_of = np.array([0, 1, 2, 1] * 10)
    column_of = np.arange(6) if columns is None else np.array([0, 1, 0, 0, 1, 2])
    estimator, setting = estimator_named(name), Setting(rho=0.3, ridge=1.0)
    whole, gaps = (score_blocks(estimator, m, setting).group_block(row_of, column_of) for m in (members, marked))
    assert np.allclose(whole[0], gaps[0])
    assert np.allclose(whole[1], gaps[1])


@pytest.mark.parametrize("name", ["covariance", "half_whitened"])
def test_a_groups_error_with_gaps_covers(name: str) -> None:
    size, drawn = 20, 120
    pool = linear_problem(members=size * drawn, train=24, test=3)
    rng = np.random.default_rng(0)
    train, test = (x + 0.5 * x.std() * rng.normal(size=x.shape) for x in (pool.train, pool.test))
    for column in (0, 1, 2, 7):
        train[rng.random(len(train)) < 0.2, column] = np.nan
    labels = ["a", "b", "a", "b"] * 6
    got = [
        group_scores(train[i : i + size], test[i : i + size], labels, estimator=name)
        for i in range(0, len(train), size)
    ]
    score, error = (np.array([getattr(x, side) for x in got]) for side in ("score_GH", "stderr_GH"))
    width = significance_threshold(size) * error * np.sqrt(1 - 1 / drawn)
    assert 0.92 <= (np.abs(score - score.mean(axis=0)) < width).mean() <= 0.98


def test_a_group_with_a_pair_of_two_members_has_no_error() -> None:
    train = P.train.copy()
    train[2:, 5] = np.nan
    for name in ("covariance", "half_whitened"):
        got = group_scores(train, P.test, SOURCES, estimator=name)
        assert np.isfinite(got.score_GH).all()
        assert np.isnan(got.stderr_GH).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
def test_an_example_without_losses_leaves_its_groups_theirs(name: str) -> None:
    train, test = P.train.copy(), P.test.copy()
    train[:, [0, 5]] = test[:, 2] = np.nan
    seen, asked = np.isfinite(train).all(axis=0), np.isfinite(test).all(axis=0)
    labels = ["only", *SOURCES[1:]]
    arguments = {"inclusion_KN": P.inclusion, "rho": 0.3, "noise": np.full(40, 1e-3)}
    got = group_scores(train, test, labels, AUTHORS, name, **arguments)
    arguments |= {"inclusion_KN": P.inclusion[:, seen], "noise": np.full(38, 1e-3)}
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
        found.append(score_blocks(estimator_named("correlation"), members, Setting()).group_block(*groups))
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
    assert got.within_N is not None
    assert np.allclose(got.within_N, [(2.0 + 8.0) / 2, (0.125 + 0.5) / 2])
    assert got.memorised_stderr_N is not None
    assert np.allclose(got.memorised_stderr_N, np.sqrt([(2 + 8) / 2, (0.125 + 0.5) / 2]))
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "margin"])
@pytest.mark.parametrize("name", ["covariance", "whitened", "half_whitened", "matched"])
def test_token_scores_sum_to_the_pairs_score(name: str, reduction: str) -> None:
    rng = np.random.default_rng(0)
    train, test = -rng.exponential(size=(19, 5)), -rng.exponential(size=(19, 3))
    reduced = [per_example_losses(list(rows), reduction) for rows in (train, test)]  # type: ignore[arg-type]
    others = P.train.copy()
    others[:, 0] = reduced[0]
    whole = scores(others, reduced[1][:, None], P.inclusion, name, rho=0.3)[0, 0]
    got = token_scores(
        train,
        test,
        name,
        train_loss_KN=others,
        inclusion_KN=P.inclusion,
        rho=0.3,
        ridge=1.0,
        reduction=reduction,  # type: ignore[arg-type]
    )
    if name == "whitened":  # fewer than 20 members: lambda = 1 on both sides
        assert len(others) < 20
    assert got.total == pytest.approx(whole)
    assert got.score_TU.shape == (5, 3)
    assert np.allclose(got.train_T, got.score_TU.sum(axis=1))
    assert got.test_U.sum() == pytest.approx(whole)


def test_the_token_that_moves_carries_the_score() -> None:
    rng = np.random.default_rng(1)
    push = rng.normal(size=19)
    train, test = np.full((19, 4), -1.0), np.full((19, 3), -2.0)
    train[:, 2] += push / 10
    test[:, 1] += push / 10
    got = token_scores(train, test)
    assert np.argmax(got.train_T) == 2
    assert np.argmax(got.test_U) == 1
    assert got.score_TU[2, 1] == pytest.approx(got.total)


def test_what_token_scores_refuse() -> None:
    good = np.full((4, 2), -1.0)
    with pytest.raises(ConfigurationError, match="linear"):
        token_scores(good, good, "correlation")
    with pytest.raises(ConfigurationError, match="train_loss_KN"):
        token_scores(good, good, "whitened")
    with pytest.raises(DataError):
        token_scores(good, good[:3])
    with pytest.raises(DataError, match="incomplete"):
        token_scores(np.where(np.eye(4, 2) > 0, np.nan, good), good)
