# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Is self_lds right, and its curve? ``python -m tests.benchmarks.quality [toy digits fashion lm chat resnet]``.

From the cached members of a task sequences of members are drawn. After K of them self_lds and its interval are held
against the LDS of the same scores on retrained models, and what was foreseen for more members against what these then
gave. Sequences share members where the pool is small, so shares of intervals that cover are less certain than the
number of sequences suggests; a forecast and what it is compared with share the first K members, as in a run that grows.

The LDS is that against a truth without luck: the correlation with retrained models over the root of their reliability
(two seeds of one subset; Spearman and Brown for their mean). Members trained like the target that are not in the
sequence are further retrained models, of one seed each. Its own standard error, over retrained models, stands beside
it. Constants of self_lds are those of the other tasks (`of_others`): the judged one took no part in them. "Oracle" is
the share within .05 if the ceiling were right in hindsight (mean raw over mean LDS of these very sequences): what is
left then is the sampling of members and of retrained models.

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

from daunce_api.core import SelfLDS, member_losses, quality
from daunce_api.core.crossval import column_spearman
from tests.benchmarks.estimators import Ensemble, auto, cached
from tests.benchmarks.tasks import Task, all_tasks, classifier_tasks

COUNTS = (10, 25, 50, 100, 200)
PAIRS = ((10, 25), (25, 50), (50, 100), (100, 200), (25, 100), (50, 200))


ANSWERS = {"lm": (160, 0.78), "chat": (128, 0.76), "digits": (1_000, 0.574), "fashion": (5_000, 0.479)}
ANSWERS["resnet"] = (2_000, 0.382)
"""Training examples, and the correlation of two seeds of one subset."""
LINEAR = {"lm": (1.56, 0.38), "chat": (1.105, 0.07), "digits": (0.953, 0.08)}
"""That over the share that subsets explain linearly, of the whole pool, and its standard error."""
ALIKE = {"lm": 0.80, "chat": 0.86}
"""The ceiling of members from the target that answer like it."""
UNLIKE = {"digits": (0.78, 2.5), "fashion": (0.74, 2.3)}
"""That of others, (a, b) of a + b / K."""


def of_others(task: str) -> None:
    """Set the constants of self_lds to what the other tasks make them."""
    size, answer = np.array([known for name, known in ANSWERS.items() if name != task]).T
    x, y = np.log10(size / 1_000), np.log(answer / (1 - answer))
    fall, level = np.polyfit(x, y, 1)
    left = y - level - fall * x
    quality.LUCK = (level, -fall, float(np.sqrt((left**2).sum() / (len(x) - 2))))
    quality.MOST_MEASURED = int(size.max())
    factor, error = np.array([known for name, known in LINEAR.items() if name != task]).T
    quality.BEYOND_LINEAR = float((factor / error**2).sum() / (1 / error**2).sum())
    quality.LIKE_TARGET = float(np.mean([known for name, known in ALIKE.items() if name != task]))
    a, b = np.mean([known for name, known in UNLIKE.items() if name != task], axis=0)
    quality.UNLIKE_TARGET = (float(a), float(b))


@dataclass(frozen=True, eq=False)
class Truth:
    """Retrained models: (S, N) subsets, (S, M) losses, and the reliability of these."""

    inclusion: np.ndarray
    loss: np.ndarray
    reliability: float

    def judge(self, score_NM: np.ndarray, rows: np.ndarray) -> float:
        """LDS without the truth's luck."""
        predicted = -(self.inclusion[rows].astype(np.float64) @ score_NM)
        return float(column_spearman(predicted, self.loss[rows]).mean() / np.sqrt(self.reliability))


def judged(truths: Sequence[Truth], score_NM: np.ndarray, draws: int = 40) -> tuple[float, float]:
    """The mean over truths, weighted by models and reliability, and its bootstrap standard error over models."""
    weight = [len(t.loss) * t.reliability for t in truths]
    rng = np.random.default_rng(0)
    picks = [[np.arange(len(t.loss)) for t in truths]]
    picks += [[rng.integers(0, len(t.loss), len(t.loss)) for t in truths] for _ in range(draws)]
    found = [
        np.average([t.judge(score_NM, rows) for t, rows in zip(truths, pick, strict=True)], weights=weight)
        for pick in picks
    ]
    return float(found[0]), float(np.std(found[1:]))


@dataclass(frozen=True)
class Look:
    """A run after some of its members: its own estimate, and the truth."""

    quality: SelfLDS
    lds: float
    error: float


def look(e: Ensemble, truths: Sequence[Truth], count: int) -> Look:
    """The first members of an ensemble."""
    members = member_losses(e.train[:count], e.test[:count], e.inclusion[:count], noise=e.noise, rho=e.rho)
    return Look(quality.estimate(members), *judged(truths, auto(members)[0]))


