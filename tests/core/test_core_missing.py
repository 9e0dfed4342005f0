from __future__ import annotations

import numpy as np
import pytest

from daunce_api.core import ESTIMATORS, choose, member_losses, scores, top
from daunce_api.core.blocks import score_blocks
from daunce_api.core.estimators import estimator_named
from daunce_api.core.spectrum import Setting
from daunce_api.errors import DataError
from tests.core.problems import linear_problem


def _with_gaps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p = linear_problem(members=19, train=40, test=6)
    train, test = p.train.copy(), p.test.copy()
    train[3, 5] = train[7, 5] = train[2, 9] = np.nan
    test[4, 1] = np.nan
    return train, test, p.inclusion


@pytest.mark.parametrize("name", ["covariance", "correlation", "inclusion"])
def test_a_pair_uses_the_members_that_have_both(name: str) -> None:
    train, test, inclusion = _with_gaps()
    score = scores(train, test, inclusion, name)
    for i, j in [(0, 0), (5, 0), (5, 1), (9, 1)]:
        both = np.isfinite(test[:, j]) & (np.isfinite(train[:, i]) | (name == "inclusion"))
        x = -inclusion[:, i].astype(float) if name == "inclusion" else train[:, i]
        moments = np.corrcoef if name == "correlation" else np.cov
        assert score[i, j] == pytest.approx(moments(x[both], test[both, j])[0, 1])


@pytest.mark.parametrize("name", ["whitened", "half_whitened", "matched"])
def test_a_filter_scores_a_pair_as_if_only_common_members_existed(name: str) -> None:
    train, test, inclusion = _with_gaps()
    score = scores(train, test, inclusion, name, rho=0.2)
    members = np.ones(19, dtype=bool)
    members[[3, 7, 4]] = False
    seen = np.isfinite(train[members]).all(axis=0)
    alone = scores(train[members][:, seen], test[members], inclusion[members][:, seen], name, rho=0.2)
    assert score[5, 1] == pytest.approx(alone[seen[:5].sum(), 1])
    untouched = np.isfinite(train).all(axis=0)
    complete = scores(train[:, untouched], test[:, :1], inclusion[:, untouched], name, rho=0.2)
    assert np.allclose(score[untouched, 0], complete[:, 0])


@pytest.mark.parametrize("name", ["covariance", "half_whitened"])
def test_a_pair_without_two_common_members_has_no_score(name: str) -> None:
    train, test, _ = _with_gaps()
    train[1:, 0] = np.nan
    score = scores(train, test, estimator=name)
    assert np.isnan(score[0]).all()
    assert np.isfinite(score[1:]).all()
    ranking = top(train, test, 40, estimator=name)
    assert (ranking.index_Mk[:, -1] == -1).all()
    assert np.isnan(ranking.score_Mk[:, -1]).all()
    assert not (ranking.index_Mk == 0).any()


def test_gaps_all_over_are_refused_by_filters_with_an_alternative() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 4000)), rng.normal(size=(60, 300))
    train[rng.random(train.shape) < 0.2] = np.nan
    test[rng.random(test.shape) < 0.2] = np.nan
    with pytest.raises(DataError, match="estimator='covariance'"):
        scores(train, test, estimator="half_whitened")
    assert np.isfinite(scores(train, test, estimator="covariance")).all()
    assert choose(member_losses(train, test)).estimator.name == "covariance"


def test_auto_on_a_run_with_some_gaps() -> None:
    p = linear_problem(members=40, train=40, test=6)
    train, test = p.train.copy(), p.test.copy()
    train[[3, 7, 30], [5, 5, 9]] = np.nan
    test[4, 1] = np.nan
    whole, gaps = scores(p.train, p.test, p.inclusion), scores(train, test, p.inclusion)
    assert np.isfinite(gaps).all()
    assert np.corrcoef(whole.ravel(), gaps.ravel())[0, 1] > 0.98
    assert "held-out" in choose(member_losses(train, test, p.inclusion)).why


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_gap_gives_the_same_numbers_either_way(name: str) -> None:
    p = linear_problem(members=20, train=40, test=6)
    members = member_losses(p.train, p.test, p.inclusion)
    marked = type(members)(members.train_KN, members.test_KM, members.inclusion_KN, members.kept, False)
    whole, estimator, setting = slice(None), estimator_named(name), Setting(rho=0.2)
    plain, gaps = score_blocks(estimator, members, setting), score_blocks(estimator, marked, setting)
    assert type(plain) is not type(gaps)
    assert np.allclose(plain.block(whole, whole), gaps.block(whole, whole))
    assert np.allclose(plain.stderr_block(whole, whole), gaps.stderr_block(whole, whole))
