from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api.core import (
    ESTIMATORS,
    Checkpoints,
    Setting,
    choose,
    confidence_interval,
    fit,
    member_losses,
    scores,
    significance_threshold,
)
from daunce_api.core.crossval import CrossValidator, folds
from daunce_api.core.rows import Stages
from daunce_api.errors import DataError
from tests.core.problems import group_scores, linear_problem, mean_correlation, self_lds, top, with_checkpoints

WHOLE = slice(None)
P = linear_problem(members=24, train=30, test=7)
STAGES = with_checkpoints(P, 2)


def _errors(
    train: np.ndarray, test: np.ndarray, inclusion: np.ndarray, earlier: Checkpoints | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    members = member_losses(train, test, inclusion, earlier=earlier, rho=0.3)
    blocks = fit(members, name, Setting(ridge=1.0))
    return blocks.block(), blocks.stderr_block()


def test_covariance_is_pooled_over_stages_by_hand() -> None:
    train, test = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [1.0], [4.0]])
    earlier = Checkpoints(np.array([[[5.0], [7.0], [np.nan]]]), np.array([[[3.0], [5.0], [1.0]]]))
    # Final: deviations (-2, 0, 2) and (-1, -1, 2), product 6, 2 degrees of freedom. Earlier, without the third member:
    # (-1, 1) and (-1, 1), product 2, 1 degree of freedom.
    assert scores(train, test, estimator="covariance", earlier=earlier)[0, 0] == pytest.approx(8 / 3)
    assert scores(train, test, estimator="correlation", earlier=earlier)[0, 0] == pytest.approx(8 / np.sqrt(10 * 8))
    included = np.array([[1], [0], [0]])
    # Inclusion's deviations: (2/3, -1/3, -1/3) and (1/2, -1/2); products -1 and -1.
    score = scores(train, test, included, "inclusion", earlier=earlier)
    assert score[0, 0] == pytest.approx(2 / 3)


def test_whitened_by_hand() -> None:
    train, test = np.array([[-1.0], [1.0]]), np.array([[-2.0], [2.0]])
    earlier = Checkpoints(np.array([[[2.0], [-2.0]]]), np.array([[[1.0], [-1.0]]]))
    # A = (2, -2, -1, 1), one direction, w = 10; A.B = 2 * 1 * 2 + 2 * 1 * 2 = 8; ridge = 10 / 4 rows.
    assert scores(train, test, estimator="whitened", earlier=earlier)[0, 0] == pytest.approx(8 / (10 + 10 / 4))


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
def test_no_earlier_checkpoint_changes_not_a_bit(name: str) -> None:
    problem = linear_problem(members=24, train=30, test=7)
    none = Checkpoints(np.empty((0, 24, 30)), np.empty((0, 24, 7)))
    plain = top(problem.train, problem.test, 5, name, inclusion_KN=problem.inclusion, rho=0.3)
    empty = top(problem.train, problem.test, 5, name, inclusion_KN=problem.inclusion, rho=0.3, earlier=none)
    for field in ("index_Mk", "score_Mk", "stderr_Mk", "z_Mk"):
        assert np.array_equal(getattr(plain, field), getattr(empty, field))
    assert self_lds(problem.train, problem.test, problem.inclusion, name, rho=0.3) == self_lds(
        problem.train, problem.test, problem.inclusion, name, rho=0.3, earlier=none
    )


@pytest.mark.parametrize("name", ["covariance", "correlation", "inclusion"])
def test_the_standard_error_leaves_out_whole_members(name: str) -> None:
    without = []
    for k in range(24):
        rest = np.arange(24) != k
        without.append(scores(P.train[rest], P.test[rest], P.inclusion[rest], name, earlier=STAGES.members(rest)))
    expected = np.sqrt(23 / 24 * ((without - np.mean(without, axis=0)) ** 2).sum(axis=0))
    assert np.allclose(_errors(P.train, P.test, P.inclusion, STAGES, name)[1], expected)


@pytest.mark.parametrize("examples", [30, 90])
@pytest.mark.parametrize("gaps", [False, True])
def test_the_jackknife_of_a_ridge_is_exact_too(examples: int, gaps: bool) -> None:
    rng = np.random.default_rng(0)  # 60 rows, more and fewer than examples
    train, test = rng.normal(size=(3, 20, examples)), rng.normal(size=(3, 20, 4))
    present = np.ones((3, 20), dtype=bool)
    if gaps:
        train[0, 3], present[0, 3] = np.nan, False
        test[1, 5, 2], present[1, 5] = np.nan, False

    def rows(loss: np.ndarray, keep: np.ndarray) -> np.ndarray:
        stages = [x[keep & p] for x, p in zip(loss, present, strict=True)]
        return np.concatenate([x - x.mean(axis=0) for x in stages])

    everyone = np.ones(20, dtype=bool)
    ridge = (rows(train, everyone) ** 2).sum() / present.sum()
    without = []
    for k in range(20):
        a, b = (rows(x, np.arange(20) != k) for x in (train, test))
        without.append(a.T @ np.linalg.solve(a @ a.T + ridge * np.eye(len(a)), b))
    expected = np.sqrt(19 / 20 * ((without - np.mean(without, axis=0)) ** 2).sum(axis=0))
    earlier = Checkpoints(train[:2], test[:2])
    assert np.allclose(_errors(train[2], test[2], np.eye(20, examples), earlier, "whitened")[1], expected)
    if not gaps:
        half = _errors(train[2], test[2], np.eye(20, examples), earlier, "half_whitened")[1]
        assert np.isfinite(half).all()


