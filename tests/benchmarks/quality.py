# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Is self_lds right, and its curve? ``python -m tests.benchmarks.quality [toy digits fashion lm resnet]``.

From the cached members of a task sequences of members are drawn. After K of them self_lds and its interval are held
against the LDS of the same scores on retrained models, and what was foreseen for more members against what these then
gave. Sequences share members where the pool is small, so shares of intervals that cover are less certain than the
number of sequences suggests; a forecast and what it is compared with share the first K members, as in a run that grows.

``toy`` is linear, with luck of each run's own in every loss and new data for every sequence.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from daunce_api.core import SelfLDS, member_losses
from daunce_api.core.quality import estimate
from tests.benchmarks.estimators import Ensemble, auto, cached
from tests.benchmarks.tasks import Task, all_tasks, classifier_tasks

COUNTS = (10, 25, 50, 100, 200)
PAIRS = ((10, 25), (25, 50), (50, 100), (100, 200), (25, 100), (50, 200))


@dataclass(frozen=True)
class Look:
    """A run after some of its members: its own estimate, and the truth."""

    quality: SelfLDS
    lds: float


def look(e: Ensemble, count: int) -> Look:
    """The first members of an ensemble."""
    members = member_losses(e.train[:count], e.test[:count], e.inclusion[:count], noise=e.noise, rho=e.rho)
    return Look(estimate(members), e.judge(auto(members)[0]))


def drawn(task: Task, kind: str, noise: float, sequences: int, most: int) -> Iterator[Ensemble]:
    """Random sequences of the cached members of a task."""
    members, truth = cached(task, kind), cached(task, "truth")
    if members is None or truth is None:
        return
    for index in range(sequences):
        rng = np.random.default_rng([5, index])
        order = rng.permutation(len(members["train"]))[:most]
        train, test = (members[side][order].astype(np.float64) for side in ("train", "test"))
        train, test = (loss + noise * rng.normal(size=loss.shape) for loss in (train, test))
        inclusion, rho = members["inclusion"][order], task.rho(kind)
        yield Ensemble(train, test, inclusion, noise or None, rho, truth["inclusion"].astype(float), truth["test"])


def toys(rank: int, luck: float, sequences: int, most: int) -> Iterator[Ensemble]:
    """400 training and 40 test examples of a linear model; luck relative to the spread that subsets make."""
    for index in range(sequences):
        rng = np.random.default_rng([index, rank])
        scale = np.geomspace(3, 0.3, rank)
        g, t = rng.normal(size=(400, rank)) * scale, rng.normal(size=(40, rank)) * scale
        values, vectors = np.linalg.eigh(g.T @ g / 400)
        inclusion = rng.random((most + 100, 400)).argsort(axis=1) < 200
        moved = -(inclusion - 0.5) @ g @ (vectors / (values + 0.5)) @ vectors.T / 200
        clean = [moved @ side.T for side in (g, t)]
        train, test = (x + luck * x.std(axis=0) * rng.normal(size=x.shape) for x in clean)
        kept, truth = inclusion[:most], inclusion[most:].astype(float)
        yield Ensemble(2 + train[:most], 1 + test[:most], kept, None, "base", truth, clean[1][most:])


def tables(name: str, ensembles: Sequence[Iterator[Ensemble]], labels: Sequence[str], counts: Sequence[int]) -> None:
    """Print the two tables of a task; one row a K, or a pair of them, and kind of ensemble."""
    found = {}
    for label, sequences in zip(labels, ensembles, strict=True):
        looks = [[look(e, count) for count in counts if count <= len(e.train)] for e in sequences]
        if looks:
            found[label] = looks
    print(
        f"\n### {name}: self_lds and its interval against LDS\n\n"
        "| members, noise | K | sequences | self_lds | LDS | error | sd of error | largest | interval covers LDS "
        "| mean width |\n" + "|---" * 10 + "|"
    )
    for label, looks in found.items():
        for k, count in enumerate(counts[: len(looks[0])]):
            own = [run[k].quality for run in looks]
            value, lds = np.array([q.value for q in own]), np.array([run[k].lds for run in looks])
            low, high = np.array([q.low for q in own]), np.array([q.high for q in own])
            error = value - lds
            print(
                f"| {label} | {count} | {len(looks)} | {value.mean():.3f} | {lds.mean():.3f} | {error.mean():+.3f} "
                f"| {error.std():.3f} | {np.abs(error).max():.2f} | {_share(low, lds, high)} "
                f"| {(high - low).mean():.2f} |"
            )
    print(
        f"\n### {name}: what was foreseen, and what was reached\n\n"
        "| members, noise | K -> n | sequences | expected self_lds | reached | LDS reached | gain foreseen | gained "
        "| sd of error | gain's interval covers | its width | interval at n covers LDS | covers self_lds |\n"
        + "|---" * 13
        + "|"
    )
    for label, looks in found.items():
        for pair in PAIRS:
            if set(pair) <= set(counts[: len(looks[0])]):
                before, after = (counts.index(count) for count in pair)
                runs = [(run[before], run[after]) for run in looks if run[before].quality.curve is not None]
                if runs:
                    print(f"| {label} | {pair[0]} -> {pair[1]} | " + _foreseen(runs, pair[1]))


def _foreseen(runs: Sequence[tuple[Look, Look]], count: int) -> str:
    now = np.array([a.quality.value for a, _ in runs])
    expected = np.array([float(a.quality.expected(count)) for a, _ in runs])
    reached, lds = np.array([b.quality.value for _, b in runs]), np.array([b.lds for _, b in runs])
    gain, low, high = np.array([a.quality.gain(count - a.quality.members) for a, _ in runs]).T
    least, most = np.array([a.quality.interval(count) for a, _ in runs]).T
    return (
        f"{len(runs)} | {expected.mean():.3f} | {reached.mean():.3f} | {lds.mean():.3f} | {gain.mean():.3f} "
        f"| {(reached - now).mean():.3f} | {(expected - reached).std():.3f} | {_share(low, reached - now, high)} "
        f"| {(high - low).mean():.2f} | {_share(least, lds, most)} | {_share(least, reached, most)} |"
    )


def _share(low: np.ndarray, value: np.ndarray, high: np.ndarray) -> str:
    return f"{((low <= value) & (value <= high)).mean():.2f}"


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["toy", "digits", "fashion", "lm", "resnet"])
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    arguments = parser.parse_args()
    counts = sorted(arguments.counts)
    for name in arguments.tasks:
        if name == "toy":
            cases = [(60, 0.5), (150, 0.5), (150, 1.0)]
            made = [toys(rank, luck, arguments.sequences, max(counts)) for rank, luck in cases]
            tables("toy", made, [f"rank {rank}, luck {luck}" for rank, luck in cases], counts)
            continue
        task = (classifier_tasks() if name in ("digits", "fashion") else all_tasks())[name]
        cells = [(kind, noise) for kind in ("base", "target") for noise in (0.0, 0.03)]
        made = [drawn(task, kind, noise, arguments.sequences, max(counts)) for kind, noise in cells]
        tables(name, made, [f"{kind}, {noise}" for kind, noise in cells], counts)


if __name__ == "__main__":
    main()
