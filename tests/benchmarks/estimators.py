# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""The estimator study: every estimator on real fine-tunes, against retrained models.

    python -m tests.benchmarks.make_losses      # trains what the cache lacks, hours in all, can be interrupted
    python -m tests.benchmarks.estimators       # judges what is in the cache, minutes; prints Markdown

Each cell is the mean over ensembles (disjoint sets of K members) of the LDS against models retrained on random halves
that are members of no ensemble, averaged over seeds. A new estimator is judged by adding it to the registry.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # spinning threads on a busy machine cost a hundredfold

import numpy as np
from daunce_api.core.blocks import score_blocks
from daunce_api.core.heldout import HeldOut
from daunce_api.core.shrinkage import directions, shrinkage_of
from daunce_api.core.spectrum import Spectrum, spectrum_of, stabilised

import daunce_api
from daunce_api.core import (
    Checkpoints,
    Choice,
    MemberLosses,
    Setting,
    choose,
    member_losses,
    scores,
    self_influence,
    self_lds,
)
from daunce_api.core.choice import AMOUNTS
from daunce_api.core.estimators import ESTIMATORS
from daunce_api.core.quality import column_spearman, estimate
from daunce_api.evaluation import lds
from tests.benchmarks.tasks import CACHE, CHUNK, Task, all_tasks, chunk_files, joined, losses, read_chunk

COUNTS = (10, 25, 50, 100, 200)
NOISES = (0.0, 0.01, 0.03)
ENSEMBLES = 3
RIDGES = 10.0 ** np.arange(-2, 1.3, 0.25)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """K members with scoring noise added, and the truth."""

    train: np.ndarray
    test: np.ndarray
    inclusion: np.ndarray
    noise: float | None
    rho: float | None
    truth_inclusion: np.ndarray
    truth_loss: np.ndarray
    earlier: Checkpoints | None = None

    def judge(self, score: np.ndarray) -> float:
        """LDS of scores."""
        return float(column_spearman(-(self.truth_inclusion @ score), self.truth_loss).mean())

    def using(self, stages: Sequence[int]) -> Ensemble:
        """The same members with some of their earlier checkpoints only."""
        if self.earlier is None or not stages:
            return replace(self, earlier=None)
        pick = list(stages)
        return replace(self, earlier=Checkpoints(self.earlier.train_loss_SKN[pick], self.earlier.test_loss_SKM[pick]))


def cached(task: Task, kind: str, checkpoints: bool = False) -> dict[str, np.ndarray] | None:
    """What the cache holds of a kind, without training; None if nothing or an incomplete truth.

    With ``checkpoints`` only members whose earlier checkpoints are there too.
    """
    spec = task.kinds[kind]
    folder = CACHE / task.name / kind
    files = sorted(folder.glob("[0-9]*[0-9].npz"))
    if kind == "truth":
        return losses(task, kind) if len(files) * CHUNK >= spec.count * spec.seeds else None
    if checkpoints:
        files = [file for file in files if chunk_files(folder, int(file.stem))[1].exists()]
    if not files:
        return None
    return joined([read_chunk(chunk_files(folder, int(file.stem))) for file in files])


