"""The rise of a loss after a removal, and whether its interval covers."""

from __future__ import annotations

import numpy as np
import pytest

from daunce_api.errors import DataError
from daunce_api.evaluation.removal import removal_rise


@pytest.mark.parametrize(
    ("answers", "randoms", "differ", "shared", "single"),
    [
        (5, 5, 0.0, 1.0, 0.1),  # a model that came out badly has all answers worse
        (20, 5, 1.0, 1.0, 0.1),
        (5, 2, 1.0, 1.0, 0.1),
        (10, 5, 4.0, 1.0, 1.0),
        (5, 5, 0.0, 0.1, 1.0),  # the noise of answers is their own
        (2, 5, 0.0, 0.1, 1.0),
        (1, 5, 0.0, 1.0, 1.0),
    ],
)
def test_the_interval_covers_the_true_rise(
    answers: int, randoms: int, differ: float, shared: float, single: float
) -> None:
    """True rises ~ N(1, differ); a fine-tune moves all answers by N(0, shared) and each by N(0, single)."""
    rng = np.random.default_rng(7)
    hits = []
    for _ in range(800):
        level = 3 + rng.normal(size=answers)
        noise = np.sqrt(shared) * rng.normal(size=(randoms, 1)) + np.sqrt(single) * rng.normal(size=(randoms, answers))
        own = np.sqrt(differ) * rng.normal(size=answers) + np.sqrt(shared + single) * rng.normal(size=answers)
        found = removal_rise(level + 1 + own, level + noise)
        assert found.low is not None
        assert found.high is not None
        hits.append(found.low <= 1 <= found.high)
    assert 0.93 <= np.mean(hits) <= 0.995


def test_the_random_mean_does_not_average_out_over_answers() -> None:
    """Two hundred answers that all rise alike are still known no better than the two random models they lean on."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=200)
    found = removal_rise(level + 1, level + np.array([[-0.5], [0.5]]))
    assert found.value == pytest.approx(1.0)
    assert found.low is not None
    assert found.low < 0


def test_one_answer_has_the_noise_of_random_removals() -> None:
    random = np.array([[1.0], [1.2], [1.4]])
    found = removal_rise([2.0], random)
    half = 4.302652729911275 * 0.2 * np.sqrt(1 + 1 / 3)  # t with 2 degrees of freedom
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high) == (pytest.approx(0.8 - half), pytest.approx(0.8 + half))


def test_a_single_random_removal_shows_no_noise() -> None:
    found = removal_rise([2.0, 3.0], [[1.0, 1.0]])
    assert (found.value, found.low, found.high) == (1.5, None, None)
    assert removal_rise([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]).low == 0.0


@pytest.mark.parametrize(
    ("without", "random"),
    [([1.0, 2.0], [[1.0]]), ([], np.zeros((2, 0))), ([1.0], np.zeros((0, 1))), ([np.nan], [[1.0], [2.0]])],
)
def test_what_it_refuses(without: list[float], random: object) -> None:
    with pytest.raises(DataError):
        removal_rise(without, random)  # type: ignore[arg-type]
