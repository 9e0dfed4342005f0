# ruff: noqa: E402 - thread counts are set before NumPy is imported
"""Other recipes for the digits task: wrong labels, optimisers, learning rates.

    python -m tests.benchmarks.recipes --train    # trains what the cache lacks, minutes, can be interrupted
    python -m tests.benchmarks.recipes            # judges what is in the cache; prints one Markdown table a question

The questions: what f R, rho and the two second moments are; how good every filter is, and what `auto` loses against the
best ridge in hindsight; which rho `matched` would want. METHOD item 6 in `daunce_api.core` says what is expected.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import torch

from daunce_api.core import Setting, choose
from daunce_api.core.estimators import ESTIMATORS, matched_filter
from tests.benchmarks.estimators import Filters, cached, ensembles
from tests.benchmarks.tasks import Recipe, Task, digits_classifier, digits_task, logits, losses

MEMBERS, SEEDS = 200, 5
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
NOISES = (0.0, 0.03)
FILTERS = ("covariance", "half_whitened", "whitened", "matched")


@dataclass(frozen=True)
class Variant:
    """The digits task with other labels or another recipe."""

    words: str
    target: Recipe
    wrong: float = 0.1

    @property
    def task(self) -> Task:
        """The task; the one of the estimator study where nothing differs."""
        if self == PLAIN:
            return digits_task("digits", self.target)
        name = "recipes-" + self.words.replace(" ", "-").replace("%", "").replace(",", "")
        return digits_task(name, self.target, self.wrong, MEMBERS, SEEDS)


PLAIN = Variant("SGD .1, 10 % wrong", Recipe(6, 25, 0.1))
VARIANTS = (
    Variant("SGD .1, 0 % wrong", PLAIN.target, 0.0),
    PLAIN,
    Variant("SGD .1, 30 % wrong", PLAIN.target, 0.3),
    Variant("SGD .01", Recipe(6, 25, 0.01)),
    Variant("SGD .03", Recipe(6, 25, 0.03)),
    Variant("SGD .3", Recipe(6, 25, 0.3)),
    Variant("momentum .01", Recipe(6, 25, 0.01, momentum=0.9)),
    Variant("momentum .03", Recipe(6, 25, 0.03, momentum=0.9)),
    Variant("AdamW .0003", Recipe(6, 25, 3e-4, adam=True)),
    Variant("AdamW .001", Recipe(6, 25, 1e-3, adam=True)),
    Variant("AdamW .003", Recipe(6, 25, 3e-3, adam=True)),
)


def moments(variant: Variant) -> tuple[float, float, float]:
    """tr F / tr H at the target, then v F v / v H v over F's leading 10 and next 40 directions v.

    F is the second moment of the training gradients, H the Gauss-Newton curvature of the loss: the same with labels
    drawn from the model.
    """
    classifier = digits_classifier(variant.target, variant.wrong)
    w1, b1, w2, _ = (w[0].double().numpy() for w in classifier.start("target", 1, np.array([0])))
    x, y = classifier.data["x"].double().numpy(), classifier.data["y"].numpy()
    hidden = np.maximum(x @ w1 + b1, 0)
    logits = hidden @ w2 + classifier.start("target", 1, np.array([0]))[3][0].double().numpy()
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)

    def gradients(d_NC: np.ndarray) -> np.ndarray:
        back = (d_NC @ w2.T) * (hidden > 0)
        parts = [(x[:, :, None] * back[:, None, :]), back, hidden[:, :, None] * d_NC[:, None, :], d_NC]
        return np.concatenate([part.reshape(len(x), -1) for part in parts], axis=1)

    observed = gradients(p - np.eye(p.shape[1])[y])
    _, s, vt = np.linalg.svd(observed, full_matrices=False)
    fisher, curvature, total = s[:50] ** 2, np.zeros(50), 0.0
    for c in range(p.shape[1]):
        drawn = gradients(p - np.eye(p.shape[1])[c]) * np.sqrt(p[:, [c]])
        curvature += ((drawn @ vt[:50].T) ** 2).sum(axis=0)
        total += float((drawn**2).sum())
    lead, rest = (float(fisher[part].sum() / curvature[part].sum()) for part in (slice(10), slice(10, 50)))
    return float((s**2).sum()) / total, lead, rest


def drawn(task: Task, kind: str, count: int, noise: float) -> list[Filters]:
    """The ensembles of one cell, final models alone."""
    return [Filters(e.using(())) for e in ensembles(task, kind, count, noise)]


def response_table() -> None:
    """What the two second moments, f R and rho are, K = 50."""
    head = "recipe | tr F / tr H | leading 10 | next 40 | members | correlation of two seeds of one subset | rho"
    print(f"| {head} | leading f R | median f R | f R / rho |\n" + "|---" * 10 + "|")
    for variant in VARIANTS:
        ratio = " | ".join(f"{x:.2f}" for x in moments(variant))
        truth = cached(variant.task, "truth")
        for kind in ("base", "target"):
            cells = drawn(variant.task, kind, 50, 0.0)
            if not cells or truth is None:
                continue
            rho = variant.task.rho(kind)
            response = [f.spectrum.response for f in cells]
            lead, middle = (float(np.mean([pick(r) for r in response])) for pick in (np.max, np.median))
            shown = (
                f"{rho:.3f} | {lead:.2f} | {middle:.2f} | {lead / rho:.0f}"
                if rho
                else f"- | {lead:.2f} | {middle:.2f} | -"
            )
            print(
                f"| {variant.words} | {ratio} | {kind} | {reliability(truth['per_seed']):.2f} | {shown} |", flush=True
            )


def reliability(per_seed: np.ndarray) -> float:
    """Mean correlation of two seeds of one subset: what is not luck in a single run."""
    centred = per_seed - per_seed.mean(axis=0)
    luck = (centred - centred.mean(axis=1, keepdims=True)).var(axis=1, ddof=1).mean(axis=0)
    whole = centred.mean(axis=1).var(axis=0, ddof=1) - luck / per_seed.shape[1]
    return float(np.mean(whole / (whole + luck)))


def filter_table(counts: tuple[int, ...]) -> None:
    """LDS of every filter and of `auto`, and what `auto` loses against the best ridge in hindsight."""
    print(
        "| recipe | members | noise | K | ensembles | "
        + " | ".join(FILTERS)
        + " | **auto** | best ridge in hindsight | auto less best ridge |"
    )
    print("|---" * (8 + len(FILTERS)) + "|")
    for variant in VARIANTS:
        for kind in ("base", "target"):
            for noise in NOISES:
                for count in counts:
                    rows = [_row(f) for f in drawn(variant.task, kind, count, noise)]
                    if rows:
                        *named, auto, best = np.mean(rows, axis=0)
                        shown = " | ".join(f"{x:.3f}" if np.isfinite(x) else "-" for x in named)
                        print(
                            f"| {variant.words} | {kind} | {noise} | {count} | {len(rows)} | {shown} | **{auto:.3f}** "
                            f"| {best:.3f} | {auto - best:+.3f} |",
                            flush=True,
                        )


def _row(f: Filters) -> list[float]:
    named = [f.named(n) if f.setting.rho or not ESTIMATORS[n].needs_rho else np.nan for n in FILTERS]
    choice = choose(f.members, setting=f.setting)
    assert choice.estimator.filter is not None
    auto = f.judge(choice.estimator.filter(f.spectrum, choice.setting), choice.setting.log_offset)
    return [*named, auto, f.hindsight()]


def preconditioned_time(variant: Variant, start: str, recipe: Recipe, ratio: float) -> float:
    """Sum over AdamW's steps of the learning rate / (sqrt(v) + eps), mean over weights by their share of tr F."""
    classifier = digits_classifier(variant.target, variant.wrong)
    target = classifier.start("target", 1, np.array([0]))
    x, y = classifier.data["x"], classifier.data["y"]
    weights = [
        w.clone().requires_grad_(True)
        for w in (target if start == "target" else classifier.start(start, 1, np.array([0])))
    ]
    optimiser = torch.optim.AdamW(weights)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(x))[: round(ratio * len(x))]
    rates = recipe.rates(len(chosen))
    total = [torch.zeros_like(w) for w in weights]
    for epoch in np.split(rates, recipe.epochs):
        for rate, batch in zip(epoch, np.array_split(rng.permutation(chosen), len(epoch)), strict=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits(weights, x[batch])[0], y[batch]).backward()
            optimiser.param_groups[0]["lr"] = float(rate)
            optimiser.step()
            for time_, w in zip(total, weights, strict=True):
                state = optimiser.state[w]
                time_.add_(rate / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8))
    fisher = [torch.zeros_like(w) for w in weights]
    live = [w.clone().requires_grad_(True) for w in target]
    for i in range(len(x)):
        loss = torch.nn.functional.cross_entropy(logits(live, x[i : i + 1])[0], y[i : i + 1])
        for square, g in zip(fisher, torch.autograd.grad(loss, live), strict=True):
            square.add_(g**2)
    whole = sum(float(square.sum()) for square in fisher)
    return sum(float((square * time_).sum()) for square, time_ in zip(fisher, total, strict=True)) / whole


