"""One cell of the table: run a method in its own process, time it, judge it, keep the answer as JSON."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from daunce_api.evaluation import lds
from tests.benchmarks.tasks import CACHE

if TYPE_CHECKING:
    from tests.benchmarks.field.subjects import Subject


@dataclass(frozen=True)
class Result:
    """Scores (N, M) of one or of several repetitions, and seconds that were spent on earlier training."""

    scores: Sequence[np.ndarray]
    trained_seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A method: what it needs, how it runs, its default setting and a small grid.

    ``run(subject, **setting)`` gives a Result; ``grid`` are settings that are judged on the truth afterwards (what no
    user can do). ``needs``: what of the model the method must have.
    """

    name: str
    needs: str
    run: Callable[..., Result]
    default: dict[str, Any] = field(default_factory=dict)
    grid: tuple[dict[str, Any], ...] = ()
    refuses: Callable[[str], str] = lambda task: ""

    @property
    def key(self) -> str:
        """Name of the cell's file."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())


def cell_path(task: str, method: str, root: Path | None = None) -> Path:
    """Where a cell is kept."""
    return (root or CACHE / "peers") / task / f"{method}.json"


def read_cell(task: str, method: str, root: Path | None = None) -> dict[str, Any] | None:
    """A finished cell, or None."""
    path = cell_path(task, method, root)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_cell(task: str, method: str, content: dict[str, Any], root: Path | None = None) -> None:
    """Keep a cell; it appears whole."""
    path = cell_path(task, method, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(path)


def judged(scores: Sequence[np.ndarray], truth_inclusion: np.ndarray, truth_loss: np.ndarray) -> dict[str, float]:
    """LDS with its interval, the mean over repetitions; scores that are not finite count as zero."""
    found = []
    for score in scores:
        finite = np.nan_to_num(np.asarray(score, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        one = lds(finite, truth_inclusion, truth_loss)
        found.append((one.value, one.low, one.high))
    value, low, high = np.mean(found, axis=0)
    wrong = float(np.mean([1 - np.isfinite(score).mean() for score in scores]))
    return {"lds": float(value), "low": float(low), "high": float(high), "repeats": len(found), "not_finite": wrong}


def peak_mib() -> float:
    """Highest resident memory of this process since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM: peak memory is measured on Linux")


def forget_peak() -> None:
    """Start a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def limit_seconds(seconds: float) -> None:
    """End this process when it has used so many more CPU seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))


def run_cell(method: Method, subject: Subject, grid: bool, limit: float) -> Iterator[dict[str, Any]]:
    """Run the default of a method on a subject and judge it, then its grid: the cell so far, after each setting.

    Each setting may take ``limit`` CPU seconds.
    """
    truth_inclusion, truth_loss = subject.truth()
    rows: list[dict[str, Any]] = []
    cell = {"task": subject.name, "method": method.name, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    for setting in (method.default, *(method.grid if grid else ())):
        limit_seconds(limit)
        torch.manual_seed(0)
        forget_peak()
        before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
        try:
            result = method.run(subject, **setting)
        except Exception as error:  # a library's failure is a finding
            if os.environ.get("PEERS_RAISE"):
                raise
            rows.append({"setting": setting, "error": f"{type(error).__name__}: {error}"[:300]})
            yield cell
            continue
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if not result.scores:
            seconds = {"seconds_each": result.trained_seconds, "peak_mib": peak_mib(), "note": result.note}
            rows.append({"setting": setting, **seconds})
            yield cell
            continue
        if not any(np.isfinite(score).any() for score in result.scores):
            rows.append({"setting": setting, "error": "no score is finite"})
            yield cell
            continue
        repeats = len(result.scores)
        rows.append(
            {
                "setting": setting,
                **judged(result.scores, truth_inclusion, truth_loss),
                "seconds": wall / repeats,
                "cpu_seconds": cpu / repeats,
                "trained_seconds": result.trained_seconds,
                "peak_mib": peak_mib(),
                "loaded_mib": before,
                "note": result.note,
            }
        )
        yield cell
