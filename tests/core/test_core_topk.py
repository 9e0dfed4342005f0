from __future__ import annotations

import doctest
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daunce_api import core
from daunce_api.core import ESTIMATORS, choose, fit, member_losses, scores
from daunce_api.core.jackknife import z_values
from daunce_api.core.topk import _largest
from daunce_api.errors import ConfigurationError
from tests.core.problems import linear_problem, top
from tests.core.test_core_shrinkage import plain_scores


def test_the_examples_of_docstrings_run() -> None:
    for module in (core, sys.modules[core.top.__module__]):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed


P = linear_problem(members=25, train=300, test=17)


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
@pytest.mark.parametrize("per", ["test", "train"])
@pytest.mark.parametrize("opponents", [False, True])
def test_it_is_the_sorted_score_matrix(name: str, per: str, opponents: bool) -> None:
    score = scores(P.train, P.test, P.inclusion, name, rho=0.2)
    table = score.T if per == "test" else score
    ranking = top(
        P.train,
        P.test,
        7,
        name,
        opponents=opponents,
        inclusion_KN=P.inclusion,
        rho=0.2,
        per=per,  # type: ignore[arg-type]
    )
    expected = np.sort(table, axis=1)[:, :7] if opponents else -np.sort(-table, axis=1)[:, :7]
    assert np.allclose(ranking.score_Mk, expected)
    assert np.allclose(np.take_along_axis(table, ranking.index_Mk, axis=1), expected)
    assert ranking.opponents is opponents


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("per", ["test", "train"])
def test_standard_errors_of_chosen_pairs_are_those_of_the_blocks(name: str, per: str) -> None:
    ranking = top(P.train, P.test, 5, name, inclusion_KN=P.inclusion, rho=0.2, per=per)  # type: ignore[arg-type]
    members = member_losses(P.train, P.test, P.inclusion, rho=0.2)
    choice = choose(members, name)
    blocks = fit(members, choice.estimator.name, choice.setting)
    everything = blocks.stderr_block()
    table = everything.T if per == "test" else everything
    assert ranking.stderr_Mk is not None
    assert np.allclose(ranking.stderr_Mk, np.take_along_axis(table, ranking.index_Mk, axis=1))
    assert ranking.z_Mk is not None
    expected = z_values(ranking.score_Mk, ranking.stderr_Mk, correlation=name == "correlation")
    assert np.allclose(ranking.z_Mk, expected)


@settings(max_examples=60)
@given(
    st.integers(1, 5_000),
    st.integers(1, 300),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1.0, 3.0]),
)
@example(20_000, 30, 12, 40, 1, 0.3)
@example(20_000, 30, 12, 40, 2, 1.0)
def test_selection_is_exact_for_any_shape_and_tail(n: int, m: int, width: int, k: int, seed: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(width, n)) * np.exp(tail * rng.normal(size=n))
    queries = rng.normal(size=(width, m))
    k = min(k, n)
    index, value = _largest(plain_scores(points, queries, None), k)
    table = queries.T @ points
    assert np.allclose(value, -np.sort(-table, axis=1)[:, :k])
    assert np.allclose(np.take_along_axis(table, index, axis=1), value)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("count", [140, 5_000])
def test_equal_scores_come_by_index(count: int) -> None:
    rng = np.random.default_rng(count)
    points, queries = rng.integers(-3, 4, (2, count)).astype(float), rng.integers(-3, 4, (2, 600)).astype(float)
    index, value = _largest(plain_scores(points, queries, None), 7)
    table = queries.T @ points
    assert np.array_equal(value, -np.sort(-table, axis=1)[:, :7])
    assert np.array_equal(np.take_along_axis(table, index, axis=1), value)
    assert all(len(set(row)) == 7 for row in index.tolist())
    assert np.array_equal(np.lexsort((index, -value), axis=1), np.tile(np.arange(7), (600, 1)))


def test_equal_scores_keep_the_order_of_the_examples() -> None:
    index, value = _largest(plain_scores(np.ones((2, 5)), np.ones((2, 1)), None), 5)
    assert index.tolist() == [[0, 1, 2, 3, 4]]
    assert np.allclose(value, 2)


def test_more_than_there_are_means_all() -> None:
    assert top(P.train, P.test, 10_000).index_Mk.shape == (17, 300)


def test_memory_mapped_input(tmp_path: object) -> None:
    path = f"{tmp_path}/train.npy"
    np.save(path, P.train.astype(np.float32))
    mapped = np.load(path, mmap_mode="r")
    assert np.array_equal(
        top(mapped, P.test.astype(np.float32), 5).index_Mk,
        top(P.train.astype(np.float32), P.test.astype(np.float32), 5).index_Mk,
    )


def test_it_says_which_question_it_answers() -> None:
    attribution, retrieval = top(P.train, P.test, 3), top(P.train, P.test, 3, question="retrieval")
    assert "LDS" in attribution.question
    assert "average precision" in retrieval.question
    assert retrieval.estimator == "correlation"
    assert attribution.why
    assert retrieval.why != attribution.why


def test_retrieval_is_not_answered_by_an_estimator_that_is_for_something_else() -> None:
    with pytest.raises(ConfigurationError, match="name 'correlation'"):
        top(P.train, P.test, 3, "covariance", question="retrieval")
    assert top(P.train, P.test, 3, "correlation", question="retrieval").estimator == "correlation"


def test_without_standard_errors_there_is_no_z() -> None:
    ranking = top(P.train, P.test, 3, stderr=False)
    assert ranking.stderr_Mk is ranking.z_Mk is ranking.distinguishable_Mk is None


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 3, "per": "both"}, {"k": 3, "fdr": 2.0}, {"k": 3, "question": "why"}])
def test_unknown_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        top(P.train, P.test, **bad)  # type: ignore[arg-type]