def adam_table() -> None:
    """AdamW: rho in units of the preconditioner over rho in units of the learning rate."""
    print("| recipe | rho | with the preconditioner | ratio |\n" + "|---" * 4 + "|")
    for variant in VARIANTS:
        rho, member = variant.task.rho("target"), variant.task.kinds["target"]
        if variant.target.adam and rho:
            own = preconditioned_time(variant, "target", member.recipe, member.ratio)
            whole = preconditioned_time(variant, "base", variant.target, 1.0)
            print(f"| {variant.words} | {rho:.3f} | {own / whole:.3f} | {own / whole / rho:.2f} |", flush=True)


def rho_table() -> None:
    """LDS of `matched` with rho times a factor, K = 50, no noise, log test losses."""
    print("| recipe | rho | " + " | ".join(f"x {x:g}" for x in FACTORS) + " |\n" + "|---" * (2 + len(FACTORS)) + "|")
    for variant in VARIANTS:
        cells = drawn(variant.task, "target", 50, 0.0)
        rho = variant.task.rho("target")
        if cells and rho:
            values = [
                np.mean([f.judge(matched_filter(f.spectrum, Setting(rho=rho * x)), 0.01) for f in cells])
                for x in FACTORS
            ]
            print(f"| {variant.words} | {rho:.3f} | " + " | ".join(f"{v:.3f}" for v in values) + " |", flush=True)


def main() -> None:
    """Train, or print the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", action="store_true", help="fill the cache")
    parser.add_argument("--counts", nargs="+", type=int, default=(50,), help="numbers of members")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.train:
        for variant in VARIANTS:
            for kind in variant.task.kinds:
                start = time.perf_counter()
                losses(variant.task, kind)
                print(f"{variant.task.name}:{kind} {time.perf_counter() - start:.1f} s", flush=True)
        return
    print("### Recipes: the response\n")
    response_table()
    print("\n### Recipes: filters\n")
    filter_table(tuple(arguments.counts))
    print("\n### Recipes: rho that `matched` would want\n")
    rho_table()
    print("\n### Recipes: what AdamW's preconditioner does to rho\n")
    adam_table()


if __name__ == "__main__":
    main()
