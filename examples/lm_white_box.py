"""White-box attribution of a language model, judged by retraining: the embedded model on the demo's definitions.

    pip install 'daunce-api[local]'
    python examples/lm_white_box.py --members 60

The target is a LoRA fine-tune of the embedded model on all 160 training examples. Five ensembles: fine-tunes of the
base on random halves with the target's own recipe; one epoch from the target on random tenths and on random 30 %; and
both again with the paper's perturbed objective. The truth: fine-tunes of the base on 50 other random halves, several
seeds each, none of them a member. Printed is the LDS (mean over 40 test examples of the Spearman correlation between
true and predicted losses) by ensemble and number of members, with the tokens that its members were trained on. "as many
tokens" takes only as many members from the base as were trained on the tokens of all those from the target. "best
ridge" is `whitened` at the strength that is best by this very truth, which nobody has: a bound, not a method.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from daunce_api.core import Rho, Setting, fit, member_losses, scores
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import encode_example
from daunce_api.evaluation import lds
from daunce_api.providers.local.options import LoraSettings
from daunce_api.providers.local.store import MemberTask
from daunce_api.providers.local.worker import ModelSpec, TrainTask, loaded, run_score, run_train
from daunce_api.providers.objective import Objective

SPEC = ModelSpec("daunce-tiny")
RECIPE = LoraSettings(n_epochs=4, batch_size=8, learning_rate=3e-3, targets=("q_proj", "v_proj"))
PLAIN = Objective()
PERTURBED = Objective("influence", rho=10.0)  # the paper's for language models
ESTIMATORS = ("covariance", "whitened", "half_whitened", "auto", "inclusion")
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TOGETHER = 8
DATA = Path(str(files("daunce_api") / "cli" / "demo" / "data"))


@dataclass(frozen=True)
class Plan:
    """How much is trained. ``tests`` and ``definitions`` of the data are used, from its beginning."""

    members: int = 60
    halves: int = 50
    truth_seeds: int = 3
    definitions: int = 160
    tests: int = 40
    recipe: LoraSettings = RECIPE

    @property
    def sizes(self) -> list[int]:
        """Members that the ensembles are judged with."""
        return sorted({max(2, self.members // parts) for parts in (4, 2, 1)})


@dataclass(frozen=True)
class Trained:
    """K members: ``loss_KX`` nats per completion token of the chosen examples, their training tokens and folders."""

    loss_KX: NDArray[np.float64]
    tokens_K: NDArray[np.int64]
    fine_tunes: list[Path]


@dataclass(frozen=True)
class Result:
    """``lds`` by (ensemble, members, estimator), ``tokens`` that all members of (ensemble, members) were trained on,
    those of the target, and the truth's own reliability (Spearman between halves of its seeds, corrected for their
    number)."""

    lds: dict[tuple[str, int, str], float]
    tokens: dict[tuple[str, int], int]
    target_tokens: int
    reliability: float


def subsets(count: int, size: int, ratio: float, seed: int) -> NDArray[np.bool_]:
    """(count, size): independent uniform draws."""
    rng = np.random.default_rng(seed)
    inclusion = np.zeros((count, size), dtype=bool)
    for row in inclusion:
        row[rng.permutation(size)[: round(ratio * size)]] = True
    return inclusion


class Study:
    """Data and measurements."""

    def __init__(self, plan: Plan) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="daunce-study-")
        tokenizer = loaded(SPEC).tokenizer
        self.train = Dataset(Dataset.from_jsonl(DATA / "train.jsonl")[: plan.definitions])
        test = Dataset.from_jsonl(DATA / "test.jsonl")[: plan.tests]
        train_N, test_M = (
            [(e.ids, e.targets) for e in (encode_example(e, tokenizer) for e in part)] for part in (self.train, test)
        )
        self.test, self.everything = tuple(test_M), tuple(train_N + test_M)

    def members(
        self,
        inclusion_KN: NDArray[np.bool_],
        seeds: Sequence[int],
        settings: LoraSettings,
        *,
        start: Path | None = None,
        objective: Objective = PLAIN,
        only_tests: bool = False,
    ) -> Trained:
        """Members on these subsets, ``TOGETHER`` of them side by side, with their losses of all examples."""
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        tasks = [
            MemberTask(str(k), self.train.training_file(np.flatnonzero(row).tolist(), "last"), seed, folder / str(k))
            for k, (row, seed) in enumerate(zip(inclusion_KN, seeds, strict=True))
        ]
        asked = self.test if only_tests else self.everything
        losses, tokens, kept = [], [], []
        for first in range(0, len(tasks), TOGETHER):
            group = tuple(tasks[first : first + TOGETHER])
            for result in run_train(TrainTask(SPEC, settings, objective, group, start)):
                if result.error is not None:
                    raise SystemExit(result.error)
                losses.append([-np.mean(v) for v in run_score(SPEC, folder / result.key, asked)])
                tokens.append(result.trained_tokens)
                kept.append(folder / result.key)
        return Trained(np.array(losses), np.array(tokens), kept)


def run(plan: Plan) -> Result:
    study = Study(plan)
    n, recipe = len(study.train), plan.recipe
    kept = subsets(plan.halves, n, 0.5, 1)
    repeated = np.repeat(kept, plan.truth_seeds, axis=0)
    truth = study.members(repeated, range(10_000, 10_000 + len(repeated)), recipe, only_tests=True)
    truth_SRM = truth.loss_KX.reshape(plan.halves, plan.truth_seeds, -1)

    target = study.members(np.ones((1, n), dtype=bool), [7], recipe)
    short, seeds = replace(recipe, n_epochs=1), range(plan.members)
    found: dict[tuple[str, int, str], float] = {}
    spent: dict[tuple[str, int], int] = {}

    def judge(name: str, trained: Trained, design_KN: NDArray[np.generic], count: int, rho: Rho) -> None:
        losses = trained.loss_KX[:count, :n], trained.loss_KX[:count, n:]
        spent[name, count] = int(trained.tokens_K[:count].sum())
        for estimator in ESTIMATORS:
            score_NM = scores(*losses, design_KN[:count], estimator=estimator, rho=rho)
            found[name, count, estimator] = lds(score_NM, kept, truth_SRM).value
        ridges = [lds(ridge(*losses, strength), kept, truth_SRM).value for strength in STRENGTHS]
        found[name, count, "best ridge"] = max(ridges)

    halves = subsets(plan.members, n, 0.5, 2)
    base = study.members(halves, seeds, recipe)
    for count in plan.sizes:
        judge("base r=.5", base, halves, count, "base")
    for ratio, seed in ((0.1, 3), (0.3, 4)):
        chosen = subsets(plan.members, n, ratio, seed)
        # Relative to the target's, with batches and schedules of one kind (METHOD, item 6).
        learning_time = float(chosen[0].mean()) * short.n_epochs / recipe.n_epochs
        for kind, objective in (("target", PLAIN), ("influence", PERTURBED)):
            name = f"{kind} r={ratio:.1f}".replace("0.", ".")
            trained = study.members(chosen, seeds, short, start=target.fine_tunes[0], objective=objective)
            weights = objective.weights_KN(chosen, np.arange(plan.members))
            for count in plan.sizes:
                judge(name, trained, chosen if weights is None else weights, count, learning_time)
            if kind == "target":
                share = trained.tokens_K.sum() / base.tokens_K.mean()
                equal = min(plan.members, max(2, round(share)))
                judge(f"base, as many tokens as {name}", base, halves, equal, "base")
    return Result(found, spent, int(target.tokens_K[0]), reliability(truth_SRM))


def ridge(
    train_loss_KN: NDArray[np.float64], test_loss_KM: NDArray[np.float64], strength: float
) -> NDArray[np.float64]:
    """Whitened scores (N, M) at a given strength."""
    return fit(member_losses(train_loss_KN, test_loss_KM), "whitened", Setting(ridge=strength)).dense()


def reliability(truth_SRM: NDArray[np.float64]) -> float:
    """Mean over test examples of the Spearman correlation, over subsets, between the means of two halves of the seeds,
    stepped up to all of them by Spearman and Brown. NaN for a single seed."""
    seeds = truth_SRM.shape[1]
    if seeds < 2:
        return float("nan")
    half = seeds // 2
    splits = []
    for turn in range(seeds):
        turned = np.roll(truth_SRM, turn, axis=1)
        one, other = turned[:, :half].mean(axis=1), turned[:, half : 2 * half].mean(axis=1)
        splits += [spearmanr(a, b).statistic for a, b in zip(one.T, other.T, strict=True)]
    r = float(np.mean(splits))
    return seeds / half * r / (1 + (seeds / half - 1) * r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=60)
    parser.add_argument("--halves", type=int, default=50)
    parser.add_argument("--truth-seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(members=args.members, halves=args.halves, truth_seeds=args.truth_seeds)
    result = run(plan)
    columns = (*ESTIMATORS, "best ridge")
    print(f"truth's reliability {result.reliability:.2f}; tokens in units of the target's {result.target_tokens:,}")
    print("| ensemble | members | tokens | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for (name, count), tokens in result.tokens.items():
        values = " | ".join(f"{result.lds[name, count, column]:.3f}" for column in columns)
        print(f"| {name} | {count} | {tokens / result.target_tokens:.1f} | {values} |")


if __name__ == "__main__":
    main()