@pytest.mark.parametrize("name", ["covariance", "correlation", "inclusion", "whitened", "half_whitened"])
def test_intervals_cover_with_correlated_stages(name: str) -> None:
    """Stages of one member share its luck: rows taken for members would give intervals far too narrow."""
    size, drawn = 40, 75
    pool = linear_problem(members=size * drawn, train=40, test=10)
    rng = np.random.default_rng(0)
    train, test = (x + 0.3 * x.std() * rng.normal(size=x.shape) for x in (pool.train, pool.test))
    earlier = with_checkpoints(replace(pool, train=train, test=test), 2, luck=0.1)
    parts = [np.arange(i * size, (i + 1) * size) for i in range(drawn)]
    fitted = [_errors(train[p], test[p], pool.inclusion[p], earlier.members(p), name) for p in parts]
    score, error = (np.array(x) for x in zip(*fitted, strict=True))
    shrunk = error * np.sqrt(1 - 1 / drawn)  # the mean over ensembles stands for the truth
    low, high = confidence_interval(score, shrunk, size, correlation=name == "correlation")
    expected = score.mean(axis=0)
    assert 0.93 <= ((low < expected) & (expected < high)).mean() <= 0.97
    if name == "covariance":
        first = member_losses(train[parts[0]], test[parts[0]], None, earlier=earlier.members(parts[0]))
        blocks = fit(first, name)
        rows = Stages(np.ones((1, 3 * size), dtype=bool))  # the same rows as members of their own
        naive = replace(blocks, stages=rows).stderr_block()
        assert np.median(naive / error[0]) < 0.75


@pytest.mark.parametrize("name", ESTIMATORS)
def test_held_out_predictions_are_fitted_on_whole_members(name: str) -> None:
    members = member_losses(P.train, P.test, P.inclusion, earlier=STAGES, noise=0.01, rho=0.3)
    rest, held = np.arange(6, 24), np.arange(6)
    for use in (True, False):
        setting = Setting(ridge=0.5, checkpoints=use)
        got = CrossValidator(members).predict([(name, setting)], rest, held)[0]
        score = fit(members.members(rest), name, setting).block()
        expected = -(P.inclusion[held] - P.inclusion[rest].mean(axis=0)) @ score
        assert np.abs(got - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("setting", [Setting(ridge=0.5), Setting(ridge=0.5, shrinkage=2.0, checkpoints=False)])
def test_cross_validation_of_some_members_takes_parts_of_the_matrices_of_all(setting: Setting) -> None:
    """So nested choices cost no further pass over the training examples' Gram matrix."""
    members, some = member_losses(P.train, P.test, P.inclusion, earlier=STAGES, noise=0.01), np.arange(3, 24)
    part, fresh = CrossValidator(members).members(some), CrossValidator(members.members(some))
    assert np.allclose(part.spectrum().w, fresh.spectrum().w)
    assert np.allclose(part.explained(), fresh.explained())
    got, expected = (cv.folded([("whitened", setting)])[0] for cv in (part, fresh))
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["covariance", "whitened", "correlation"])
def test_no_fold_splits_a_member(name: str) -> None:
    """Whatever the held-out members' earlier rows hold, predictions for them stay what they were."""
    candidate = [(name, Setting(ridge=1.0))]
    plain = CrossValidator(member_losses(P.train, P.test, P.inclusion, earlier=STAGES)).folded(candidate)[0]
    for held, _ in folds(24)[:4]:
        train, test = STAGES.train_loss_SKN.copy(), STAGES.test_loss_SKM.copy()
        train[:, held], test[:, held] = 7.0, 1e3
        changed = CrossValidator(member_losses(P.train, P.test, P.inclusion, earlier=Checkpoints(train, test)))
        assert np.allclose(changed.folded(candidate)[0][held], plain[held])


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(list(ESTIMATORS)))
def test_members_may_come_in_any_order(seed: int, name: str) -> None:
    order = np.random.default_rng(seed).permutation(24)
    plain = _errors(P.train, P.test, P.inclusion, STAGES, name)
    moved = _errors(P.train[order], P.test[order], P.inclusion[order], STAGES.members(order), name)
    for one, other in zip(plain, moved, strict=True):
        assert np.allclose(one, other, rtol=1e-6, atol=1e-9 * np.abs(one).max())


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(list(ESTIMATORS)))
def test_what_all_members_share_at_a_stage_does_not_count(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(2, 1, 30)), rng.normal(size=(2, 1, 7))
    shifted = Checkpoints(STAGES.train_loss_SKN + level[0], STAGES.test_loss_SKM + level[1])
    for one, other in zip(
        _errors(P.train, P.test, P.inclusion, STAGES, name),
        _errors(P.train, P.test, P.inclusion, shifted, name),
        strict=True,
    ):
        assert np.allclose(one, other, rtol=1e-6, atol=1e-9 * np.abs(one).max())


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(list(ESTIMATORS)))
def test_a_stage_that_repeats_the_final_models_says_nothing_new(seed: int, name: str) -> None:
    repeated = Checkpoints(P.train[None], P.test[None])
    plain = _errors(P.train, P.test, P.inclusion, None, name)
    twice = _errors(P.train, P.test, P.inclusion, repeated, name)
    if name == "whitened":  # lambda counts against twice the eigenvalues
        assert np.corrcoef(plain[0].ravel(), twice[0].ravel())[0, 1] > 0.99
        return
    factor = np.sqrt(2) if name == "half_whitened" else 1.0
    pair = tuple(np.random.default_rng(seed).integers(0, (30, 7)))
    assert twice[0][pair] == pytest.approx(factor * plain[0][pair])
    if name == "covariance":  # (K - 1) / (K - 2) is taken over 2 (K - 1) degrees of freedom there
        assert twice[1][pair] == pytest.approx(plain[1][pair])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("per", ["test", "train"])
