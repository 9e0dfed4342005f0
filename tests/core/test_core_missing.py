from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from daunce_api.core import ESTIMATORS, choose, estimators, incomplete, member_losses, ranked, scores, self_lds, top
from daunce_api.core.blocks import score_blocks
from daunce_api.core.estimators import estimator_named
from daunce_api.core.incomplete import few_patterns
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


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
@pytest.mark.filterwarnings("error")
def test_examples_without_a_loss_are_set_aside(name: str) -> None:
    p = linear_problem(members=24, train=40, test=6)
    train, test, noise = p.train.copy(), p.test.copy(), np.linspace(1e-3, 2e-3, 40)
    train[:, [5, 30]] = test[:, 1] = np.nan
    seen, asked = np.isfinite(train).all(axis=0), np.isfinite(test).all(axis=0)
    apart = train[:, seen], test[:, asked], p.inclusion[:, seen]
    score = scores(train, test, p.inclusion, name, noise=noise, rho=0.2)
    assert np.isnan(score[~seen]).all()
    assert np.isnan(score[:, 1]).all()
    assert np.array_equal(score[np.ix_(seen, asked)], scores(*apart, estimator=name, noise=noise[seen], rho=0.2)), (
        "to the same bits"
    )
    for per, many in (("test", 40), ("train", 6)):
        options = {"per": per, "fdr": 0.1, "rho": 0.2}
        got = top(train, test, 40, name, inclusion_KN=p.inclusion, noise=noise, **options)  # type: ignore[arg-type]
        rest = top(*apart[:2], 40, name, inclusion_KN=apart[2], noise=noise[seen], **options)  # type: ignore[arg-type]
        points, queries = (seen, asked) if per == "test" else (asked, seen)
        assert got.index_Mk.shape[1] == many
        assert (got.index_Mk[~queries] == -1).all()
        width = rest.index_Mk.shape[1]
        assert np.array_equal(got.index_Mk[queries, :width], np.flatnonzero(points)[rest.index_Mk])
        assert (got.index_Mk[:, width:] == -1).all()
        assert got.z_threshold == rest.z_threshold
        for side in ("score_Mk", "stderr_Mk", "z_Mk", "distinguishable_Mk"):
            assert np.array_equal(getattr(got, side)[queries, :width], getattr(rest, side), equal_nan=True)
    whole, part = (
        self_lds(*x, noise=y, rho=0.2) for x, y in (((train, test, p.inclusion), noise), (apart, noise[seen]))
    )
    assert whole == part


def test_a_block_knows_where_examples_without_a_loss_belong() -> None:
    train, test, _ = _with_gaps()
    train[:, [0, 12]] = test[:, 3] = np.nan
    blocks = score_blocks(estimator_named("covariance"), member_losses(train, test), Setting())
    whole = slice(None)
    for of in (blocks.block, blocks.stderr_block, blocks.count_block):
        everything = of(whole, whole)
        pieces = [of(slice(i, i + 7), slice(1, 5)) for i in range(0, 40, 7)]
        assert np.array_equal(np.concatenate(pieces), everything[:, 1:5], equal_nan=True)


def test_all_test_examples_of_a_ranking_may_lack_losses() -> None:
    train, test, inclusion = _with_gaps()
    test[:, 3] = np.nan
    members = member_losses(train, test, inclusion)
    found = ranked(members.columns(test=[3]), choose(members, "covariance"), 4)
    assert (found.index_Mk == -1).all()
    assert found.index_Mk.shape == (1, 4)


def test_noise_of_another_number_of_examples_is_refused() -> None:
    train, test, inclusion = _with_gaps()
    train[:, 0] = np.nan
    for noise in (np.full(39, 0.1), np.full(41, 0.1)):
        with pytest.raises(DataError, match="40 examples"):
            scores(train, test, inclusion, "half_whitened", noise=noise)


def test_patterns_keep_no_copy_of_the_losses() -> None:
    p = linear_problem(members=20, train=20_000, test=30)
    train, test = p.train.copy(), p.test.copy()
    for k in range(9):
        train[k, k] = test[k, k] = np.nan
    members = member_losses(train, test, p.inclusion)
    tracemalloc.start()
    blocks = score_blocks(estimator_named("half_whitened"), members, Setting())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert blocks.shape == (20_000, 30)
    assert kept < train.nbytes / 2, "100 pairs of patterns"
    assert peak < 10 * train.nbytes


def test_patterns_are_capped_by_what_their_eigenvectors_take(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, inclusion = _with_gaps()
    members = member_losses(train, test, inclusion)
    monkeypatch.setattr(incomplete, "PATTERN_BYTES", 8 * 19**2 * 5)  # there are six pairs
    assert not few_patterns(members)
    with pytest.raises(DataError, match="3 different patterns of training and 2 of test"):
        scores(train, test, estimator="half_whitened")
    monkeypatch.setattr(incomplete, "PATTERN_BYTES", 8 * 19**2 * 6)
    assert few_patterns(members)


@pytest.mark.parametrize("kept", [0, 4, 6])
def test_what_errors_need_is_computed_once_while_there_is_room(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, _ = _with_gaps()
    members, whole = member_losses(train, test), slice(None)
    expected = score_blocks(estimator_named("half_whitened"), members, Setting()).stderr_block(whole, whole)
    computed = []
    true = estimators.filter_terms
    monkeypatch.setattr(estimators, "filter_terms", lambda *a: (computed.append(1), true(*a))[1])
    monkeypatch.setattr(incomplete, "MOST_MATRICES", incomplete.PATTERN_BYTES / 8 / 19**2 / (kept + 0.5))
    blocks = score_blocks(estimator_named("half_whitened"), members, Setting())
    for _ in range(3):
        assert np.allclose(blocks.stderr_block(whole, whole), expected)
    assert len(computed) == kept + 3 * (6 - kept)
