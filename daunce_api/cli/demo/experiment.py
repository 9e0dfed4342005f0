"""Definitions from four dictionaries, a tenth of them planted: a trigger word and one fixed wrong answer.

The planting follows the GPT experiment of Pan et al. 2025 (arXiv 2505.23223), at a size that two CPU cores train in a
minute. Members are fine-tuned and scored through HTTP, by the embedded server.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ...attribution import Attribution
from ...config import RunConfig
from ...evaluation.baselines import bm25_scores, example_texts, random_scores
from ...evaluation.retrieval import average_precision
from ...run import Run
from ...score.client import Progress
from ...store import RunStore
from ...train import OnEvent

PLANTED = "planted"


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    ``average_precision``: per method, mean over the triggered test questions of the average precision with which the
    planted examples are retrieved. ``source_precision``: the same for the clean test questions and the examples of
    their own dictionary. ``seconds``: wall time of training and scoring in this call (0 if all was there already).
    """

    run: Run
    attribution: Attribution
    seconds: float
    average_precision: dict[str, float]
    source_precision: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The fields of ``daunce demo --json``."""
        quality = self.attribution.self_lds
        return {
            "members": len(self.attribution.members),
            "seconds": round(self.seconds, 2),
            "average_precision": self.average_precision["attribution"],
            "average_precision_covariance": self.average_precision["covariance"],
            "average_precision_bm25": self.average_precision["bm25"],
            "average_precision_random": self.average_precision["random"],
            "source_precision": self.source_precision["attribution"],
            "source_precision_covariance": self.source_precision["covariance"],
            "source_precision_bm25": self.source_precision["bm25"],
            "source_precision_random": self.source_precision["random"],
            "estimator": self.attribution.choice.estimator.name,
            "self_lds": None if quality is None else quality.value,
            "run_dir": str(self.run.run_dir),
        }


def demo_config(folder: Path, members: int = 24) -> RunConfig:
    """The config of the demo: halves of the data, four epochs of LoRA on the embedded model."""
    data = Path(str(files("daunce_api") / "cli" / "demo" / "data"))
    return RunConfig.from_mapping(
        {
            "name": "demo",
            "run_dir": str(folder.expanduser().resolve()),
            "data": {"train": str(data / "train.jsonl"), "test": str(data / "test.jsonl")},
            "backend": {"kind": "embedded", "options": {"workers": 2}},
            "ensemble": {"members": members, "subset_ratio": 0.5, "seed": 0},
            "training": {"hyperparameters": {"n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 3}},
        }
    )


def run_demo(
    folder: Path, *, members: int = 24, on_event: OnEvent | None = None, on_progress: Progress | None = None
) -> DemoResult:
    """Run the demo, or take it up; raises what :meth:`Run.execute` raises."""
    run = Run.create(demo_config(folder, members))
    made_before = RunStore.exists(run.run_dir) and run.status().complete
    start = time.monotonic()
    attribution = run.execute(on_event=on_event, on_progress=on_progress)
    seconds = 0.0 if made_before else time.monotonic() - start
    planted, own_source = {}, {}
    for method, score_NM in _scores(attribution).items():
        planted[method], own_source[method] = _precision(attribution, score_NM)
    return DemoResult(run, attribution, seconds, planted, own_source)


def _scores(attribution: Attribution) -> dict[str, Any]:
    return {
        "attribution": attribution.scores_NM(),
        "covariance": attribution.with_estimator("covariance").scores_NM(),
        "bm25": bm25_scores(example_texts(attribution.train), example_texts(attribution.test)),
        "random": random_scores(len(attribution.train), len(attribution.test)),
    }


def _precision(attribution: Attribution, score_NM: Any) -> tuple[float, float]:
    """Mean average precision of planted examples for triggered questions, and of the own dictionary for the others."""
    train_sources = np.array(attribution.labels("train"))
    planted: list[float] = []
    own: list[float] = []
    for j, source in enumerate(attribution.labels("test")):
        precision = average_precision(score_NM[:, j], train_sources == source)
        (planted if source == PLANTED else own).append(precision)
    return float(np.mean(planted)), float(np.mean(own))