def test_top_is_the_sorted_scores_with_their_errors(name: str, per: Literal["test", "train"]) -> None:
    score = scores(P.train, P.test, P.inclusion, name, rho=0.2, earlier=STAGES)
    members = member_losses(P.train, P.test, P.inclusion, earlier=STAGES, rho=0.2)
    choice = choose(members, name)
    error = fit(members, choice.estimator.name, choice.setting).stderr_block()
    ranking = top(P.train, P.test, 5, name, inclusion_KN=P.inclusion, rho=0.2, per=per, earlier=STAGES)
    table, errors = (score.T, error.T) if per == "test" else (score, error)
    assert np.allclose(ranking.score_Mk, -np.sort(-table, axis=1)[:, :5])
    assert ranking.stderr_Mk is not None
    assert np.allclose(ranking.stderr_Mk, np.take_along_axis(errors, ranking.index_Mk, axis=1))
    assert ranking.members == 24, "degrees of freedom are those of members, not of rows"
    assert ranking.z_threshold == significance_threshold(24)


def test_groups_are_sums_with_their_own_errors() -> None:
    labels = [i % 3 for i in range(30)]
    grouped = group_scores(P.train, P.test, labels, estimator="covariance", earlier=STAGES)
    score = scores(P.train, P.test, estimator="covariance", earlier=STAGES)
    assert np.allclose(grouped.score_GH, [score[g::3].sum(axis=0) for g in range(3)])
    summed = Checkpoints(
        np.stack([STAGES.train_loss_SKN[:, :, g::3].sum(axis=2) for g in range(3)], axis=2), STAGES.test_loss_SKM
    )
    sums = np.stack([P.train[:, g::3].sum(axis=1) for g in range(3)], axis=1)
    assert np.allclose(grouped.stderr_GH, _errors(sums, P.test, P.inclusion[:, :3], summed, "covariance")[1])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_missing_checkpoint_leaves_out_that_stage_of_that_member(name: str) -> None:
    train, test = STAGES.train_loss_SKN.copy(), STAGES.test_loss_SKM.copy()
    train[0, 3, 11] = np.nan  # one loss is enough
    test[1, 5] = np.nan
    earlier = Checkpoints(train, test)
    members = member_losses(P.train, P.test, P.inclusion, earlier=earlier)
    present = np.ones((3, 24), dtype=bool)
    present[0, 3] = present[1, 5] = False
    assert np.array_equal(members.stages.present_TK, present)
    assert (members.stages.rows, members.stages.freedom) == (70, 67)
    rows = members.train_rows()
    assert not rows[[3, 24 + 5]].any()
    others = np.delete(STAGES.train_loss_SKN[0], 3, axis=0)
    assert np.allclose(rows[:24][np.arange(24) != 3], others - others.mean(axis=0))
    whole = _errors(P.train, P.test, P.inclusion, STAGES, name)
    gaps = _errors(P.train, P.test, P.inclusion, earlier, name)
    assert np.isfinite(gaps[0]).all()
    assert np.corrcoef(whole[0].ravel(), gaps[0].ravel())[0, 1] > 0.97
    assert np.corrcoef(whole[1].ravel(), gaps[1].ravel())[0, 1] > 0.9


