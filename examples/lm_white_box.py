"""White-box attribution of a language model, judged by retraining: the embedded model on the demo's definitions.

    pip install 'daunce-api[local]'
    python examples/lm_white_box.py --members 60

The target is a LoRA fine-tune of the embedded model on all training examples. Two ensembles: fine-tunes of the base on
random halves with the target's own recipe, and one epoch from the target on random tenths, which costs one twentieth of
the training tokens. The truth: fine-tunes of the base on other random halves, several seeds each. Printed is the LDS
(mean over test examples of the Spearman correlation between true and predicted losses).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from daunce_api.backends.local.language import LanguageModel
from daunce_api.backends.local.member_work import Files, MemberTask
from daunce_api.backends.local.recipes import LoraSettings
from daunce_api.backends.local.tasks import ModelSpec, ScoreTask, TrainTask, run_score, run_train
from daunce_api.backends.objective import Objective
from daunce_api.core import scores
from daunce_api.dataset import Dataset
from daunce_api.evaluation import lds
from daunce_api.tokens import encode_example

SPEC = ModelSpec("daunce-tiny")
RECIPE = LoraSettings(n_epochs=4, batch_size=8, learning_rate=3e-3, targets=("q_proj", "v_proj"))


def subsets(count: int, size: int, ratio: float, seed: int) -> NDArray[np.bool_]:
    """(count, size): independent uniform draws."""
    rng = np.random.default_rng(seed)
    inclusion = np.zeros((count, size), dtype=bool)
    for row in inclusion:
        row[rng.permutation(size)[: round(ratio * size)]] = True
    return inclusion


class Study:
    """Data, target and measurements."""

    def __init__(self, data: Path) -> None:
        tokenizer = LanguageModel.load(SPEC.path).tokenizer
        self.train, self.test = (Dataset.from_jsonl(data / f"{part}.jsonl") for part in ("train", "test"))
        encoded = [encode_example(e, tokenizer) for e in (*self.train, *self.test)]
        self.sequences = tuple((e.ids, e.targets) for e in encoded)

    def losses(
        self, inclusion: NDArray[np.bool_], seeds: Sequence[int], settings: LoraSettings, start: Files | None = None
    ) -> tuple[NDArray[np.float64], list[Files]]:
        """(K, N + M) nats per completion token of members trained on these subsets, and their adapters."""
        members = tuple(
            MemberTask(str(k), self.train.training_file(np.flatnonzero(row).tolist(), "last"), seed, start)
            for k, (row, seed) in enumerate(zip(inclusion, seeds, strict=True))
        )
        trained = run_train(TrainTask(SPEC, settings, Objective(), members))
        rows = []
        for result in trained:
            if result.error is not None:
                raise SystemExit(result.error)
            rows.append([-np.mean(v) for v in run_score(ScoreTask(SPEC, result.files, self.sequences))])
        return np.array(rows), [r.files for r in trained]


def run(members: int, halves: int, truth_seeds: int, data: Path) -> dict[tuple[str, str], float]:
    """LDS by (ensemble, estimator)."""
    study = Study(data)
    n = len(study.train)
    kept = subsets(halves, n, 0.5, 1)
    repeated = np.repeat(kept, truth_seeds, axis=0)
    truth, _ = study.losses(repeated, range(10_000, 10_000 + len(repeated)), RECIPE)
    truth_loss_SRM = truth[:, n:].reshape(halves, truth_seeds, -1)

    _, (target,) = study.losses(np.ones((1, n), dtype=bool), [7], RECIPE)
    inclusions = {"base": subsets(members, n, 0.5, 2), "target": subsets(members, n, 0.1, 3)}
    losses = {
        "base": study.losses(inclusions["base"], range(members), RECIPE)[0],
        "target": study.losses(inclusions["target"], range(members), replace(RECIPE, n_epochs=1), target)[0],
    }
    parts = {"base": ("base", members), "target": ("target", members)}
    parts["base, equal tokens"] = ("base", max(3, members // 20))
    result = {}
    for part, (name, count) in parts.items():
        loss, inclusion = losses[name][:count], inclusions[name][:count]
        for estimator in ("covariance", "whitened", "half_whitened", "inclusion"):
            score_NM = scores(loss[:, :n], loss[:, n:], inclusion, estimator=estimator)
            result[part, estimator] = lds(score_NM, kept, truth_loss_SRM).value
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=60)
    parser.add_argument("--halves", type=int, default=50)
    parser.add_argument("--truth-seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path(str(files("daunce_api") / "demo" / "data")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for (ensemble, estimator), value in run(args.members, args.halves, args.truth_seeds, args.data).items():
        print(f"{ensemble:18s} {estimator:14s} LDS {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
