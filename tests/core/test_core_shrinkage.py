from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daunce_api import core
from daunce_api.core import Scores, Setting, choose, fit, member_losses, scores
from daunce_api.core.choice import FIXED_AMOUNT, RIDGES, Choice
from daunce_api.core.crossval import CrossValidator, column_spearman
from daunce_api.core.estimators import estimator_named, spectrum_of
from daunce_api.core.groups import group_sums
from daunce_api.core.pairs import Shrinkage
from daunce_api.core.rows import Stages
from daunce_api.core.topk import _largest
from tests.core.problems import group_scores, linear_problem, self_lds, with_checkpoints

P = linear_problem(members=25, train=300, test=17)
MEMBERS = member_losses(P.train, P.test, P.inclusion, rho=0.2)
FILTERS = ["covariance", "whitened", "half_whitened"]
SETTING = Setting(ridge=0.7, shrinkage=3.0)
ALL = slice(None)


def sparse_problem(members: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Every test example depends on 4 of 400 training examples, which depend on nothing but themselves."""
    rng = np.random.default_rng(seed)
    influence = np.zeros((400, 60))
    for j in range(60):
        influence[rng.choice(400, 4, replace=False), j] = 1 + rng.random(4)
    inclusion = rng.random((members + 100, 400)) < 0.5
    train = 2 - 1.0 * inclusion + 0.3 * rng.normal(size=inclusion.shape)
    test = 5 - inclusion @ influence + 0.3 * rng.normal(size=(len(inclusion), 60))
    return train[:members], test[:members], inclusion[:members], inclusion[members:], test[members:]


def plain_scores(points_Rn: np.ndarray, queries_Rm: np.ndarray, shrinkage: Shrinkage | None) -> Scores:
    kept = np.arange(points_Rn.shape[1]), np.arange(queries_Rm.shape[1])
    one = Stages(np.ones((1, len(points_Rn)), dtype=bool))
    shape = (kept[0].size, kept[1].size)
    return Scores(points_Rn, queries_Rm, queries_Rm, tuple, one, *kept, shape, shrinkage=shrinkage)


def lds_of(score: np.ndarray, inclusion: np.ndarray, loss: np.ndarray) -> float:
    return float(column_spearman(-(inclusion @ score), loss).mean())


def test_the_weight_is_z_squared_over_z_squared_plus_c() -> None:
    shrinkage = Shrinkage.of(2.0, np.ones(9), np.array([4.0, 0.0]), np.array([1.0, 16.0]))
    # |a| = 2 and |b| = 1, 4 over 9 directions: chance is 2 / 3 and 8 / 3.
    score = np.array([[2 / 3, 16 / 3], [0.0, 0.0]])
    assert shrinkage.weight(score, ALL, ALL) == pytest.approx(np.array([[1 / 3, 4 / 6], [0, 0]]))
    assert shrinkage.weight(np.array([16 / 3]), np.array([0]), np.array([1])) == pytest.approx([4 / 6])


def test_sums_of_chance_have_the_spread_that_is_said() -> None:
    rng = np.random.default_rng(0)
    chance = rng.normal(size=(1, 2_000_000))
    for amount, mean in ((1e4, 0.0), (1e-4, 0.0), (4.0, 8.0)):
        shrinkage = Shrinkage.of(amount, np.ones(1), np.ones(1), np.ones(chance.size))
        score = chance + mean
        said = np.sqrt((shrinkage.slope(score, ALL, ALL) ** 2).mean())
        assert said == pytest.approx((score * shrinkage.weight(score, ALL, ALL)).std(), rel=0.15)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(1, 50))
def test_scores_keep_their_sign_and_order_and_never_grow(seed: int, amount: float, spread: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.sort(rng.standard_cauchy((1, 50)), axis=1)
    got = score * Shrinkage.of(amount, np.ones(spread), np.ones(1), np.ones(50)).weight(score, ALL, ALL)
    assert (np.abs(got) <= np.abs(score)).all()
    assert (got * score >= 0).all()
    assert (np.diff(got, axis=1) >= 0).all()


def test_chance_is_what_unrelated_vectors_make() -> None:
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 0.2, 40)
    a, b = rng.normal(size=(40, 3_000)) * scale[:, None], rng.normal(size=(40, 500)) * scale[:, None]
    directions = (scale**2).sum() ** 2 / (scale**4).sum()
    assert directions < 25
    lengths = (a**2).sum(axis=0), (b**2).sum(axis=0)
    z = (a.T @ b) * np.sqrt(directions) / np.sqrt(lengths[0])[:, None] / np.sqrt(lengths[1])
    assert (z**2).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_blocks_are_scores_times_weights(name: str, checkpoints: bool) -> None:
    earlier = with_checkpoints(P, 2) if checkpoints else None
    members = member_losses(P.train, P.test, P.inclusion, earlier=earlier, rho=0.2)
    plain = fit(members, name, replace(SETTING, shrinkage=None))
    got = fit(members, name, SETTING)
    score = plain.block()
    a, b = members.train_rows(), members.stages.centre(np.concatenate(members.test))
    found = spectrum_of(members)
    apply = estimator_named(name).filter
    assert apply is not None
    phi = apply(found, SETTING)
    kernel = (found.u_RD * phi) @ found.u_RD.T
    p = found.w * phi
    z = (
        score
        / np.sqrt(np.einsum("rn,rs,sn->n", a, kernel, a))[:, None]
        / np.sqrt(np.einsum("rm,rs,sm->m", b, kernel, b))
    )
    z *= p.sum() / np.sqrt((p**2).sum())
    weight = z**2 / (z**2 + 3)
    assert got.block() == pytest.approx(score * weight, rel=1e-6, abs=1e-12)
    assert got.stderr_block() == pytest.approx(plain.stderr_block() * weight, rel=1e-6, abs=1e-12)
    part = got.block(slice(20, 90))
    assert part == pytest.approx(got.block()[20:90])


@pytest.mark.parametrize("k", [5, 290])
@pytest.mark.parametrize("per", ["test", "train"])
@pytest.mark.parametrize("opponents", [False, True])
def test_the_largest_are_those_of_the_whole_matrix(k: int, per: str, opponents: bool) -> None:
    choice = Choice(estimator_named("whitened"), SETTING, "", "attribution")
    blocks = fit(MEMBERS, "whitened", SETTING)
    table, error = blocks.block(), blocks.stderr_block()
    if per == "test":
        table, error = table.T, error.T
    ranking = core.top(MEMBERS, choice, k, opponents=opponents, per=per)  # type: ignore[arg-type]
    size = min(k, table.shape[1])
    expected = np.sort(table, axis=1)[:, :size] if opponents else -np.sort(-table, axis=1)[:, :size]
    assert np.allclose(ranking.score_Mk, expected)
    assert np.allclose(np.take_along_axis(table, ranking.index_Mk, axis=1), expected)
    assert ranking.stderr_Mk is not None
    assert ranking.z_Mk is not None
    assert np.allclose(ranking.stderr_Mk, np.take_along_axis(error, ranking.index_Mk, axis=1))
    plain = fit(MEMBERS, "whitened", replace(SETTING, shrinkage=None))
    z = plain.block() / plain.stderr_block()
    z = z.T if per == "test" else z
    assert np.allclose(ranking.z_Mk, np.take_along_axis(z, ranking.index_Mk, axis=1)), "weights say nothing of chance"


@settings(max_examples=40)
@given(st.integers(1, 4_000), st.integers(1, 60), st.integers(1, 30), st.integers(0, 99), st.just(6))
@example(20_000, 30, 40, 1, 12)
@example(20_000, 30, 40, 2, 3)
def test_streamed_selection_is_exact_with_weights(n: int, m: int, k: int, seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    points, queries = rng.standard_t(3, size=(width, n)), rng.normal(size=(width, m))
    k = min(k, n)
    amount, (left, right) = rng.choice([0.5, 4.0]), (np.square(x).sum(axis=0) for x in (points, queries))
    shrinkage = Shrinkage.of(amount, np.ones(width), left, right)
    scored = plain_scores(points, queries, shrinkage)
    index, value = _largest(scored, k)
    table = scored.block().T
    assert np.allclose(value, -np.sort(-table, axis=1)[:, :k])
    assert np.allclose(np.take_along_axis(table, index, axis=1), value)
    longest = np.multiply.outer(*shrinkage.lengths())
    assert (scored.block() <= longest * (1 + 1e-9)).all(), "the bound by which rows are skipped"


def brute_force_group_errors(name: str, row_of: np.ndarray, column_of: np.ndarray) -> np.ndarray:
    """Jackknife of group sums: each pair's change before weights, times what that makes of the weighted score."""
    plain = replace(SETTING, shrinkage=None)
    blocks = fit(MEMBERS, name, SETTING)
    unweighted = fit(MEMBERS, name, plain)
    weight = blocks.block() / unweighted.block()
    slope = weight * (np.sqrt(5) - (np.sqrt(5) - 1) * weight)
    lefts, rights = (
        unweighted.stages.by_member(np.concatenate([getattr(t, side)(x) for t in unweighted.terms]))
        for side, x in (("left", unweighted.left_RN), ("right", unweighted.tests_RM))
    )
    changes = lefts.swapaxes(1, 2) @ rights
    changes = (changes - changes.mean(axis=0)) * np.sqrt(1 - 1 / len(changes)) * slope
    rows, columns = (np.eye(of.max() + 1)[:, of] for of in (row_of, column_of))
    return np.sqrt(((rows @ changes @ columns.T) ** 2).sum(axis=0))


@pytest.mark.parametrize("pairs", [1, 100, 10**6])
@pytest.mark.parametrize("name", FILTERS)
def test_groups_sum_weighted_scores_and_their_errors(name: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daunce_api.core.groups._PAIRS", pairs)
    monkeypatch.setattr("daunce_api.core.groups._CHANGES", pairs)
    row_of, column_of = np.arange(300) * 7 % 11, np.arange(17) % 3
    blocks = fit(MEMBERS, name, SETTING)
    score, error = group_sums(blocks, row_of, column_of)
    rows, columns = (np.eye(of.max() + 1)[:, of] for of in (row_of, column_of))
    assert np.allclose(score, rows @ blocks.block() @ columns.T)
    assert np.allclose(error, brute_force_group_errors(name, row_of, column_of))
    single = group_sums(blocks, np.arange(300), np.arange(17))
    assert np.allclose(single[1], blocks.stderr_block())
    assert np.allclose(group_sums(blocks, np.arange(300), np.zeros(17, int))[0][:, 0], blocks.block().sum(1))


@pytest.mark.parametrize("checkpoints", [False, True])
def test_held_out_members_are_predicted_with_weighted_scores(checkpoints: bool) -> None:
    earlier = with_checkpoints(P, 2) if checkpoints else None
    members = member_losses(P.train, P.test, P.inclusion, earlier=earlier, rho=0.2)
    rest, held = np.arange(5, 25), np.arange(5)
    wanted = [
        (name, replace(SETTING, shrinkage=amount))
        for name in ("whitened", "half_whitened", "whitened")
        for amount in (3.0, 0.5, None)
    ]
    for (name, setting), got in zip(wanted, CrossValidator(members).predict(wanted, rest, held), strict=True):
        score = fit(members.members(rest), name, setting).block()
        expected = -(P.inclusion[held] - P.inclusion[rest].mean(axis=0)) @ score
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_fewer_test_examples_are_judged_by_where_pairs_are_many() -> None:
    held = CrossValidator(MEMBERS)
    assert held.some_tests(300 * 17, 2) is held
    part = held.some_tests(300 * 6, 2)
    assert np.array_equal(part.target_KM, P.test[:, ::3])
    candidate = [("whitened", SETTING)]
    assert np.allclose(part.folded(candidate)[0], held.folded(candidate)[0][:, ::3], atol=1e-6)
    assert held.some_tests(1, 9).target_KM.shape == (25, 9)


def test_auto_shrinks_where_influence_is_sparse() -> None:
    train, test, inclusion, truth_inclusion, truth = sparse_problem(60)
    members = member_losses(train, test, inclusion)
    choice = choose(members)
    assert choice.setting.shrinkage is not None
    assert choice.setting.shrinkage >= 4
    assert "shrunk towards zero" in choice.why
    shrunk = lds_of(scores(train, test, inclusion), truth_inclusion, truth)
    plain = fit(members, choice.estimator.name, replace(choice.setting, shrinkage=None)).block()
    assert shrunk > lds_of(plain, truth_inclusion, truth) + 0.2
    assert self_lds(train, test, inclusion).value == pytest.approx(shrunk, abs=0.1)


def test_auto_leaves_scores_alone_where_influence_is_dense() -> None:
    dense = linear_problem(members=200, train=200, rank=6)
    amount = choose(member_losses(dense.train, dense.test, dense.inclusion)).setting.shrinkage
    assert amount is None or amount <= 1


def test_few_members_get_the_fixed_amount() -> None:
    train, test, inclusion, *_ = sparse_problem(12)
    choice = choose(member_losses(train, test, inclusion))
    assert choice.setting.shrinkage == FIXED_AMOUNT
    assert choice.why.endswith("(c = 4)")


def test_members_from_the_target_get_the_largest_amount_near_the_best() -> None:
    train, test, inclusion, *_ = sparse_problem(60)
    from_base, from_target = (
        choose(member_losses(train, test, inclusion, rho=rho)).setting.shrinkage for rho in ("base", 0.05)
    )
    assert from_base is not None
    assert from_target is not None
    assert from_target >= from_base


def test_group_scores_of_auto_are_sums_of_its_scores() -> None:
    train, test, inclusion, *_ = sparse_problem(40)
    labels = [i % 5 for i in range(400)]
    got = group_scores(train, test, labels, inclusion_KN=inclusion)
    score = scores(train, test, inclusion)
    assert np.allclose(got.score_GH, [score[np.array(labels) == g].sum(axis=0) for g in range(5)])


def test_the_filter_is_chosen_again_with_the_amount() -> None:
    train, test, inclusion, *_ = sparse_problem(60, seed=2)
    members = member_losses(train, test, inclusion)
    choice = choose(members)
    held = CrossValidator(members)

    def judged(ridge: float, amount: float | None) -> float:
        candidate = "whitened", replace(choice.setting, ridge=ridge, shrinkage=amount)
        return float(column_spearman(held.folded([candidate])[0], held.target_KM).mean())

    plain, weighted = (max(RIDGES, key=lambda r: judged(r, amount)) for amount in (None, choice.setting.shrinkage))
    assert plain < weighted == choice.setting.ridge


def test_members_from_the_target_are_drawn_where_held_out_members_are_for_leaving_it() -> None:
    rng = np.random.default_rng(0)
    scale = np.geomspace(3, 0.1, 15)
    g, t = (rng.standard_t(2.5, size=(n, 15)) * scale for n in (200, 30))
    inclusion = rng.random((40, 200)) < 0.5
    moved = -(inclusion - 0.5) @ g / 200
    train, test = (x + 0.02 * rng.normal(size=x.shape) for x in (moved @ g.T, moved @ t.T))
    assert choose(member_losses(train, test, inclusion)).setting.shrinkage is None
    assert choose(member_losses(train, test, inclusion, rho=0.05)).setting.shrinkage == 0.5


def test_few_members_from_the_target_with_checkpoints_are_whitened_more() -> None:
    few = linear_problem(members=12)
    earlier = with_checkpoints(few, 2)

    def ridge(**known: Any) -> float | None:
        return choose(member_losses(few.train, few.test, few.inclusion, **known)).setting.ridge

    assert ridge(earlier=earlier, rho=0.1) == 0.1
    assert ridge(earlier=earlier, rho=0.1, noise=0.01) == 0.3
    assert ridge(rho=0.1) == 0.3
    assert ridge(earlier=earlier) == 1.0


def test_of_scales_that_are_as_good_the_one_nearest_to_the_margin_is_taken() -> None:
    problem = linear_problem(members=40, seed=0)
    rng = np.random.default_rng(0)
    test = 1 + 0.15 * (problem.test - 1) + 0.01 * rng.normal(size=problem.test.shape)
    members = member_losses(problem.train, test, problem.inclusion)
    held = CrossValidator(members)

    def judged(offset: float) -> float:
        candidates = [("whitened", Setting(ridge=ridge, log_offset=offset)) for ridge in RIDGES]
        predicted = held.folded(candidates)
        return max(float(column_spearman(x, held.target_KM).mean()) for x in predicted)

    values = [judged(offset) for offset in (0.01, 0.11, 1.01)]
    assert 0.99 * max(values) <= values[0] < max(values)
    assert choose(members).setting.log_offset == 0.01