def ensembles(task: Task, kind: str, count: int, noise: float, checkpoints: bool = False) -> Iterator[Ensemble]:
    """Disjoint ensembles of one cell; with ``checkpoints`` of the members that have them."""
    members, truth = cached(task, kind, checkpoints), cached(task, "truth")
    if members is None or truth is None:
        return
    for index in range(min(ENSEMBLES, len(members["train"]) // count)):
        rows = slice(index * count, (index + 1) * count)
        rng = np.random.default_rng([index, count, int(1000 * noise)])
        train = members["train"][rows] + noise * rng.normal(size=members["train"][rows].shape)
        test = members["test"][rows] + noise * rng.normal(size=members["test"][rows].shape)
        earlier = None
        if "earlier_train" in members:
            sides = (members[f"earlier_{side}"][:, rows].astype(np.float64) for side in ("train", "test"))
            earlier = Checkpoints(*(loss + noise * rng.normal(size=loss.shape) for loss in sides))
        yield Ensemble(
            train,
            test,
            members["inclusion"][rows],
            noise or None,
            task.rho(kind),
            truth["inclusion"].astype(np.float64),
            truth["test"],
            earlier,
        )


class Filters:
    """Filter estimators of one ensemble, judged through K x K matrices instead of N x M scores."""

    def __init__(self, e: Ensemble) -> None:
        self.ensemble = e
        self.members = member_losses(e.train, e.test, e.inclusion, e.earlier)
        self.setting = Setting(noise=e.noise, rho=e.rho)
        self.spectrum: Spectrum = spectrum_of(self.members, self.setting)
        self.projected = (e.truth_inclusion @ self.members.train_rows().T) @ self.spectrum.u_RD

    def judge(self, phi: np.ndarray, log_offset: float | None = None) -> float:
        """LDS of ``A^T U diag(phi) U^T B``."""
        stages = self.members.stages
        b = stages.centre(np.concatenate([stabilised(x, log_offset) for x in self.members.test_stages]))
        return float(
            column_spearman(-(self.projected * phi) @ (self.spectrum.u_RD.T @ b), self.ensemble.truth_loss).mean()
        )

    def weighted(self, phi: np.ndarray, log_offset: float | None, amounts: Sequence[float]) -> float:
        """LDS of such scores drawn towards zero (`core.shrinkage`), by the amount that is best in hindsight."""
        members = self.members
        b = members.stages.centre(np.concatenate([stabilised(x, log_offset) for x in members.test_stages]))
        root = np.sqrt(phi)[:, None]
        left, right = (
            (root * (self.spectrum.u_RD.T @ x)).astype(np.float32) for x in (members.train_rows().astype(np.float64), b)
        )
        score, lengths = left.T @ right, [(x**2).sum(axis=0) for x in (left, right)]
        spread, every = directions(self.spectrum.w * phi), slice(None)
        return max(
            self.ensemble.judge(shrinkage_of(amount, spread, *lengths).shrunk(score, every, every))
            for amount in amounts
        )

    def named(self, name: str) -> float:
        """LDS of a registered filter at its own defaults."""
        entry = ESTIMATORS[name]
        assert entry.filter is not None
        phi = entry.filter(self.spectrum, self.setting)
        return self.judge(phi) if (phi > 0).any() else float("nan")

    def hindsight(self) -> float:
        """LDS of the best ridge, on plain or log losses, of plain scores: what nobody can know without the truth."""
        offsets = (None, 0.01 + 10 * (self.ensemble.noise or 0.0))
        entry = ESTIMATORS["whitened"]
        assert entry.filter is not None
        best = -1.0
        for ridge in RIDGES:
            phi = entry.filter(self.spectrum, Setting(noise=self.ensemble.noise, ridge=float(ridge)))
            best = max(best, *(self.judge(phi, offset) for offset in offsets))
        return best

    def best(self) -> float:
        """The same with scores drawn towards zero too, over fewer ridges and half_whitened, on log losses."""
        whitened, half = ESTIMATORS["whitened"].filter, ESTIMATORS["half_whitened"].filter
        assert whitened is not None
        assert half is not None
        known = Setting(noise=self.ensemble.noise)
        filters = [whitened(self.spectrum, replace(known, ridge=ridge)) for ridge in (0.1, 0.3, 1.0, 3.0, 10.0)]
        offset = 0.01 + 10 * (self.ensemble.noise or 0.0)
        amounts = [amount for amount in AMOUNTS if amount is not None]
        filters = [phi for phi in (*filters, half(self.spectrum, known)) if (phi > 0).any()]
        return max(self.hindsight(), *(self.weighted(phi, offset, amounts) for phi in filters))


def plain_scores(members: MemberLosses, choice: Choice) -> np.ndarray:
    """What was chosen, without drawing scores towards zero."""
    setting = replace(choice.setting, shrinkage=None)
    return np.asarray(score_blocks(choice.estimator, members, setting).block(slice(None), slice(None)))


def table(task: Task, kind: str, counts: Sequence[int]) -> None:
    """Print one Markdown table: rows are cells, columns are estimators."""
    print(
        "| noise | K | ensembles | covariance | correlation | inclusion | whitened 1 | half | matched | plain auto "
        "| **auto** | best plain ridge | best | auto / cov. | self_lds | error | raw |\n" + "|---" * 17 + "|",
        flush=True,
    )
    for noise in NOISES:
        for count in counts:
            rows = []
            for given in ensembles(task, kind, count, noise):
                e = given.using(())
                filters = Filters(e)
                members = filters.members
                known = {"noise": e.noise, "rho": e.rho}
                choice = choose(members, setting=Setting(**known))  # type: ignore[arg-type]
                score = scores(e.train, e.test, e.inclusion, **known)  # type: ignore[arg-type]
                auto = lds(score, e.truth_inclusion, e.truth_loss, draws=300)
                quality = self_lds(e.train, e.test, e.inclusion, **known)  # type: ignore[arg-type]
                assert quality.estimator == choice.estimator.name
                rows.append(
                    [
                        filters.named("covariance"),
                        e.judge(scores(e.train, e.test, estimator="correlation")),
                        e.judge(scores(e.train, e.test, e.inclusion, "inclusion")),
                        filters.named("whitened"),
                        filters.named("half_whitened"),
                        filters.named("matched") if e.rho else np.nan,
                        e.judge(plain_scores(members, choice)),
                        auto.value,
                        filters.hindsight(),
                        filters.best(),
                        quality.value,
                        quality.raw,
                        auto.low,
                        auto.high,
                    ]
                )
            if not rows:
                continue
            m = np.mean(rows, axis=0)
            cells = [f"{x:.3f}" if np.isfinite(x) else "-" for x in m]
            cells[7] = f"**{m[7]:.3f}** [{m[12]:.3f}, {m[13]:.3f}]"
            line = (
                f"| {noise} | {count} | {len(rows)} | "
                + " | ".join(cells[:10])
                + f" | {m[7] / m[0]:.2f} | {cells[10]} | {m[10] - m[7]:+.3f} | {cells[11]} |"
            )
            print(line, flush=True)


def checkpoint_table(task: Task, kind: str, counts: Sequence[int]) -> None:
    """Print one Markdown table: auto without and with the losses at earlier checkpoints of the same jobs."""
    steps = len(task.kinds[kind].recipe.checkpoints(round(task.kinds[kind].ratio * task.size)))
    sets = {
        "the last two": (steps - 2, steps - 1),
        "two, evenly": (round((steps + 1) / 3) - 1, round(2 * (steps + 1) / 3) - 1),
        "all": tuple(range(steps)) if steps <= 5 else tuple(range(0, steps, 2)),
    }
    names = [
        name if name != "all" else f"all ({steps})" if steps <= 5 else f"{len(sets[name])} of {steps}" for name in sets
    ]
    print(
        "| noise | K | ensembles | covariance | auto | "
        + " | ".join(f"covariance, {n} | auto, {n}" for n in names)
        + " | plain auto | best plain ridge | best | auto / cov. | self_lds | error | used |\n"
        + "|---" * (12 + 2 * len(sets))
        + "|",
        flush=True,
    )
    for noise in NOISES:
        for count in counts:
            rows = []
            for e in ensembles(task, kind, count, noise, checkpoints=True):
                rows.append(_checkpoint_row(e, list(sets.values())))
            if rows:
                *m, auto, low, high, plain, ridge, best, quality, used = np.mean(rows, axis=0)
                shown = " | ".join(f"{x:.3f}" for x in m)
                shown += f" | **{auto:.3f}** [{low:.3f}, {high:.3f}] | {plain:.3f} | {ridge:.3f} | {best:.3f}"
                print(
                    f"| {noise} | {count} | {len(rows)} | {shown} | {auto / m[0]:.2f} | {quality:.3f} "
                    f"| {quality - auto:+.3f} | {used:.2f} |",
                    flush=True,
                )


def _checkpoint_row(e: Ensemble, sets: list[tuple[int, ...]]) -> list[float]:
    row: list[float] = []
    for stages in ((), *sets):
        part = e.using(stages)
        filters = Filters(part)
        choice = choose(filters.members, setting=filters.setting)
        score = score_blocks(choice.estimator, filters.members, choice.setting).block(slice(None), slice(None))
        row += [filters.named("covariance"), part.judge(score)]
    quality = estimate(HeldOut(filters.members), (choice.estimator, choice.setting))
    interval = lds(score, e.truth_inclusion, e.truth_loss, draws=300)
    plain = e.judge(plain_scores(filters.members, choice))
    found = [interval.low, interval.high, plain, filters.hindsight(), filters.best()]
    return [*row, *found, quality.value, float(choice.setting.checkpoints)]


# --- other questions --------------------------------------------------------------------------------------------------


def _average_precision(score_N: np.ndarray, relevant_N: np.ndarray) -> float:
    hits = relevant_N[np.argsort(-score_N, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def retrieval_table(task: Task) -> list[str]:
    """Average precision of the planted examples of the demo data, by estimator and K, mean over planted test
    examples."""
    folder = Path(daunce_api.__file__).parent / "cli" / "demo" / "data"
    planted = {
        side: np.array(
            [json.loads(line)["source"] == "planted" for line in (folder / f"{side}.jsonl").read_text().splitlines()]
        )
        for side in ("train", "test")
    }
    lines = ["| K | " + " | ".join(ESTIMATORS) + " |", "|---" * (len(ESTIMATORS) + 1) + "|"]
    for count in (8, 16, 24, 50):
        for checkpoints in (False, True):
            cells: dict[str, list[float]] = {name: [] for name in ESTIMATORS if name != "matched"}
            for given in ensembles(task, "base", count, 0.0):
                e = given if checkpoints else given.using(())
                for name, values in cells.items():
                    score = scores(e.train, e.test, e.inclusion, name, earlier=e.earlier)
                    columns = np.flatnonzero(planted["test"])
                    values.append(float(np.mean([_average_precision(score[:, j], planted["train"]) for j in columns])))
            if any(cells.values()):
                shown = [f"{np.mean(cells[name]):.2f}" if name in cells else "-" for name in ESTIMATORS]
                label = f"{count}, with all checkpoints" if checkpoints else count
                lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return lines


def main() -> None:
    """Print the report as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["digits", "fashion", "lm", "resnet"])
    parser.add_argument("--checkpoints", action="store_true", help="the tables of earlier checkpoints instead")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="numbers of members")
    parser.add_argument("--kinds", nargs="+", default=["base", "target"])
    arguments = parser.parse_args()
    tasks = {name: task for name, task in all_tasks().items() if name in arguments.tasks}
    for name, task in tasks.items():
        for kind in arguments.kinds:
            rho = task.rho(kind)
            print(f"\n### {name}, members from {kind}" + (f" (rho = {rho:.3f})" if rho else "") + "\n", flush=True)
            if arguments.checkpoints:
                checkpoint_table(task, kind, arguments.counts)
            else:
                table(task, kind, arguments.counts)
    if arguments.checkpoints:
        return
    if "lm" in tasks:
        print("\n### Planted examples: average precision\n")
        print("\n".join(retrieval_table(tasks["lm"])), flush=True)
    mislabelled(tasks)


def mislabelled(tasks: dict[str, Task]) -> None:
    """Average precision of finding wrong labels by self-influence (10 % of the labels are wrong)."""
    from tests.benchmarks.tasks import wrong_labels

    print("\n### Wrong labels found by self-influence: average precision (10 % are wrong)\n")
    print("| task | members | K | variance | within | memorised | mean loss |\n" + "|---" * 7 + "|")
    for name in ("digits", "fashion"):
        if name not in tasks:
            continue
        wrong = wrong_labels(name)
        for kind in ("base", "target"):
            for count in (10, 50):
                e = next(ensembles(tasks[name], kind, count, 0.0), None)
                if e is None:
                    continue
                found = self_influence(e.train, e.inclusion)
                columns = (found.variance_N, found.within_N, found.memorised_N, e.train.mean(axis=0))
                values = [_average_precision(np.nan_to_num(c), wrong) for c in columns if c is not None]
                print(f"| {name} | {kind} | {count} | " + " | ".join(f"{v:.3f}" for v in values) + " |", flush=True)


if __name__ == "__main__":
    main()
