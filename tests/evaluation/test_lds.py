from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from daunce_api.errors import DataError
from daunce_api.evaluation import lds

RECORDED = Path(__file__).parent / "recorded"


def _problem(seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    score, inclusion = rng.normal(size=(20, 4)), rng.random((40, 20)) < 0.5
    return score, inclusion, -(inclusion @ score) + noise * rng.normal(size=(40, 4))


def test_it_is_what_dattri_computes() -> None:
    score, inclusion, loss = runpy.run_path(str(RECORDED / "make_dattri_lds.py"))["problem"]()
    expected = json.loads((RECORDED / "dattri_lds.json").read_text())["lds"]
    judged = lds(score, inclusion, loss)
    assert np.allclose(judged.per_test_M, expected, atol=1e-12)
    assert judged.value == pytest.approx(np.mean(expected))


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_it_is_scipys_spearman_per_test_example(seed: int) -> None:
    score, inclusion, loss = _problem(seed)
    judged = lds(score, inclusion, loss)
    for j in range(4):
        assert judged.per_test_M[j] == pytest.approx(spearmanr(-(inclusion @ score[:, j]), loss[:, j]).statistic)
    assert judged.value == pytest.approx(judged.per_test_M.mean())


def test_positive_scores_are_helpful() -> None:
    score, inclusion, loss = _problem(noise=0.0)
    assert lds(score, inclusion, loss).value == pytest.approx(1.0)
    assert lds(-score, inclusion, loss).value == pytest.approx(-1.0)


def test_seeds_are_averaged() -> None:
    score, inclusion, loss = _problem()
    seeds = np.stack([loss - 1, loss + 1], axis=1)
    assert lds(score, inclusion, seeds).value == pytest.approx(lds(score, inclusion, loss).value)


def test_the_interval_covers_what_other_subsets_say() -> None:
    rng = np.random.default_rng(5)
    score = rng.normal(size=(20, 8))

    def judge(subsets: int, seed: int) -> tuple[float, float, float]:
        r = np.random.default_rng(seed)
        inclusion = r.random((subsets, 20)) < 0.5
        judged = lds(score, inclusion, -(inclusion @ score) + 4 * r.normal(size=(subsets, 8)), draws=300)
        return judged.low, judged.value, judged.high

    truth = judge(4000, 1)[1]
    hits = [low <= truth <= high for low, _, high in (judge(60, 100 + s) for s in range(200))]
    assert 0.9 <= np.mean(hits) <= 0.985


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_few_subsets_stays_within_a_correlations_range(sign: int) -> None:
    score, inclusion, loss = _problem(noise=0.5)
    for first in range(0, 40, 4):
        part = slice(first, first + 4)
        judged = lds(sign * score[:, :1], inclusion[part], loss[part, :1])
        assert -1 <= judged.low <= judged.value <= judged.high <= 1 or np.isnan(judged.value)


def test_a_test_example_that_does_not_vary_is_left_out_of_the_mean() -> None:
    score, inclusion, loss = _problem()
    loss[:, 1] = 3.0
    judged = lds(score, inclusion, loss)
    assert np.isnan(judged.per_test_M).tolist() == [False, True, False, False]
    assert judged.value == pytest.approx(np.nanmean(judged.per_test_M))
    assert np.isnan(lds(score, inclusion, np.zeros_like(loss)).value)


def test_what_it_refuses() -> None:
    score, inclusion, loss = _problem()
    with pytest.raises(DataError, match="do not fit"):
        lds(score.T, inclusion, loss)
    with pytest.raises(DataError, match="do not fit"):
        lds(score, inclusion, loss[:-1])
    with pytest.raises(DataError, match="at least 3"):
        lds(score, inclusion[:2], loss[:2])
    spoiled = score.copy()
    spoiled[0, 0] = np.nan
    with pytest.raises(DataError, match="scores have NaN"):
        lds(spoiled, inclusion, loss)
