"""What may be missing is dropped once, before anything is computed; every other gap is refused."""

from __future__ import annotations

import numpy as np
import pytest

from daunce_api.core import ESTIMATORS, member_losses, scores
from daunce_api.errors import DataError
from tests.core.problems import group_scores, linear_problem, self_lds, top

P = linear_problem(members=26, train=30, test=6)
KNOWN = {"noise": 1e-3, "rho": 0.2}


def with_holes() -> tuple[np.ndarray, np.ndarray]:
    train, test = P.train.copy(), P.test.copy()
    train[:, [0, 7]] = np.nan
    test[:, 2] = np.nan
    return train, test


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
@pytest.mark.filterwarnings("error")
def test_examples_without_a_loss_are_set_aside(name: str) -> None:
    train, test = with_holes()
    rows, columns = np.delete(np.arange(30), [0, 7]), np.delete(np.arange(6), 2)
    score = scores(train, test, P.inclusion, name, **KNOWN)
    alone = train[:, rows], test[:, columns]
    known = {"noise": 1e-3, "rho": 0.2}
    assert np.allclose(score[np.ix_(rows, columns)], scores(*alone, P.inclusion[:, rows], name, **known))
    assert np.isnan(score[0]).all()
    assert np.isnan(score[:, 2]).all()
    for per in ("test", "train"):
        ranking = top(train, test, 50, name, inclusion_KN=P.inclusion, per=per, **KNOWN)
        table = score.T if per == "test" else score
        assert ranking.index_Mk.shape == table.shape
        assert ranking.stderr_Mk is not None
        for j, (index, value, error) in enumerate(
            zip(ranking.index_Mk, ranking.score_Mk, ranking.stderr_Mk, strict=True)
        ):
            seen = np.isfinite(table[j])
            assert np.array_equal(index >= 0, np.arange(index.size) < seen.sum())
            assert np.allclose(value[index >= 0], table[j][index[index >= 0]])
            assert np.isnan(error[index < 0]).all()
    own = self_lds(*alone, P.inclusion[:, rows], name, **known)
    assert self_lds(train, test, P.inclusion, name, **KNOWN).value == pytest.approx(own.value)


def test_an_answer_that_nobody_has_a_loss_of_has_no_ranking() -> None:
    train, test = with_holes()
    ranking = top(train, test, 3, inclusion_KN=P.inclusion)
    assert (ranking.index_Mk[2] == -1).all()
    assert np.isnan(ranking.score_Mk[2]).all()
    only = member_losses(train, test, P.inclusion).tests([2])
    assert (only.kept_M.size, only.shape) == (0, (30, 1))


@pytest.mark.parametrize(("side", "words"), [(0, "1 training examples"), (1, "1 test examples")])
def test_an_example_that_some_members_have_is_a_call_of_its_own(side: int, words: str) -> None:
    losses = [P.train.copy(), P.test.copy()]
    losses[side][4, 1] = np.nan
    with pytest.raises(DataError, match=words + ".*number 1.*a call of its own"):
        scores(*losses, P.inclusion)
    losses[side][5:, 1] = np.nan
    with pytest.raises(DataError, match="some members only"):
        top(*losses, 3, inclusion_KN=P.inclusion)
    losses[side][:, 1] = np.nan
    assert np.isfinite(group_scores(*losses, [0] * 30, [0] * 6, inclusion_KN=P.inclusion).score_GH).all()


def test_two_members_are_enough_for_auto() -> None:
    assert np.isfinite(scores(P.train[:2], P.test[:2], P.inclusion[:2])).all()


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), "short"])
def test_a_rho_that_cannot_be_is_refused(rho: object) -> None:
    with pytest.raises(Exception, match="rho is a positive ratio"):
        member_losses(P.train, P.test, P.inclusion, rho=rho)  # type: ignore[arg-type]
