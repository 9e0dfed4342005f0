# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""What was tried and is not in the registry: ``python -m tests.benchmarks.ideas``, on what make_losses.py cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice, product

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np

from daunce_api.core import Checkpoints, Setting, member_losses
from daunce_api.core.checkpoints import centred
from daunce_api.core.shrinkage import directions
from daunce_api.core.spectrum import shrunk, spectrum_of, stabilised
from tests.benchmarks.estimators import Ensemble, ensembles
from tests.benchmarks.tasks import Task, all_tasks

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)


def _ridge(a: np.ndarray, b: np.ndarray, gram: np.ndarray, ridge: float) -> np.ndarray:
    return np.asarray(a.T @ np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), b))


def variants(e: Ensemble) -> dict[str, Callable[[float], np.ndarray]]:
    """Ideas as functions of a ridge; each is judged at its best ridge in hindsight, beside plain ridge at its best."""
    a, b = centred(e.train), centred(e.test)
    m = e.inclusion - e.inclusion.mean(axis=0)
    sd = a.std(axis=0) + 1e-12
    log_b = centred(stabilised(e.test, 0.01 + 10 * (e.noise or 0.0)))
    own = a - m * ((m * a).sum(axis=0) / (m**2).sum(axis=0))
    clipped, clipped_b = (
        np.clip(x, np.median(x, 0) - 2.5 * x.std(0), np.median(x, 0) + 2.5 * x.std(0)) for x in (e.train, e.test)
    )
    cross = -(m @ a.T)
    nystrom = (cross + cross.T) / 2
    w, u = np.linalg.eigh(nystrom)
    psd = (u * np.maximum(w, 0)) @ u.T
    return {
        "ridge": lambda r: _ridge(a, b, a @ a.T, r),
        "ridge, log test losses (in auto)": lambda r: _ridge(a, log_b, a @ a.T, r),
        "losses and inclusion: Nystrom, A^T (M A^T)^-1 B": lambda r: _ridge(a, b, psd, r),
        "losses and inclusion: regression on subsets within the span of A": lambda r: (
            a.T
            @ (cross.T @ np.linalg.solve(cross @ cross.T + r * np.trace(cross @ cross.T) / len(a) * np.eye(len(a)), b))
        ),
        "double centring": lambda r: _ridge(a - a.mean(axis=1, keepdims=True), b, centred(a.T).T @ centred(a.T), r),
        "losses clipped at 2.5 sd": lambda r: _ridge(
            centred(clipped), centred(clipped_b), centred(clipped) @ centred(clipped).T, r
        ),
        "columns weighted by 1 / sd in the Gram matrix": lambda r: _ridge(a, b, (a / sd) @ a.T, r),
        "columns weighted by 1 / variance in the Gram matrix": lambda r: _ridge(a, b, (a / sd**2) @ a.T, r),
        "test losses in the Gram matrix too": lambda r: _ridge(a, b, a @ a.T + b @ b.T, r),
        "own membership taken out of each column": lambda r: _ridge(own, b, own @ own.T, r),
        "own membership taken out of the Gram matrix only": lambda r: _ridge(a, b, own @ own.T, r),
        "response (1 - exp(-c f)) / f instead of a ridge": lambda r: _saturating(e, log_b),
    }


def variant_table(tasks: dict[str, Task]) -> list[str]:
    """Best LDS over the ridge for each idea, one ensemble of K = 50 a column."""
    columns: dict[str, dict[str, float]] = {}
    for name, task in tasks.items():
        for kind in ("base", "target"):
            for noise in (0.0, 0.03):
                e = next(ensembles(task, kind, 50, noise), None)
                if e is not None:
                    made = variants(e)
                    columns[f"{name} {kind} {noise}"] = {
                        idea: max(e.judge(make(r)) for r in RIDGES) for idea, make in made.items()
                    }
    if not columns:
        return []
    ideas = list(next(iter(columns.values())))
    lines = ["| idea | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {idea} | " + " | ".join(f"{c[idea]:.3f}" for c in columns.values()) + " |" for idea in ideas]
    return lines


def _saturating(e: Ensemble, b: np.ndarray) -> np.ndarray:
    """Scores under R = (1 - exp(-c f)) / f for members and target, f read off the spectrum (METHOD item 6).

    f R = 1 - exp(-c f) cannot exceed 1; where the measured response does, it is taken for .999.
    """
    members = member_losses(e.train, e.test, e.inclusion)
    spectrum = spectrum_of(members, Setting(noise=e.noise))
    scale = spectrum.stages.rows * (spectrum.dispersion or 1.0)
    target_over_member = 1.0 if e.rho is None else 1 / e.rho

    def phi(s: np.ndarray) -> np.ndarray:
        member = np.minimum(np.sqrt(s / scale), 0.999)
        target = 1 - (1 - member) ** target_over_member
        return np.asarray(target / member**2)

    weight = shrunk(phi, spectrum)[:, None]
    return np.asarray(centred(e.train).T @ (spectrum.u_RD @ (weight * (spectrum.u_RD.T @ b))))


def shrinkage_table(tasks: dict[str, Task]) -> list[str]:
    """Columns shrunk by what of their variance is scoring noise, K = 50, means of ensembles, each at its best ridge.

    The noise is known: .03 for every loss ("even"), or .03 x log-normal, sigma 1, for training examples ("uneven").
    """
    lines = [
        "| task | members | noise | checkpoints | ridge | Gram matrix weighted by precision | columns x kept "
        "| columns x kept^1/2 |",
        "|---" * 8 + "|",
    ]
    for name, task in tasks.items():
        for kind in ("base", "target"):
            for even in (True, False):
                for checkpoints in (False, True):
                    rows = [
                        _shrinkage(e, index, even, checkpoints)
                        for index, e in enumerate(ensembles(task, kind, 50, 0.0))
                        if e.earlier is not None or not checkpoints
                    ]
                    if rows:
                        shown = " | ".join(f"{x:.3f}" for x in np.mean(rows, axis=0))
                        noise, used = "even" if even else "uneven", "the last two" if checkpoints else "none"
                        lines.append(f"| {name} | {kind} | {noise} | {used} | {shown} |")
    return lines


