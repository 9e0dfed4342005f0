# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""The estimator study: every estimator on real fine-tunes, against retrained models.

    python -m tests.benchmarks.make_losses      # trains what the cache lacks, hours in all, can be interrupted
    python -m tests.benchmarks.estimators       # judges what is in the cache, minutes; prints Markdown

Each cell is the mean over ensembles (random sets of K members) of the LDS against models retrained on random halves
that are members of no ensemble, averaged over seeds. A new estimator is judged by adding it to the registry.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # spinning threads on a busy machine cost a hundredfold

import numpy as np

from daunce_api.attribution.similarity import bm25_scores
from daunce_api.core import Checkpoints, MemberLosses, Rho, choose, estimate, fit, member_losses, self_influence
from daunce_api.core.crossval import column_spearman
from daunce_api.evaluation.retrieval import average_precision, retrieval
from tests.benchmarks.tasks import CACHE, Task, all_tasks, chunk_files, joined, read_chunk

COUNTS = (10, 25, 50, 100)
NOISES = (0.0, 0.01, 0.03)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """K members with scoring noise added, and the truth."""

    train: np.ndarray
    test: np.ndarray
    inclusion: np.ndarray
    noise: float | None
    rho: Rho
    truth_inclusion: np.ndarray
    truth_loss: np.ndarray
    earlier: Checkpoints | None = None
    prior: np.ndarray | None = None

    def judge(self, score: np.ndarray) -> float:
        """LDS of scores."""
        return float(column_spearman(-(self.truth_inclusion @ score), self.truth_loss).mean())

    def losses(self, *, checkpoints: bool = True, prior: bool = True) -> MemberLosses:
        """As the core takes them."""
        return member_losses(
            self.train,
            self.test,
            self.inclusion,
            noise=self.noise,
            rho=self.rho,
            earlier=self.earlier if checkpoints else None,
            prior_NM=self.prior if prior else None,
        )


def similarity(task: Task) -> np.ndarray:
    """(N, M) what the prior of a task is: the root of BM25 for texts, the cosine of centred pixels for images."""
    if task.pairs is not None:
        pairs = task.pairs()
        return np.sqrt(bm25_scores(*([p.text for p in pairs[side]] for side in ("train", "test"))))
    owner: Any = task.train.__self__  # type: ignore[attr-defined]
    data = {name: np.asarray(value) for name, value in owner.load().items()}
    sides = [
        data[name].reshape(len(data[name]), -1) - data["x"].reshape(len(data["x"]), -1).mean(axis=0)
        for name in ("x", "test_x")
    ]
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides)
    return np.asarray(train @ test.T, dtype=np.float64)


def planted(task: Task) -> np.ndarray | None:
    """(N, M) training examples of the planted group that a test example belongs to, those answers alone; None where a
    task has no such group."""
    if task.pairs is None:
        return None
    pairs = task.pairs()
    train, test = (np.array([p.source in ("planted", "shouted") for p in pairs[side]]) for side in ("train", "test"))
    return np.outer(train, test) if train.any() else None


def cached(task: Task, kind: str, checkpoints: bool = False) -> dict[str, np.ndarray] | None:
    """What the cache holds of a kind, without training; None if nothing. Of a truth, whole subsets.

    With ``checkpoints`` only members whose earlier checkpoints are there too.
    """
    spec = task.kinds[kind]
    folder = CACHE / task.name / kind
    files = sorted(folder.glob("[0-9]*[0-9].npz"))
    if checkpoints:
        files = [file for file in files if chunk_files(folder, int(file.stem))[1].exists()]
    if not files:
        return None
    out = joined([read_chunk(chunk_files(folder, int(file.stem))) for file in files])
    if kind == "truth":
        subsets = len(out["test"]) // spec.seeds
        per_seed = out["test"][: subsets * spec.seeds].reshape(subsets, spec.seeds, -1)
        inclusion = out["inclusion"][: subsets * spec.seeds : spec.seeds]
        out = {"inclusion": inclusion, "test": per_seed.mean(axis=1), "per_seed": per_seed}
    return out


