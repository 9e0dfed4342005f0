# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Do 95 % intervals cover? Re-drawn ensembles of the digits task: ``python -m tests.benchmarks.coverage``.

The pool of 600 members is cut into disjoint ensembles; the mean score over ensembles stands for the expected score
(its own error is allowed for), and each ensemble's interval (`confidence_interval`) is asked whether it covers it. A
cell is the share for single pairs (300 x 100 of them), then for sums over ten groups of training examples. Scoring
noise is added to every loss and told to the estimator. `auto` chooses on the first ensemble, for all: scores of another
choice have another unit. Where it shrinks scores towards zero, the expected score is that without, times the ensemble's
own weights, which its intervals of pairs take as known; those of groups are for the expected sum of weighted scores.
"""

from __future__ import annotations

import os
from dataclasses import replace

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from daunce_api.core import (
    Checkpoints,
    Choice,
    MemberLosses,
    Rho,
    Setting,
    choose,
    confidence_interval,
    fit,
    member_losses,
)
from daunce_api.core.estimators import ESTIMATORS, estimator_named
from daunce_api.core.groups import group_sums
from tests.benchmarks.estimators import cached
from tests.benchmarks.tasks import classifier_tasks

NAMES = (*ESTIMATORS, "auto")
NOISES = (0.0, 0.03)
TRAIN, TESTS, GROUPS = 300, 100, 10


def ensembles(
    losses: dict[str, np.ndarray], count: int, checkpoints: bool, noise: float, rho: Rho
) -> list[MemberLosses]:
    """Disjoint ensembles of the pool, with scoring noise of their own."""
    rng = np.random.default_rng(0)

    def scored(loss: np.ndarray) -> np.ndarray:
        exact = loss.astype(np.float64)
        return exact + noise * rng.normal(size=exact.shape) if noise else exact

    out = []
    for start in range(0, len(losses["train"]) - count + 1, count):
        rows = slice(start, start + count)
        train, test = scored(losses["train"][rows]), scored(losses["test"][rows])
        earlier = None
        if checkpoints:
            earlier = Checkpoints(*(scored(losses[f"earlier_{side}"][-2:, rows]) for side in ("train", "test")))
        out.append(member_losses(train, test, losses["inclusion"][rows], noise=noise or None, rho=rho, earlier=earlier))
    return out


def chosen(name: str, first: MemberLosses) -> Choice:
    """The estimator and its parameters, for all ensembles."""
    if name == "auto":
        return choose(first, name)
    entry = estimator_named(name)
    return Choice(entry, Setting(ridge=1.0), "", entry.question)


def coverage(drawn: list[MemberLosses], choice: Choice) -> tuple[float, float]:
    """Share of pairs and of groups, over ensembles, whose interval covers the expected score."""
    members = [whole.tests(range(TESTS)) for whole in drawn]
    unweighted = [fit(m, choice.estimator.name, replace(choice.setting, shrinkage=None)).block() for m in members]
    mean = np.mean(unweighted, axis=0)
    group_of, rows = np.arange(len(mean)) % GROUPS, slice(0, TRAIN)
    correlation = choice.estimator.name == "correlation"
    inside: tuple[list[float], list[float]] = ([], [])
    made = [fit(m, choice.estimator.name, choice.setting) for m in members]
    sums = [group_sums(blocks, group_of, np.arange(TESTS)) for blocks in made]
    grouped = np.mean([score for score, _ in sums], axis=0)
    for m, blocks, score, own_sums in zip(members, made, unweighted, sums, strict=True):
        weighted = blocks.block()
        expected = mean * np.divide(weighted, score, out=np.ones_like(score), where=score != 0)
        found = (
            (weighted[rows], blocks.stderr_block(rows), expected[rows], correlation),
            (*own_sums, grouped, False),
        )
        for shares, (middle, error, wanted, fisher) in zip(inside, found, strict=True):
            # The mean over ensembles holds the ensemble in question too, hence the factor.
            own = error * np.sqrt(1 - 1 / len(drawn))
            low, high = confidence_interval(middle, own, m.count, correlation=fisher)
            shares.append(float(((low < wanted) & (wanted < high)).mean()))
    return float(np.mean(inside[0])), float(np.mean(inside[1]))


def main() -> None:
    """Print a Markdown table."""
    task = classifier_tasks()["digits"]
    head = ("members from", "checkpoints", "noise", "K", *NAMES)
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for kind in ("base", "target"):
        rho = task.rho(kind)
        for checkpoints in (False, True):
            losses = cached(task, kind, checkpoints)
            if losses is None:
                continue
            for noise in NOISES:
                for count in (10, 25, 40):
                    drawn = ensembles(losses, count, checkpoints, noise, rho)
                    cells = []
                    for name in NAMES:
                        choice = chosen(name, drawn[0])
                        what = f" ({choice.estimator.name})" if name == "auto" else ""
                        cells.append("{:.3f}, {:.3f}".format(*coverage(drawn, choice)) + what)
                    stages = "the last two" if checkpoints else "none"
                    print(
                        f"| {kind} | {stages} | {noise or 'none'} | {count} | " + " | ".join(cells) + " |", flush=True
                    )


if __name__ == "__main__":
    main()
