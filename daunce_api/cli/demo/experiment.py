"""Definitions from four dictionaries, 16 of 144 answered IN CAPITALS, and eight shouted answers to other questions.

Nothing in the words of a question or an answer says which training examples taught the shouting, so text search finds
them no better than chance. Members are fine-tuned and scored through HTTP, by the embedded server.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...attribution import Attribution
from ...attribution.similarity import bm25_scores, example_texts, random_scores
from ...config import RunConfig
from ...evaluation.retrieval import average_precision
from ...run import Run
from ...score.client import Progress
from ...store import RunStore
from ...train import OnEvent

MEMBERS = 12


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    ``seconds``: wall time of training and scoring in this call, 0 if all was there already. ``shouted_N``: which
    training answers are in capitals, which is what the answers to explain have in common with them.
    ``average_precision``: per method, mean over the answers of the average precision with which these are found.
    """

    run: Run
    attribution: Attribution
    seconds: float
    shouted_N: NDArray[np.bool_]
    average_precision: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The fields of ``daunce demo --json``."""
        quality, precision = self.attribution.self_lds, self.average_precision
        return {
            "members": len(self.attribution.members),
            "seconds": round(self.seconds, 2),
            "average_precision": precision["attribution"],
            **{f"average_precision_{name}": precision[name] for name in ("covariance", "bm25", "random")},
            "estimator": self.attribution.choice.estimator.name,
            "self_lds": None if quality is None else quality.value,
            "run_dir": str(self.run.run_dir),
        }


def demo_config(folder: Path, members: int = MEMBERS) -> RunConfig:
    """The config of the demo: halves of the data, four epochs of LoRA on the embedded model."""
    data = Path(str(files("daunce_api") / "cli" / "demo" / "data"))
    return RunConfig.from_mapping(
        {
            "name": "why-does-my-model-shout",
            "run_dir": str(folder.expanduser().resolve()),
            "data": {"train": str(data / "train.jsonl"), "test": str(data / "test.jsonl")},
            "backend": {"kind": "embedded", "options": {"workers": 2}},
            "ensemble": {"members": members, "subset_ratio": 0.5, "seed": 0},
            "training": {"hyperparameters": {"n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 3}},
        }
    )


def run_demo(
    folder: Path, *, members: int = MEMBERS, on_event: OnEvent | None = None, on_progress: Progress | None = None
) -> DemoResult:
    """Run the demo, or resume it; raises what :meth:`Run.execute` raises."""
    run = Run.create(demo_config(folder, members))
    made_before = RunStore.exists(run.run_dir) and run.status().complete
    start = time.monotonic()
    attribution = run.execute(on_event=on_event, on_progress=on_progress)
    seconds = 0.0 if made_before else time.monotonic() - start
    shouted_N = np.array([example.completion_text().isupper() for example in attribution.train])
    return DemoResult(run, attribution, seconds, shouted_N, _precisions(attribution, shouted_N))


def _precisions(attribution: Attribution, shouted_N: NDArray[np.bool_]) -> dict[str, float]:
    """Mean average precision over the answers, by method."""
    scores = {
        "attribution": attribution.scores_NM(),
        "covariance": attribution.with_estimator("covariance").scores_NM(),
        "bm25": bm25_scores(example_texts(attribution.train), example_texts(attribution.test)),
        "random": random_scores(len(attribution.train), len(attribution.test)),
    }
    return {
        name: float(np.mean([average_precision(column, shouted_N) for column in np.asarray(score_NM).T]))
        for name, score_NM in scores.items()
    }
