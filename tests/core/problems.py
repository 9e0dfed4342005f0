"""Linear problems with a known answer, shared by the core's tests."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from daunce_api import core
from daunce_api.core import Checkpoints, GroupScores, Question, Ranking, SelfLDS


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """Members of a model that is exactly linear: loss change = gradient . parameter change.

    A member on subset D_k moves by ``-sum_i (m_i - r) g_i``-shaped steps, so the influence of example i on test j is
    g_i . R g_j.
    """

    train: np.ndarray
    test: np.ndarray
    inclusion: np.ndarray
    influence: np.ndarray


def linear_problem(
    members: int = 60, train: int = 200, test: int = 30, rank: int = 12, response: str = "damped", seed: int = 0
) -> LinearProblem:
    """Members of ratio 1/2 whose response is ``damped`` (1 / (f + d)) or ``flat`` (a constant)."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(3, 0.3, rank)
    g, t = rng.normal(size=(train, rank)) * scale, rng.normal(size=(test, rank)) * scale
    values, vectors = np.linalg.eigh(g.T @ g / train)
    shape = 1 / (values + 0.5) if response == "damped" else np.full(rank, 0.1)
    r = vectors @ np.diag(shape) @ vectors.T
    target = vectors @ np.diag(1 / (values + 0.5)) @ vectors.T
    inclusion = rng.random((members, train)) < 0.5
    moved = -(inclusion - 0.5) @ g @ r / (0.5 * train)
    return LinearProblem(2 + moved @ g.T, 1 + moved @ t.T, inclusion, g @ target @ t.T / train)


def mean_correlation(score: np.ndarray, truth: np.ndarray) -> float:
    """Mean over test examples of the correlation of scores with the true influence."""
    return float(np.mean([np.corrcoef(score[:, j], truth[:, j])[0, 1] for j in range(truth.shape[1])]))


def with_checkpoints(problem: LinearProblem, count: int, luck: float = 0.05, seed: int = 1) -> Checkpoints:
    """Earlier checkpoints of the same members: a share of the way, at a higher mean loss, with luck of their own."""
    rng = np.random.default_rng(seed)
    sides = []
    for final in (problem.train, problem.test):
        stages = [
            (1 + share) * final.mean(axis=0)
            + share * (final - final.mean(axis=0))
            + luck * final.std() * rng.normal(size=final.shape)
            for share in np.arange(1, count + 1) / (count + 1)
        ]
        sides.append(np.stack(stages))
    return Checkpoints(*sides)


def top(
    train_loss_KN: Any,
    test_loss_KM: Any,
    k: int,
    estimator: str = "auto",
    *,
    question: Question = "attribution",
    stderr: bool = True,
    opponents: bool = False,
    per: Any = "test",
    fdr: float | None = None,
    **known: Any,
) -> Ranking:
    """`core.top` of loss matrices."""
    losses = core.member_losses(train_loss_KN, test_loss_KM, **known)
    choice = core.choose(losses, estimator, question)
    return core.top(losses, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)


def group_scores(
    train_loss_KN: Any,
    test_loss_KM: Any,
    train_labels_N: Sequence[Hashable] | None = None,
    test_labels_M: Sequence[Hashable] | None = None,
    estimator: str = "auto",
    **known: Any,
) -> GroupScores:
    """`core.group_scores` of loss matrices."""
    losses = core.member_losses(train_loss_KN, test_loss_KM, **known)
    return core.group_scores(losses, core.choose(losses, estimator), train_labels_N, test_labels_M)


def self_lds(
    train_loss_KN: Any, test_loss_KM: Any, inclusion_KN: Any, estimator: str = "auto", **known: Any
) -> SelfLDS:
    """`core.estimate` of loss matrices."""
    return core.estimate(core.member_losses(train_loss_KN, test_loss_KM, inclusion_KN, **known), estimator)
