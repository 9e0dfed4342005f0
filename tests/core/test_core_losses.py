from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daunce_api.core import resolve_censored, segment_losses
from daunce_api.errors import ConfigurationError, DataError


def test_mean_and_sum_over_an_examples_own_tokens() -> None:
    assert segment_losses([-1.0, -3.0, -0.5], [2, 1]).tolist() == [2.0, 0.5]
    assert segment_losses([-1.0, -3.0, -0.5], [2, 1], "sum").tolist() == [4.0, 0.5]
    assert segment_losses([], []).shape == (0,)


@given(st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=9), min_size=1, max_size=9))
def test_each_example_has_its_own_mean(rows: list[list[float]]) -> None:
    flat = segment_losses(np.concatenate(rows), [len(r) for r in rows])
    assert np.allclose(flat, [-np.mean(r) for r in rows])


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 0.5])
def test_an_impossible_log_probability_names_its_example(bad: float) -> None:
    with pytest.raises(DataError, match="example 1"):
        segment_losses([-1.0, -1.0, bad], [1, 2])


def test_a_slightly_positive_log_probability_is_rounding() -> None:
    assert segment_losses([1e-4], [1])[0] == pytest.approx(-1e-4)


def test_an_example_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        segment_losses([-1.0], [0, 1])


def test_token_counts_must_fit() -> None:
    with pytest.raises(DataError, match="3 log-probabilities"):
        segment_losses([-1, -1, -1], [1, 1])
    with pytest.raises(ConfigurationError):
        segment_losses([-1], [1], "median")  # type: ignore[arg-type]


def test_censored_entries_stay_as_bounds_unless_they_are_the_majority() -> None:
    loss = np.array([[1.0, 5.0, 2.0], [2.0, 5.5, 5.0], [3.0, 1.0, 1.0]])
    censored = np.array([[0, 1, 0], [0, 1, 1], [0, 0, 0]], dtype=bool)
    kept = resolve_censored(loss, censored)
    assert np.isnan(kept[:, 1]).all()
    assert np.array_equal(kept[:, [0, 2]], loss[:, [0, 2]])
    assert np.isfinite(loss).all(), "the input is not changed"


def test_margins_are_log_odds_and_stay_finite() -> None:
    p = np.array([0.2, 0.5, 0.99])
    got = segment_losses(np.log([*p, p[0]]), [3, 1], "margin")
    assert got == pytest.approx([np.log((1 - p) / p).mean(), np.log(4.0)])
    sure = segment_losses([0.0, -1e-9, -800.0], [1, 1, 1], "margin")
    assert sure == pytest.approx([np.log(1e-12), np.log(1e-9), 800.0], rel=1e-6)
