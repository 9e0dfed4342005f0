from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api.core import Setting, choose, group_scores, member_losses, ranked, scores, self_lds
from daunce_api.core.blocks import FactorBlocks, score_blocks
from daunce_api.core.choice import AMOUNT_UNTOLD, Choice
from daunce_api.core.estimators import estimator_named
from daunce_api.core.heldout import HeldOut
from daunce_api.core.quality import column_spearman
from daunce_api.core.selection import WHOLE, largest, prepare_points
from daunce_api.core.shrinkage import Shrinkage, directions, shrinkage_of
from daunce_api.core.spectrum import spectrum_of
from daunce_api.errors import ConfigurationError
from tests.core.problems import linear_problem, with_checkpoints

P = linear_problem(members=25, train=300, test=17)
MEMBERS = member_losses(P.train, P.test, P.inclusion)
FILTERS = ["covariance", "whitened", "half_whitened", "matched"]
SETTING = Setting(rho=0.2, ridge=0.7, shrinkage=3.0)
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


def lds_of(score: np.ndarray, inclusion: np.ndarray, loss: np.ndarray) -> float:
    return float(column_spearman(-(inclusion @ score), loss).mean())


def test_the_weight_is_z_squared_over_z_squared_plus_c() -> None:
    shrinkage = shrinkage_of(2.0, 9.0, np.array([4.0, 0.0]), np.array([1.0, 16.0]))
    # |a| = 2 and |b| = 1, 4 over 9 directions: chance is 2 / 3 and 8 / 3.
    score = np.array([[2 / 3, 16 / 3], [0.0, 0.0]])
    assert shrinkage.weight(score, ALL, ALL) == pytest.approx(np.array([[1 / 3, 4 / 6], [0, 0]]))
    assert shrinkage.shrunk(score, ALL, ALL) == pytest.approx(np.array([[2 / 9, 32 / 9], [0, 0]]))
    assert shrinkage.shrunk(np.array([16 / 3]), np.array([0]), np.array([1])) == pytest.approx([32 / 9])
    assert shrinkage.swapped().shrunk(score.T, ALL, ALL) == pytest.approx(shrinkage.shrunk(score, ALL, ALL).T)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(1, 50))
def test_scores_keep_their_sign_and_order_and_never_grow(seed: int, amount: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    score = np.sort(rng.standard_cauchy((1, 50)), axis=1)
    got = shrinkage_of(amount, spread, np.ones(1), np.ones(50)).shrunk(score, ALL, ALL)
    assert (np.abs(got) <= np.abs(score)).all()
    assert (got * score >= 0).all()
    assert (np.diff(got, axis=1) >= 0).all()


def test_chance_is_what_unrelated_vectors_make() -> None:
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 0.2, 40)
    a, b = rng.normal(size=(40, 3_000)) * scale[:, None], rng.normal(size=(40, 500)) * scale[:, None]
    assert directions(scale**2) < 25
    lengths = (a**2).sum(axis=0), (b**2).sum(axis=0)
    z = (a.T @ b) * np.sqrt(directions(scale**2)) / np.sqrt(lengths[0])[:, None] / np.sqrt(lengths[1])
    assert (z**2).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_blocks_are_scores_times_weights(name: str, checkpoints: bool) -> None:
    earlier = with_checkpoints(P, 2) if checkpoints else None
    members = member_losses(P.train, P.test, P.inclusion, earlier)
    plain = score_blocks(estimator_named(name), members, replace(SETTING, shrinkage=None))
    got = score_blocks(estimator_named(name), members, SETTING)
    score = plain.block(ALL, ALL)
    a, b = members.train_rows(), members.test_rows()
    found = spectrum_of(members, SETTING)
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
    assert got.block(ALL, ALL) == pytest.approx(score * weight, rel=1e-6, abs=1e-12)
    assert got.stderr_block(ALL, ALL) == pytest.approx(plain.stderr_block(ALL, ALL) * weight, rel=1e-6, abs=1e-12)
    part = got.block(slice(20, 90), slice(3, 8))
    assert part == pytest.approx(got.block(ALL, ALL)[20:90, 3:8])


