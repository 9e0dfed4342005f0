# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Do 95 % intervals cover? Re-drawn ensembles of the digits task: ``python -m tests.benchmarks.coverage``.

The pool of 600 members is cut into disjoint ensembles; the mean score over ensembles stands for the expected score
(its own error is allowed for), and each ensemble's interval (`confidence_interval`) is asked whether it covers it.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from daunce_api.core import Checkpoints, Setting, confidence_interval, member_losses
from daunce_api.core.blocks import score_blocks
from daunce_api.core.estimators import estimator_named
from tests.benchmarks.estimators import cached
from tests.benchmarks.tasks import classifier_tasks

NAMES = ("covariance", "correlation", "inclusion", "whitened", "half_whitened")


def coverage(losses: dict[str, np.ndarray], name: str, count: int, checkpoints: bool) -> float:
    """Share of pairs (300 x 100 of them) and ensembles whose interval covers the expected score."""
    drawn = len(losses["train"]) // count
    scores, errors = [], []
    for index in range(drawn):
        rows = slice(index * count, (index + 1) * count)
        train, test = (losses[side][rows].astype(np.float64) for side in ("train", "test"))
        earlier = None
        if checkpoints:
            earlier = Checkpoints(
                *(losses[f"earlier_{side}"][-2:, rows].astype(np.float64) for side in ("train", "test"))
            )
        members = member_losses(train, test, losses["inclusion"][rows], earlier)
        blocks = score_blocks(estimator_named(name), members, Setting(ridge=1.0))
        scores.append(blocks.block(slice(0, 300), slice(0, 100)))
        errors.append(blocks.stderr_block(slice(0, 300), slice(0, 100)))
    # The mean over ensembles holds the ensemble in question too, hence the factor.
    error = np.array(errors) * np.sqrt(1 - 1 / drawn)
    low, high = confidence_interval(np.array(scores), error, count, correlation=name == "correlation")
    expected = np.mean(scores, axis=0)
    return float(((low < expected) & (expected < high)).mean())


def main() -> None:
    """Print a Markdown table."""
    task = classifier_tasks()["digits"]
    print("| members from | checkpoints | K | " + " | ".join(NAMES) + " |\n" + "|---" * (3 + len(NAMES)) + "|")
    for kind in ("base", "target"):
        losses = cached(task, kind)
        if losses is None:
            continue
        for checkpoints in (False, True):
            for count in (10, 25, 40):
                shares = " | ".join(f"{coverage(losses, name, count, checkpoints):.3f}" for name in NAMES)
                print(f"| {kind} | {'the last two' if checkpoints else 'none'} | {count} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
