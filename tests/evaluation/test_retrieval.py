from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from daunce_api.errors import DataError
from daunce_api.evaluation.retrieval import average_precision, precision_at, reciprocal_rank, retrieval

SCORES = [5.0, 4.0, 3.0, 2.0, 1.0]
RELEVANT = [1, 0, 1, 0, 0]


def test_without_ties_the_textbook_values() -> None:
    assert average_precision(SCORES, RELEVANT) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert precision_at(SCORES, RELEVANT, 1) == 1.0
    assert precision_at(SCORES, RELEVANT) == 0.5
    assert precision_at(SCORES, RELEVANT, 5) == pytest.approx(2 / 5)
    assert reciprocal_rank(SCORES, [0, 0, 1, 0, 1]) == pytest.approx(1 / 3)


def test_a_perfect_and_the_worst_ranking() -> None:
    assert average_precision(SCORES, [1, 1, 0, 0, 0]) == 1.0
    assert average_precision(SCORES, [0, 0, 0, 0, 1]) == pytest.approx(1 / 5)
    assert reciprocal_rank(SCORES, [0, 0, 0, 0, 1]) == pytest.approx(1 / 5)


@st.composite
def _tied(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    n = draw(st.integers(1, 6))
    score = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    relevant = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(any))
    return score, relevant


@given(_tied())
def test_ties_give_the_mean_over_all_orders_of_them(case: tuple[list[int], list[int]]) -> None:
    score, relevant = case
    ap, rr, p1 = [], [], []
    for order in itertools.permutations(range(len(score))):
        if any(score[a] < score[b] for a, b in itertools.pairwise(order)):
            continue
        hits = [relevant[i] for i in order]
        ranks = [r for r, hit in enumerate(hits, 1) if hit]
        ap.append(np.mean([(q + 1) / r for q, r in enumerate(ranks)]))
        rr.append(1 / ranks[0])
        p1.append(hits[0])
    assert average_precision(score, relevant) == pytest.approx(np.mean(ap))
    assert reciprocal_rank(score, relevant) == pytest.approx(np.mean(rr))
    assert precision_at(score, relevant, 1) == pytest.approx(np.mean(p1))


@given(st.permutations(range(30)), st.sets(st.integers(0, 29), min_size=1))
def test_without_ties_it_is_scikit_learns_average_precision(order: list[int], chosen: set[int]) -> None:
    relevant = np.isin(np.arange(30), list(chosen))
    assert average_precision(order, relevant) == pytest.approx(average_precision_score(relevant, order))


@given(st.permutations(range(12)), st.sets(st.integers(0, 11), min_size=1))
def test_only_the_order_of_scores_counts(order: list[int], chosen: set[int]) -> None:
    relevant = np.isin(np.arange(12), list(chosen))
    score = np.array(order, dtype=float)
    assert average_precision(np.exp(score) - 7, relevant) == average_precision(score, relevant)


def test_an_unknown_score_ranks_last() -> None:
    assert reciprocal_rank([np.nan, -1e9, 0.0], [1, 0, 0]) == pytest.approx(1 / 3)


def test_means_over_test_examples_leave_out_those_without_a_relevant_one() -> None:
    score = np.array([[3.0, 1.0, 9.0], [2.0, 2.0, 8.0], [1.0, 3.0, 7.0]])
    relevant = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    result = retrieval(score, relevant)
    assert result.tests == 2
    assert result.mrr == pytest.approx((1 + 1 / 3) / 2)
    assert result.average_precision == pytest.approx((1 + 1 / 3) / 2)
    assert result.precision == 0.5


def test_one_label_vector_serves_all_test_examples() -> None:
    score = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    assert retrieval(score, [1, 0, 0]).mrr == pytest.approx((1 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("score", "relevant"),
    [([1.0, 2.0], [1]), ([1.0, 2.0], [0, 0]), ([[1.0, 2.0]], [[1, 0]])],
)
def test_labels_that_do_not_fit_are_refused(score: list[float], relevant: list[int]) -> None:
    for metric in (average_precision, precision_at, reciprocal_rank):
        with pytest.raises(DataError):
            metric(score, relevant)


def test_matrix_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="do not match"):
        retrieval(np.zeros((3, 2)), [1, 0])
    with pytest.raises(DataError, match="nothing to retrieve"):
        retrieval(np.zeros((3, 2)), [0, 0, 0])
    with pytest.raises(DataError, match="training by test"):
        retrieval(np.zeros(3), [0, 0, 1])


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_outside_the_list_is_refused(k: int) -> None:
    with pytest.raises(DataError, match="between 1 and the 5"):
        precision_at(SCORES, RELEVANT, k)
