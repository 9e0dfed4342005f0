# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""The paper's recipe against ours for the same dollars: ``python -m tests.benchmarks.equal_money [digits lm chat]``.

The paper's (arXiv 2505.23223): covariance, members from the target on .3 of the examples for one epoch. A budget is
what so many of its members cost, trained and scored on all examples, by two published price lists; the other recipes
have as many members as that buys. What the target itself costs is left out on all sides: who explains a model has it.
Judged on the losses in the cache (tasks.py), by retrained halves; the interval is over ensembles of cached members,
which overlap.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from daunce_api.core import Checkpoints, fit
from tests.benchmarks.estimators import auto, cached, ensembles
from tests.benchmarks.tasks import Task, all_tasks

PRICES = {"OpenAI gpt-4.1-nano": (1.5, 0.2), "Tinker Qwen3-8B": (0.44, 0.195)}
"""Dollars per million trained and scored tokens; daunce_api/plan/prices.json has the sources."""


def cost(task: Task, kind: str, tests: int, models: int, prices: tuple[float, float]) -> float:
    """Dollars of one member, for examples of a million tokens together."""
    spec = task.kinds[kind]
    return spec.ratio * spec.recipe.epochs * prices[0] + models * (1 + tests / task.size) * prices[1]


def judged(task: Task, kind: str, arm: str, members: int, draws: int) -> np.ndarray:
    """(draws,) LDS of a recipe; empty where the cache has too few members."""
    found = []
    for e in ensembles(task, kind, members, 0.0, draws):
        if arm == "checkpoints" and e.earlier is None:
            break
        last = e.earlier  # two of them, as ensemble.checkpoints: 3 has
        if last is not None:
            last = Checkpoints(last.train_loss_SKN[-2:], last.test_loss_SKM[-2:])
        losses = replace(e, earlier=last).losses(checkpoints=arm == "checkpoints", prior=arm == "prior")
        found.append(e.judge(fit(losses, "covariance").dense() if arm == "covariance" else auto(losses)[0]))
    return np.array(found)


def table(task: Task, budgets: list[int], draws: int) -> None:
    """Print one row a price list, budget and recipe."""
    truth = cached(task, "truth")
    if truth is None:
        return
    tests = truth["test"].shape[1]
    arms = [("target", "covariance"), ("target", "auto"), ("target", "prior")]
    arms += [("short", "covariance"), ("short", "auto"), ("short", "prior")]
    arms += [("base", "covariance"), ("base", "auto"), ("base", "checkpoints"), ("base", "prior")]
    known: dict[tuple[str, str, int], np.ndarray] = {}
    for name, prices in PRICES.items():
        for paper in budgets:
            budget = paper * cost(task, "target", tests, 1, prices)
            first = None
            for kind, arm in arms:
                count = int(budget / cost(task, kind, tests, 3 if arm == "checkpoints" else 1, prices) + 1e-9)
                if count < 2:
                    continue
                key = kind, arm, count
                if key not in known:
                    known[key] = judged(task, kind, arm, count, draws)
                lds = known[key]
                if not lds.size:
                    continue
                first = lds if first is None else first
                spread = 1.96 * lds.std() / np.sqrt(lds.size)
                print(
                    f"| {task.name} | {name} | {paper} | {kind}, {arm} | {count} | {lds.mean():.3f} ± {spread:.3f} "
                    f"| {lds.mean() / first.mean():.2f} |",
                    flush=True,
                )


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["digits", "lm", "chat"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[25, 100], help="members of the paper's recipe")
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    print("| task | prices | budget: the paper's K | recipe | members | LDS | over the paper's |\n" + "|---" * 7 + "|")
    for name, task in all_tasks(arguments.tasks).items():
        if name in arguments.tasks:
            table(task, arguments.budgets, arguments.draws)


if __name__ == "__main__":
    main()
