# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Finite K against the rank of the gradients: do filters of the sample's eigenvalues want shrinking first?

    python -m tests.benchmarks.finite_rank              # simulated linear models, then what make_losses.py cached

Written up in RESULTS-estimators.md, "The derivation". With rows of second moment T (eigenvalues tau, K members,
G = X X^T) a ridge acts in expectation as T (T + kappa)^-1, 1 / kappa = tr (G + c)^-1. Beside the library's filters:
`expected` (right in expectation), `nonlinear` (Ledoit and Peche's shrunk eigenvalues, then phi) and, where truth is
known, `oracle` (the best filter of the sample's eigenvectors).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from daunce_api.core.quality import column_spearman
from daunce_api.core.spectrum import Spectrum, shrunk, stabilised
from tests.benchmarks.estimators import COUNTS, Ensemble, Filters, ensembles
from tests.benchmarks.tasks import Task, all_tasks

Phi = Callable[[np.ndarray], np.ndarray]


def wanted(tau: np.ndarray, dispersion: float, rho: float | None) -> np.ndarray:
    """f R_T of METHOD item 6, from tau = dispersion (f R)^2: what a direction's weight tau phi should be."""
    root = np.sqrt(tau)
    return root if rho is None else np.asarray(root / (root / np.sqrt(dispersion) + rho))


def expected(w: np.ndarray, dispersion: float, rho: float | None) -> np.ndarray:
    """The filter that is right in expectation: wanted(tau) = int nu(t) tau / (tau + t) dt, each t reached by its c.

    What lies below kappa(0), where K members cannot tell directions apart, goes to the smallest ridge.
    """
    ridges = np.geomspace(w[-1] * 1e-4, w.sum() * 1e5, 400)
    kappa = 1 / (1 / (w + ridges[:, None])).sum(axis=1)
    if rho is None:
        below = 2 * np.sqrt(kappa) / np.pi
    else:
        below = 2 * np.sqrt(dispersion) / np.pi * np.arctan(np.sqrt(kappa / dispersion) / rho)
    middle = np.sqrt(ridges[1:] * ridges[:-1])
    return np.asarray((np.diff(below) / (w[:, None] + middle)).sum(axis=1) + below[0] / (w + ridges[0]))


def nonlinear(w: np.ndarray, dispersion: float, rho: float | None) -> np.ndarray:
    """phi on shrunk eigenvalues: v^T T v for the sample's directions v, estimated at w - i w D^-1/2."""
    z = -w + 1j * w / np.sqrt(w.size)
    inverse = (1 / (w + z[:, None])).sum(axis=1)
    # kappa = 1 / inverse, and sum tau / (tau + kappa) = D - z / kappa.
    tau = ((w.size - z * inverse) / (z * inverse)).imag / inverse.imag
    return wanted(np.maximum(tau, 1e-12 * w[0]), dispersion, rho) / w


def simulated(decay: float, rank: int, count: int, rho: float | None, seed: int, lead: float = 30.0) -> list[float]:
    """Correlation of predictions with exact influence on halves of 1,000 examples, gradients of spectrum d^-decay.

    ``lead`` is f / d of the leading direction; members from the base without rho, else short ones from the target.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, rank + 1.0) ** -decay
    train, test = (rng.normal(size=(n, rank)) * np.sqrt(spectrum) for n in (1000, 60))
    f, v = np.linalg.eigh(train.T @ train / 1000)
    f, train, test = np.maximum(f, 1e-15), train @ v, test @ v
    target = 1 / (f + f[-1] / lead)
    ratio, response = (0.5, target) if rho is None else (0.3, np.full(rank, rho * lead / f[-1]))
    masks = np.stack([rng.permutation(1000) < ratio * 1000 for _ in range(count)])
    moved = (masks - ratio) @ train / (ratio * 1000) * response
    moved -= moved.mean(axis=0)
    a, b = moved @ train.T, moved @ test.T
    w, u = np.linalg.eigh(a @ a.T)
    w, u = w[:0:-1], u[:, :0:-1]
    halves = np.stack([rng.permutation(1000) < 500 for _ in range(200)]) - 0.5
    truth, projected, tests = halves @ (train * target) @ test.T, halves @ a.T @ u, u.T @ b

    def judge(phi: np.ndarray) -> float:
        found = (projected * phi) @ tests
        return float(np.mean([np.corrcoef(found[:, j], truth[:, j])[0, 1] for j in range(60)]))

    dispersion = (1 - ratio) / ratio
    share = (u.T @ (moved * np.sqrt(f))) ** 2
    share /= share.sum(axis=1, keepdims=True)
    oracle = share @ wanted(dispersion * (f * response) ** 2, dispersion, rho) / w
    filters = [
        np.ones_like(w),
        w**-0.5,
        wanted(w / count, dispersion, rho) / w,
        expected(w, dispersion, rho),
        nonlinear(w, dispersion, rho),
        oracle,
    ]
    return [*map(judge, filters), max(judge(1 / (w + x * w.mean())) for x in 10.0 ** np.arange(-3, 1.3, 0.25))]


def simulated_table() -> None:
    """Print the simulated cells, means of three draws."""
    head = "members | decay | rank | K | covariance | half_whitened | matched | expected | nonlinear | oracle"
    print(f"| {head} | best ridge |\n" + "|---" * 11 + "|")
    for rho in (None, 0.05):
        for decay, rank in ((0.0, 400), (0.5, 400), (1.0, 400), (2.0, 400)):
            for count in (10, 50, 200):
                values = np.mean([simulated(decay, rank, count, rho, seed) for seed in range(3)], axis=0)
                shown = " | ".join(f"{x:.3f}" for x in values)
                print(f"| {'base' if rho is None else 'target'} | {decay:g} | {rank} | {count} | {shown} |", flush=True)


def candidates(f: Filters) -> dict[str, float]:
    """LDS less that of the best ridge in hindsight, test losses on the log scale."""
    spectrum, rho, noise = f.spectrum, f.setting.rho, f.ensemble.noise or 0.0
    known = spectrum.dispersion
    assert known is not None

    def matched(times: float) -> Phi:
        return lambda s: wanted(s / spectrum.stages.rows, known, rho and rho * times) / s

    filters: dict[str, Phi] = {"half_whitened": lambda s: s**-0.5}
    filters |= {f"matched, rho x {x}": matched(x) for x in ((1, 2, 3) if rho else ())}
    filters |= {
        "expected": lambda s: expected(s, known, rho and 2 * rho),
        "nonlinear": lambda s: nonlinear(s, known, rho and 2 * rho),
    }
    best, offset = f.hindsight(), 0.01 + 10 * noise
    out = {name: f.judge(shrunk(phi, spectrum), offset) - best for name, phi in filters.items()}
    if noise:
        for name in ("half_whitened", "matched, rho x 2"):
            if name in filters:
                out[f"{name}, each test example by its noise"] = by_test(f, filters[name], offset) - best
    return out


def by_test(f: Filters, phi: Phi, offset: float) -> float:
    """LDS of a filter with a Wiener weight for every test example on its own side: (s / w)^2 s x / (s x + sigma^2) phi.

    x is the share of the signal that a test example has, (its squares - sigma^2 D) / sum s.
    """
    spectrum: Spectrum = f.spectrum
    stages, sigma = f.members.stages, f.ensemble.noise or 0.0
    b = stages.centre(np.concatenate([stabilised(x, offset) for x in f.members.test_stages]))
    energy = sigma**2 * stages.freedom
    share = np.maximum((b**2).sum(axis=0) - energy, 1e-3 * energy) / spectrum.signal.sum()
    seen = spectrum.signal[:, None] * share
    weight = shrunk(phi, spectrum)[:, None] * seen / (seen + sigma**2)
    return float(column_spearman(-f.projected @ (weight * (spectrum.u_RD.T @ b)), f.ensemble.truth_loss).mean())


def regret_table(tasks: dict[str, Task], counts: Sequence[int]) -> None:
    """Print mean, worst and the number of cells more than .02 off, over tasks and K."""
    print(
        "| members | checkpoints | noise | filter | cells | mean | worst | more than .02 below |\n" + "|---" * 8 + "|"
    )
    for kind in ("base", "target"):
        for checkpoints in (False, True):
            for noise in (0.0, 0.03):
                found: dict[str, list[float]] = {}
                for task in tasks.values():
                    for count in counts:
                        cells = [candidates(Filters(e)) for e in _cell(task, kind, count, noise, checkpoints)]
                        for name in cells[0] if cells else ():
                            found.setdefault(name, []).append(float(np.nanmean([c[name] for c in cells])))
                for name, values in found.items():
                    below = sum(v < -0.02 for v in values)
                    print(
                        f"| {kind} | {'all' if checkpoints else 'none'} | {noise} | {name} | {len(values)} "
                        f"| {np.mean(values):+.4f} | {min(values):+.3f} | {below} |",
                        flush=True,
                    )


def _cell(task: Task, kind: str, count: int, noise: float, checkpoints: bool) -> Iterator[Ensemble]:
    for e in ensembles(task, kind, count, noise, checkpoints):
        steps = 0 if e.earlier is None or not checkpoints else len(e.earlier)
        yield e.using(tuple(range(steps)) if steps <= 5 else tuple(range(0, steps, 2)))


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["digits", "fashion", "lm"])
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="numbers of members")
    arguments = parser.parse_args()
    print("### Shrinkage: simulated linear models\n")
    simulated_table()
    print("\n### Shrinkage: filters without a parameter against the best ridge in hindsight\n")
    regret_table({name: task for name, task in all_tasks().items() if name in arguments.tasks}, arguments.counts)


if __name__ == "__main__":
    main()
