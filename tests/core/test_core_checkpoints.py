from __future__ import annotations

import numpy as np
import pytest

from daunce_api.core import (
    ESTIMATORS,
    Checkpoints,
    Setting,
    member_losses,
    scores,
    self_lds,
    top,
)
from daunce_api.core.blocks import score_blocks
from daunce_api.core.estimators import estimator_named
from tests.core.problems import linear_problem, with_checkpoints

WHOLE = slice(None)
P = linear_problem(members=24, train=30, test=7)
STAGES = with_checkpoints(P, 2)


def _errors(
    train: np.ndarray, test: np.ndarray, inclusion: np.ndarray, earlier: Checkpoints | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    members = member_losses(train, test, inclusion, earlier)
    blocks = score_blocks(estimator_named(name), members, Setting(rho=0.3, ridge=1.0))
    return blocks.block(WHOLE, WHOLE), blocks.stderr_block(WHOLE, WHOLE)


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