@pytest.mark.parametrize("k", [5, 290])
@pytest.mark.parametrize("per", ["test", "train"])
@pytest.mark.parametrize("opponents", [False, True])
def test_the_largest_are_those_of_the_whole_matrix(k: int, per: str, opponents: bool) -> None:
    choice = Choice(estimator_named("whitened"), SETTING, "", "attribution")
    blocks = score_blocks(choice.estimator, MEMBERS, SETTING)
    table, error = blocks.block(ALL, ALL), blocks.stderr_block(ALL, ALL)
    if per == "test":
        table, error = table.T, error.T
    ranking = ranked(MEMBERS, choice, k, opponents=opponents, per=per)  # type: ignore[arg-type]
    size = min(k, table.shape[1])
    expected = np.sort(table, axis=1)[:, :size] if opponents else -np.sort(-table, axis=1)[:, :size]
    assert np.allclose(ranking.score_Mk, expected)
    assert np.allclose(np.take_along_axis(table, ranking.index_Mk, axis=1), expected)
    assert ranking.stderr_Mk is not None
    assert ranking.z_Mk is not None
    assert np.allclose(ranking.stderr_Mk, np.take_along_axis(error, ranking.index_Mk, axis=1))
    plain = score_blocks(choice.estimator, MEMBERS, replace(SETTING, shrinkage=None))
    z = plain.block(ALL, ALL) / plain.stderr_block(ALL, ALL)
    z = z.T if per == "test" else z
    assert np.allclose(ranking.z_Mk, np.take_along_axis(z, ranking.index_Mk, axis=1)), "weights say nothing of chance"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4_000), st.integers(1, 60), st.integers(1, 30), st.integers(0, 99))
