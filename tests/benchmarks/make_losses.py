"""Train what the cache of the estimator study lacks: ``python -m tests.benchmarks.make_losses digits:base lm:truth``.

Without arguments everything. Interrupt and repeat as you like; finished chunks stay.
"""

from __future__ import annotations

import sys
import time

import torch

from tests.benchmarks.tasks import all_tasks, losses


def main() -> None:
    """Fill the cache."""
    torch.set_num_threads(1)
    tasks = all_tasks([item.split(":")[0] for item in sys.argv[1:]])
    wanted = sys.argv[1:] or [f"{name}:{kind}" for name, task in tasks.items() for kind in task.kinds]
    for item in wanted:
        name, kind = item.split(":")
        start = time.perf_counter()
        out = losses(tasks[name], kind)
        shapes = {key: value.shape for key, value in out.items()}
        print(f"{item} {time.perf_counter() - start:.1f} s {shapes}", flush=True)


if __name__ == "__main__":
    main()