def drawn(task: Task, kind: str, noise: float, sequences: int, most: int) -> Iterator[tuple[Ensemble, list[Truth]]]:
    """Random sequences of the cached members of a task, and retrained models that are none of them."""
    members, truth, alike = cached(task, kind), cached(task, "truth"), cached(task, "base")
    if members is None or truth is None or alike is None:
        return
    per_seed = truth["per_seed"]
    seeds = per_seed.shape[1]
    half = seeds // 2
    sides = per_seed[:, :half].mean(axis=1), per_seed[:, half : 2 * half].mean(axis=1)
    r = float(column_spearman(*sides).mean())
    single = r / (half - (half - 1) * r)
    whole = seeds * single / (1 + (seeds - 1) * single)
    for index in range(sequences):
        rng = np.random.default_rng([5, index])
        order = rng.permutation(len(members["train"]))[:most]
        train, test = (members[side][order].astype(np.float64) for side in ("train", "test"))
        train, test = (loss + noise * rng.normal(size=loss.shape) for loss in (train, test))
        unused = (
            np.arange(len(alike["test"])) if kind != "base" else np.setdiff1d(np.arange(len(members["test"])), order)
        )
        further = Truth(alike["inclusion"][unused[:300]], alike["test"][unused[:300]], single)
        truths = [Truth(truth["inclusion"], truth["test"], whole), *([further] if unused.size > 2 else [])]
        known = (noise or None, task.rho(kind), truth["inclusion"].astype(float), truth["test"])
        yield Ensemble(train, test, members["inclusion"][order], *known), truths


def toys(rank: int, luck: float, sequences: int, most: int) -> Iterator[tuple[Ensemble, list[Truth]]]:
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
        e = Ensemble(2 + train[:most], 1 + test[:most], kept, None, "base", truth, clean[1][most:])
        yield e, [Truth(truth, clean[1][most:], 1.0)]


def tables(
    name: str, ensembles: Sequence[Iterator[tuple[Ensemble, list[Truth]]]], labels: Sequence[str], counts: Sequence[int]
) -> list[tuple[int, np.ndarray]]:
    """Print the two tables of a task; one row a K, or a pair of them, and kind of ensemble. Returns K and the errors of
    all sequences, for each cell."""
    found, errors = {}, []
    for label, sequences in zip(labels, ensembles, strict=True):
        looks = [[look(e, truths, count) for count in counts if count <= len(e.train)] for e, truths in sequences]
        if looks:
            found[label] = looks
    print(
        f"\n### {name}: self_lds and its interval against LDS\n\n"
        "| members, noise | K | sequences | self_lds | LDS | its s.e. | error | sd of error | within .05 | oracle "
        "| interval covers LDS | mean width |\n" + "|---" * 12 + "|"
    )
    for label, looks in found.items():
        for k, count in enumerate(counts[: len(looks[0])]):
            own = [run[k].quality for run in looks]
            value, lds = np.array([q.value for q in own]), np.array([run[k].lds for run in looks])
            low, high = np.array([q.low for q in own]), np.array([q.high for q in own])
            error = value - lds
            errors.append((count, error))
            raw = np.array([q.raw for q in own])
            oracle = raw * lds.mean() / raw.mean() - lds
            print(
                f"| {label} | {count} | {len(looks)} | {value.mean():.3f} | {lds.mean():.3f} "
                f"| {np.mean([run[k].error for run in looks]):.3f} | {error.mean():+.3f} | {error.std():.3f} "
                f"| {(np.abs(error) <= 0.05).mean():.2f} | {(np.abs(oracle) <= 0.05).mean():.2f} "
                f"| {_share(low, lds, high)} "
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
    return errors


def together(errors: Sequence[tuple[int, np.ndarray]]) -> None:
    """Print how many cells, whose error is the mean over sequences, and how many single sequences are within .05."""
    print("\n| members | cells | within .05 | mean error | sequences | within .05 |\n" + "|---" * 6 + "|")
    for least in (25, 50):
        some = [error for count, error in errors if count >= least]
        if some:
            means, each = np.array([error.mean() for error in some]), np.concatenate(some)
            print(
                f"| {least} and more | {len(some)} | {(np.abs(means) <= 0.05).mean():.2f} | {means.mean():+.3f} "
                f"| {each.size} | {(np.abs(each) <= 0.05).mean():.2f} |"
            )


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
    parser.add_argument("tasks", nargs="*", default=["toy", "digits", "fashion", "lm", "chat", "resnet"])
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    arguments = parser.parse_args()
    counts = sorted(arguments.counts)
    errors: list[tuple[int, np.ndarray]] = []
    for name in arguments.tasks:
        if name == "toy":
            cases = [(60, 0.5), (150, 0.5), (150, 1.0)]
            made = [toys(rank, luck, arguments.sequences, max(counts)) for rank, luck in cases]
            tables("toy", made, [f"rank {rank}, luck {luck}" for rank, luck in cases], counts)
            continue
        of_others(name)
        task = (classifier_tasks() if name in ("digits", "fashion") else all_tasks())[name]
        cells = [(kind, noise) for kind in ("base", "target") for noise in (0.0, 0.03)]
        made = [drawn(task, kind, noise, arguments.sequences, max(counts)) for kind, noise in cells]
        errors += tables(name, made, [f"{kind}, {noise}" for kind, noise in cells], counts)
    together(errors)


if __name__ == "__main__":
    main()