def test_a_member_without_final_losses_goes_with_its_checkpoints() -> None:
    train = P.train.copy()
    train[2] = np.nan
    members = member_losses(train, P.test, P.inclusion, earlier=STAGES)
    rest = np.delete(np.arange(24), 2)
    assert np.array_equal(members.train[:2], STAGES.train_loss_SKN[:, rest])


def test_float32_stays_float32() -> None:
    train, test = (x.astype(np.float32) for x in (P.train, P.test))
    earlier = Checkpoints(STAGES.train_loss_SKN.astype(np.float32), STAGES.test_loss_SKM.astype(np.float32))
    for name in ESTIMATORS:
        score, error = _errors(train, test, P.inclusion, earlier, name)
        assert score.dtype == error.dtype == np.float32
        exact = _errors(P.train, P.test, P.inclusion, STAGES, name)
        assert np.abs(score - exact[0]).max() < 1e-3 * np.abs(exact[0]).max()


def test_auto_uses_checkpoints_that_help_and_leaves_out_those_that_do_not() -> None:
    rng = np.random.default_rng(4)
    problem = linear_problem(members=40, train=60, test=12)
    noisy = replace(problem, train=problem.train + 0.5 * problem.train.std() * rng.normal(size=problem.train.shape))
    helpful = with_checkpoints(problem, 2, luck=0.02)
    members = member_losses(noisy.train, noisy.test, noisy.inclusion, earlier=helpful)
    choice = choose(members)
    assert choice.setting.checkpoints
    assert "2 earlier checkpoints" in choice.why
    useless = Checkpoints(*(20 * x.std() * rng.normal(size=(2, *x.shape)) for x in (noisy.train, noisy.test)))
    members = member_losses(noisy.train, noisy.test, noisy.inclusion, earlier=useless)
    choice = choose(members)
    assert not choice.setting.checkpoints
    assert "without the losses at earlier checkpoints" in choice.why
    score = scores(noisy.train, noisy.test, noisy.inclusion, earlier=useless)
    assert np.array_equal(score, scores(noisy.train, noisy.test, noisy.inclusion))
    few = choose(members.members(np.arange(19)))
    assert few.setting.checkpoints, "too few members to ask"
    assert "2 earlier checkpoints" in few.why


def test_better_scores_and_a_better_self_lds() -> None:
    problem = linear_problem(members=24, train=200, test=20, rank=40)
    rng = np.random.default_rng(5)
    gradients = np.linspace(0.2, 1, 3)[:, None, None]
    luck = [0.4 * x.std() * rng.normal(size=(3, *x.shape)) for x in (problem.train, problem.test)]
    exact = (problem.train, problem.test)
    train, test = (gradients * (x - x.mean(axis=0)) + e for x, e in zip(exact, luck, strict=True))
    earlier = Checkpoints(train[:2], test[:2])

    def quality(score: np.ndarray) -> float:
        return mean_correlation(score, problem.influence)

    without = scores(train[2], test[2], problem.inclusion, "covariance")
    assert quality(scores(train[2], test[2], problem.inclusion, "covariance", earlier=earlier)) > quality(without)
    assert (
        self_lds(train[2], test[2], problem.inclusion, "covariance", earlier=earlier).raw
        > self_lds(train[2], test[2], problem.inclusion, "covariance").raw
    )


def test_margins_are_not_put_on_a_log_scale() -> None:
    members = member_losses(P.train, P.test - 30, P.inclusion)
    assert choose(members).setting.log_offset is None
    assert choose(members.members(np.arange(10))).setting.log_offset is None
    assert (
        choose(member_losses(P.train, P.test + 30, P.inclusion).members(np.arange(10))).setting.log_offset is not None
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [((2, 24, 30), (1, 24, 7)), ((24, 30), (24, 7)), ((2, 23, 30), (2, 23, 7)), ((2, 24, 29), (2, 24, 7))],
)
def test_shapes_that_do_not_belong_together_are_refused(train: tuple[int, ...], test: tuple[int, ...]) -> None:
    with pytest.raises(DataError):
        scores(P.train, P.test, earlier=Checkpoints(np.ones(train), np.ones(test)))


def test_infinite_losses_at_a_checkpoint_are_refused() -> None:
    train = STAGES.train_loss_SKN.copy()
    train[1, 2, 3] = np.inf
    with pytest.raises(DataError, match="Checkpoint 1 of member 2"):
        scores(P.train, P.test, earlier=Checkpoints(train, STAGES.test_loss_SKM))