def _shrinkage(e: Ensemble, index: int, even: bool, checkpoints: bool) -> list[float]:
    rng = np.random.default_rng([index, 99])
    sigma = 0.03 * (np.ones(e.train.shape[1]) if even else np.exp(rng.normal(size=e.train.shape[1])))

    def noisy(loss: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
        return loss + scale * rng.normal(size=loss.shape)

    earlier = None
    if checkpoints and e.earlier is not None:
        last = e.using((len(e.earlier) - 2, len(e.earlier) - 1)).earlier
        assert last is not None
        earlier = Checkpoints(noisy(last.train_loss_SKN, sigma), noisy(last.test_loss_SKM, 0.03))
    members = member_losses(noisy(e.train, sigma), noisy(e.test, 0.03), e.inclusion, earlier)
    a, b = members.train_rows(), members.test_rows()
    variance = (a**2).sum(axis=0) / members.stages.freedom
    kept = np.maximum(variance - sigma**2, 0) / variance
    weight = 1 / (sigma**2 + np.maximum(variance - sigma**2, 0).mean())
    plain = a @ a.T
    made = [(a, plain), (a, (a * weight) @ a.T), (a * kept, plain), (a * np.sqrt(kept), plain)]
    return [max(e.judge(_ridge(left, b, gram, r)) for r in RIDGES) for left, gram in made]


def weight_table(tasks: dict[str, Task]) -> list[str]:
    """Ways of drawing scores towards zero, K = 50, means of two ensembles, each at its best ridge and amount.

    z^2 / (z^2 + c) is the library's; "of products" takes for chance the pair's own products, ``sum_r (a_r b_r)^2``.
    "Less of the member's mean" scales the part that a member's rows have in common by .5 before everything else, since
    rows of one member share its luck; "subsets too" adds the overlap of subsets to the Gram matrix.
    """
    names = ("plain", "z^2 / (z^2 + c)", "z^4 / (z^4 + c^2)", "max(1 - c / z^2, 0)", "of products")
    names += ("less of the member's mean", "subsets too")
    lines = [f"| task | members | noise | checkpoints | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for name, task in tasks.items():
        for kind, noise, checkpoints in product(("base", "target"), (0.0, 0.03), (False, True)):
            drawn = islice(ensembles(task, kind, 50, noise, checkpoints=True), 2)
            rows = [_weights(e if checkpoints else e.using(())) for e in drawn]
            if rows:
                shown = " | ".join(f"{x:.3f}" for x in np.mean(rows, axis=0))
                lines.append(f"| {name} | {kind} | {noise} | {'all' if checkpoints else 'none'} | {shown} |")
    return lines


def _weights(e: Ensemble) -> list[float]:
    members = member_losses(e.train, e.test, e.inclusion, e.earlier)
    stages = members.stages
    log_b = stages.centre(np.concatenate([stabilised(x, 0.01 + 10 * (e.noise or 0.0)) for x in members.test_stages]))
    sides = members.train_rows().astype(np.float64), log_b
    best = np.full(7, -1.0)

    def common(side: np.ndarray) -> np.ndarray:
        rows = side.reshape(stages.count, stages.members, -1)
        return (rows - 0.5 * rows.mean(axis=0)).reshape(side.shape)

    subsets = np.tile(e.inclusion - e.inclusion.mean(axis=0), (stages.count, 1))
    overlap = subsets @ subsets.T / np.trace(subsets @ subsets.T)
    for which, (a, b) in enumerate((sides, tuple(map(common, sides)), sides)):
        gram = a @ a.T
        gram += np.trace(gram) * overlap if which == 2 else 0
        w, u = np.linalg.eigh(gram)
        for ridge in (0.1, 0.3, 1.0, 3.0, 10.0):
            root = (1 / np.sqrt(np.maximum(w, 0) + ridge * w.mean()))[:, None] * u.T
            left, right = (root @ side for side in (a, b))
            score = left.T @ right
            chance = np.outer((left**2).sum(axis=0), (right**2).sum(axis=0))
            spread = directions(w / (np.maximum(w, 0) + ridge * w.mean()))
            z2 = score**2 * spread / np.maximum(chance, 1e-300)
            own = score**2 / np.maximum((left**2).T @ (right**2), 1e-300)
            for c in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
                first = [np.ones_like(z2), z2 / (z2 + c), z2**2 / (z2**2 + c**2), np.maximum(1 - c / (z2 + 1e-12), 0)]
                weights = [*first, own / (own + c)] if which == 0 else [first[1]]
                places = range(5) if which == 0 else [4 + which]
                for place, weight in zip(places, weights, strict=True):
                    best[place] = max(best[place], e.judge(score * weight))
    return best.tolist()


def main() -> None:
    """Print the tables as Markdown."""
    tasks = all_tasks()
    print("### Ways of drawing scores towards zero\n")
    print("\n".join(weight_table(tasks)), flush=True)
    print("\n### Columns shrunk by their scoring noise\n")
    print("\n".join(shrinkage_table(tasks)), flush=True)
    print("\n### Ideas that were tried, each at its best ridge in hindsight (K = 50, one ensemble)\n")
    print("\n".join(variant_table(tasks)), flush=True)


if __name__ == "__main__":
    main()
