# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Side by side with the field: one target, one truth, one LDS function, many attribution methods.

    python -m venv peers && . peers/bin/activate
    pip install torch==2.13.0 && pip install ".[embeddings,local]" scikit-learn matplotlib einconv einops opt-einsum
    pip install --no-deps traker==0.3.2 dattri==0.3.0 kronfluence==1.0.1 bergson==2.5.1 pretty-midi
    pip install accelerate datasets jaxtyping ml-dtypes natsort peft petname simple-parsing torchopt bitsandbytes
    rm -r peers/lib/python3*/site-packages/tests    # kronfluence's wheel puts a package there that hides this one
    export FASHION_MNIST_DIR=...                    # Debian's dataset-fashion-mnist
    python -m tests.benchmarks.make_losses          # truths and members: hours, resumable
    python -m tests.benchmarks.peers run            # cells that are missing; one process each, one thread
    python -m tests.benchmarks.peers table          # seconds: Markdown and the plot, from what is there

``run TASK...`` and ``--methods WORD...`` choose; ``--again`` repeats finished cells; ``--defaults`` skips the grids;
``--minutes`` limits the CPU time of one setting. (The libraries are installed without their dependencies since
kronfluence asks for a torchvision that would replace torch, bergson for torchvision and torchaudio.)
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import warnings

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from collections.abc import Sequence

from tests.benchmarks.field.cells import Method, cell_path, read_cell, run_cell, write_cell

TASKS = ("digits", "fashion", "resnet", "lm")


def methods() -> list[Method]:
    """All methods in the order of running: the timing of members comes before what needs it."""
    from tests.benchmarks.field import (
        bergson_methods,
        dattri_methods,
        kronfluence_methods,
        ours,
        simple,
        traker_methods,
    )

    return [
        *ours.TIMINGS,
        *simple.METHODS,
        *ours.METHODS,
        *traker_methods.METHODS,
        *kronfluence_methods.METHODS,
        *dattri_methods.METHODS,
        *bergson_methods.METHODS,
    ]


def child(task: str, keys: Sequence[str], grid: bool, limit: float) -> None:
    """Run these cells in this process and keep them, after every setting."""
    import torch

    from tests.benchmarks.field.subjects import subject

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    loaded = subject(task).with_weights()
    for method in methods():
        if method.key in keys and not method.refuses(task):
            for content in run_cell(method, loaded, grid, limit):
                waits = "not timed yet" in str(content["rows"]) or "are in the cache" in str(content["rows"])
                if not waits:  # what it needs may come
                    write_cell(task, method.key, content)
                row = content["rows"][-1]
                print(task, method.name, row["setting"], round(row["lds"], 3) if "lds" in row else row, flush=True)


def groups(task: str, words: Sequence[str], again: bool) -> list[list[str]]:
    """Cells to run, those of one process together: each alone, but those that only read cached members."""
    alone, light = [], []
    for method in methods():
        wanted = not words or any(word.lower() in method.name.lower() for word in words)
        if not wanted or method.refuses(task) or (read_cell(task, method.key) is not None and not again):
            continue
        if method.name.startswith("black box"):
            light.append(method.key)
        else:
            alone.append([method.key])
    return alone + ([light] if light else [])


def run(tasks: Sequence[str], words: Sequence[str], again: bool, grid: bool, minutes: float) -> None:
    """Run what is missing. A cell whose default setting takes too long says so; a grid ends where it did."""
    names = {method.key: method for method in methods()}
    options = ["--minutes", str(minutes), *([] if grid else ["--defaults"])]
    for task in tasks:
        for keys in groups(task, words, again):
            if again:
                for key in keys:
                    cell_path(task, key).unlink(missing_ok=True)
            command = [sys.executable, "-m", "tests.benchmarks.peers", "child", task, *keys, *options]
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
            if done.returncode == -signal.SIGXCPU:
                print(task, keys[0], f"over {minutes:g} minutes", flush=True)
                if len(keys) == 1 and read_cell(task, keys[0]) is None:
                    row = {"setting": names[keys[0]].default, "error": f"over {minutes:g} minutes"}
                    write_cell(task, keys[0], {"task": task, "method": names[keys[0]].name, "rows": [row]})
            elif done.returncode:
                print(task, keys[0], "failed:", (done.stderr or "").strip().splitlines()[-1:], flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "child"])
    parser.add_argument("names", nargs="*", help="tasks; of child: a task and cells")
    parser.add_argument("--methods", nargs="*", default=[], help="words in the names of methods")
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    parser.add_argument("--defaults", action="store_true", help="skip the grids")
    parser.add_argument("--minutes", type=float, default=4.0, help="CPU minutes that one setting may take")
    arguments = parser.parse_args()
    grid, minutes = not arguments.defaults, arguments.minutes
    if arguments.what == "run":
        run(arguments.names or TASKS, arguments.methods, arguments.again, grid, minutes)
    elif arguments.what == "child":
        child(arguments.names[0], arguments.names[1:], grid, 60 * minutes)
    else:
        from tests.benchmarks.field.table import write_all

        write_all(arguments.names or TASKS)


if __name__ == "__main__":
    main()