def ensembles(task: Task, kind: str, count: int, noise: float, draws: int = 20) -> Iterator[Ensemble]:
    """Random ensembles of one cell, drawn from all members of the task; few members make them overlap."""
    members, truth = cached(task, kind), cached(task, "truth")
    if members is None or truth is None or len(members["train"]) < count:
        return
    prior = similarity(task)
    for index in range(draws):
        rng = np.random.default_rng(index)
        rows = rng.permutation(len(members["train"]))[:count]
        train, test = (members[side][rows].astype(np.float64) for side in ("train", "test"))
        train, test = (loss + noise * rng.normal(size=loss.shape) for loss in (train, test))
        earlier = None
        if "earlier_train" in members:
            sides = (members[f"earlier_{side}"][:, rows].astype(np.float64) for side in ("train", "test"))
            earlier = Checkpoints(*(loss + noise * rng.normal(size=loss.shape) for loss in sides))
        known = (noise or None, task.rho(kind), truth["inclusion"].astype(np.float64), truth["test"])
        yield Ensemble(train, test, members["inclusion"][rows], *known, earlier, prior)


def auto(losses: MemberLosses) -> tuple[np.ndarray, float]:
    """(N, M) scores by what `auto` chooses, and the prior's weight in them."""
    choice = choose(losses)
    return fit(losses, choice.estimator.name, choice.setting).dense(), choice.setting.prior


def table(task: Task, kind: str, counts: Sequence[int], draws: int, prior_alone: bool) -> None:
    """Print one Markdown table: rows are cells; intervals are over ensembles. ``prior_alone``: without what takes
    longest, checkpoints and self_lds."""
    print(
        "| noise | K | covariance | auto | auto, checkpoints | auto, prior | gain by the prior | its weight | self_lds "
        "| raw | error | precision | its gain by the prior |\n" + "|---" * 13 + "|",
        flush=True,
    )
    known = planted(task)
    for noise in NOISES:
        for count in counts:
            rows = []
            for e in ensembles(task, kind, count, noise, draws):
                plain = e.losses(checkpoints=False, prior=False)
                without = auto(plain)[0]
                base = e.judge(without)
                stages, value, raw = np.nan, np.nan, np.nan
                if not prior_alone:
                    quality = estimate(plain)
                    value, raw = quality.value, quality.raw
                    stages = e.judge(auto(e.losses(prior=False))[0]) if e.earlier is not None else np.nan
                score, weight = auto(e.losses(checkpoints=False))
                covariance = e.judge(fit(plain, "covariance").dense())
                both = e.judge(score)
                found = [np.nan if known is None else retrieval(s, known).average_precision for s in (without, score)]
                rows.append(
                    [covariance, base, stages, both, both - base, weight, value, raw, found[0], found[1] - found[0]]
                )
            if not rows:
                continue
            m, spread = np.mean(rows, axis=0), 1.96 * np.std(rows, axis=0) / np.sqrt(len(rows))
            cells = [f"{x:.3f}" if np.isfinite(x) else "-" for x in m]
            for place in (4, 9):
                if np.isfinite(m[place]):
                    cells[place] = f"{m[place]:+.4f} ± {spread[place]:.4f}"
            cells.insert(8, f"{m[6] - m[1]:+.3f}" if np.isfinite(m[6]) else "-")
            print(f"| {noise} | {count} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the report as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["digits", "fashion", "lm", "chat", "shout"])
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="numbers of members")
    parser.add_argument("--kinds", nargs="+", default=["base", "target"])
    parser.add_argument("--draws", type=int, default=20, help="ensembles of a cell")
    parser.add_argument("--prior-alone", action="store_true", help="leave out checkpoints and self_lds")
    arguments = parser.parse_args()
    chosen = {name: task for name, task in all_tasks(arguments.tasks).items() if name in arguments.tasks}
    for name, task in chosen.items():
        for kind in arguments.kinds:
            print(f"\n### {name}, members from {kind}\n", flush=True)
            table(task, kind, arguments.counts, arguments.draws, arguments.prior_alone)
    mislabelled(chosen)


def mislabelled(chosen: dict[str, Task]) -> None:
    """Average precision of finding wrong labels by self-influence (10 % of the labels are wrong)."""
    from tests.benchmarks.tasks import wrong_labels

    print("\n### Wrong labels found by self-influence: average precision (10 % are wrong)\n")
    print("| task | members | K | variance | memorised | mean loss |\n" + "|---" * 6 + "|")
    for name in ("digits", "fashion"):
        if name not in chosen:
            continue
        wrong = wrong_labels(name)
        for kind in ("base", "target"):
            for count in (10, 50):
                e = next(ensembles(chosen[name], kind, count, 0.0), None)
                if e is None:
                    continue
                found = self_influence(e.train, e.inclusion)
                columns = (found.variance_N, found.memorised_N, e.train.mean(axis=0))
                values = [average_precision(np.nan_to_num(c), wrong) for c in columns if c is not None]
                print(f"| {name} | {kind} | {count} | " + " | ".join(f"{v:.3f}" for v in values) + " |", flush=True)


if __name__ == "__main__":
    main()