def test_streamed_selection_is_exact_with_weights(n: int, m: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, queries = rng.standard_t(3, size=(6, n)), rng.normal(size=(6, m))
    k = min(k, n)
    shrinkage = Shrinkage(rng.random(n), rng.random(m))
    index, value = largest(prepare_points(points), queries, k, shrinkage)
    table = shrinkage.shrunk(points.T @ queries, ALL, ALL).T
    assert np.allclose(value, -np.sort(-table, axis=1)[:, :k])
    assert np.allclose(np.take_along_axis(table, index, axis=1), value)
    assert WHOLE * 30 < 4_000, "both ways are tried"


def brute_force_group_errors(name: str, row_of: np.ndarray, column_of: np.ndarray) -> np.ndarray:
    """Jackknife of group sums with weights and lambda held fixed."""
    plain = replace(SETTING, shrinkage=None)
    blocks = score_blocks(estimator_named(name), MEMBERS, SETTING)
    unweighted = score_blocks(estimator_named(name), MEMBERS, plain)
    weight = blocks.block(ALL, ALL) / unweighted.block(ALL, ALL)
    assert isinstance(unweighted, FactorBlocks)
    changes = unweighted.changes(np.arange(300), np.arange(17)) * weight
    rows, columns = (np.eye(of.max() + 1)[:, of] for of in (row_of, column_of))
    return np.sqrt(((rows @ changes @ columns.T) ** 2).sum(axis=0))


@pytest.mark.parametrize("pairs", [1, 100, 10**6])
@pytest.mark.parametrize("name", FILTERS)
def test_groups_sum_weighted_scores_and_their_errors(name: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daunce_api.core.complete._PAIRS", pairs)
    monkeypatch.setattr("daunce_api.core.complete._CHANGES", pairs)
    row_of, column_of = np.arange(300) * 7 % 11, np.arange(17) % 3
    blocks = score_blocks(estimator_named(name), MEMBERS, SETTING)
    score, error = blocks.group_block(row_of, column_of)
    rows, columns = (np.eye(of.max() + 1)[:, of] for of in (row_of, column_of))
    assert np.allclose(score, rows @ blocks.block(ALL, ALL) @ columns.T)
    assert np.allclose(error, brute_force_group_errors(name, row_of, column_of))
    single = blocks.group_block(np.arange(300), np.arange(17))
    assert np.allclose(single[1], blocks.stderr_block(ALL, ALL))
    assert np.allclose(blocks.group_block(np.arange(300), np.zeros(17, int))[0][:, 0], blocks.block(ALL, ALL).sum(1))


def test_gaps_do_not_change_what_pairs_without_them_have() -> None:
    test = P.test.copy()
    test[3, 4] = np.nan
    members = member_losses(P.train, test, P.inclusion)
    blocks = score_blocks(estimator_named("half_whitened"), members, SETTING)
    whole = score_blocks(estimator_named("half_whitened"), MEMBERS, SETTING).block(ALL, ALL)
    got = blocks.block(ALL, ALL)
    others = np.arange(17) != 4
    assert np.allclose(got[:, others], whole[:, others])
    assert np.corrcoef(got[:, 4], whole[:, 4])[0, 1] > 0.95
    row_of = np.arange(300) % 4
    score, error = blocks.group_block(row_of, np.zeros(17, int))
    assert np.allclose(score[:, 0], [got[row_of == g].sum() for g in range(4)])
    expected = brute_force_group_errors("half_whitened", row_of, np.zeros(17, int))
    assert error == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_held_out_members_are_predicted_with_weighted_scores(checkpoints: bool) -> None:
    earlier = with_checkpoints(P, 2) if checkpoints else None
    members = member_losses(P.train, P.test, P.inclusion, earlier)
    fit, held = np.arange(5, 25), np.arange(5)
    wanted = [
        (estimator_named(name), replace(SETTING, shrinkage=amount))
        for name in ("whitened", "half_whitened", "whitened")
        for amount in (3.0, 0.5, None)
    ]
    for (estimator, setting), got in zip(wanted, HeldOut(members).predict(wanted, fit, held), strict=True):
        score = score_blocks(estimator, members.rows(fit), setting).block(ALL, ALL)
        expected = -(P.inclusion[held] - P.inclusion[fit].mean(axis=0)) @ score
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_fewer_test_examples_are_judged_by_where_pairs_are_many() -> None:
    held = HeldOut(MEMBERS)
    assert held.some_tests(300 * 17, 2) is held
    part = held.some_tests(300 * 6, 2)
    assert np.array_equal(part.target_KM, P.test[:, ::3])
    candidate = [(estimator_named("whitened"), SETTING)]
    assert np.allclose(part.folded(candidate, 5)[0], held.folded(candidate, 5)[0][:, ::3])
    assert held.some_tests(1, 9).target_KM.shape == (25, 9)


def test_auto_shrinks_where_influence_is_sparse() -> None:
    train, test, inclusion, truth_inclusion, truth = sparse_problem(60)
    members = member_losses(train, test, inclusion)
    choice = choose(members)
    assert choice.setting.shrinkage is not None
    assert choice.setting.shrinkage >= 4
    assert "drawn towards zero" in choice.why
    shrunk = lds_of(scores(train, test, inclusion), truth_inclusion, truth)
    plain = score_blocks(choice.estimator, members, replace(choice.setting, shrinkage=None)).block(ALL, ALL)
    assert shrunk > lds_of(plain, truth_inclusion, truth) + 0.2
    assert self_lds(train, test, inclusion).value == pytest.approx(shrunk, abs=0.1)


def test_auto_leaves_scores_alone_where_influence_is_dense() -> None:
    dense = linear_problem(members=200, train=200, rank=6)
    amount = choose(member_losses(dense.train, dense.test, dense.inclusion)).setting.shrinkage
    assert amount is None or amount <= 1


def test_few_members_get_the_fixed_amount() -> None:
    train, test, inclusion, *_ = sparse_problem(12)
    choice = choose(member_losses(train, test, inclusion))
    assert choice.setting.shrinkage == AMOUNT_UNTOLD
    assert choice.why.endswith("(c = 4)")


def test_members_from_the_target_get_the_largest_amount_near_the_best() -> None:
    train, test, inclusion, *_ = sparse_problem(60)
    members = member_losses(train, test, inclusion)
    from_base, from_target = (choose(members, setting=Setting(rho=rho)).setting.shrinkage for rho in (None, 0.05))
    assert from_base is not None
    assert from_target is not None
    assert from_target >= from_base


def test_group_scores_of_auto_are_sums_of_its_scores() -> None:
    train, test, inclusion, *_ = sparse_problem(40)
    labels = [i % 5 for i in range(400)]
    got = group_scores(train, test, labels, inclusion_KN=inclusion)
    score = scores(train, test, inclusion)
    assert np.allclose(got.score_GH, [score[np.array(labels) == g].sum(axis=0) for g in range(5)])


@pytest.mark.parametrize("amount", [0.0, -1.0, float("nan")])
def test_an_amount_that_is_none_is_refused(amount: float) -> None:
    with pytest.raises(ConfigurationError, match="amount of shrinkage"):
        Setting(shrinkage=amount)
