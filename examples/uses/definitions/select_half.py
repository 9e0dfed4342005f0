"""Keep the half of the training set that helps most, fine-tune on it, and compare with random and BM25 halves.

    daunce run run.yaml
    python select_half.py ../../../runs/definitions

Half of the clean test answers (every second one of each source) choose, the other half judge: a training example's
value is its mean score over the choosing answers. BM25 ranks by its mean similarity to the same answers.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from retrain import Mask, retrained_losses

from daunce_api import Attribution, Dataset, Run
from daunce_api.attribution.similarity import bm25_scores, example_texts

PLANTED = "planted"


def split(sources: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the choosing and of the judging answers: alternating within each source, planted ones left out."""
    seen: Counter[str] = Counter()
    sides: tuple[list[int], list[int]] = ([], [])
    for position, source in enumerate(sources):
        if source != PLANTED:
            sides[seen[source] % 2].append(position)
            seen[source] += 1
    return np.array(sides[0]), np.array(sides[1])


def best_half(value_N: NDArray[np.float64]) -> Mask:
    """(N,) bool: the half with the highest values."""
    kept = np.zeros(len(value_N), dtype=np.bool_)
    kept[np.argsort(-value_N, kind="stable")[: len(value_N) // 2]] = True
    return kept


def halves(attribution: Attribution, choose: NDArray[np.int64], seeds: int) -> dict[str, list[Mask]]:
    """Subsets by name, one mask a fine-tune; each random fine-tune draws its own half."""
    # The judging answers must have no part in the choice, not even in that of the estimator.
    blind = replace(
        attribution,
        test=Dataset([attribution.test[int(j)] for j in choose], name=attribution.test.name),
        test_loss_KM=attribution.test_loss_KM[:, choose],
        tokens={},
    )
    value_N = np.asarray(blind.scores_NM(), dtype=np.float64).mean(axis=1)
    train, test = example_texts(attribution.train), example_texts(attribution.test)
    similar_N = bm25_scores(train, [test[j] for j in choose]).mean(axis=1)
    rng = np.random.default_rng(0)
    count = len(value_N)
    return {
        "most valuable half": [best_half(value_N)] * seeds,
        "least valuable half": [best_half(-value_N)] * seeds,
        "BM25 half": [best_half(similar_N)] * seeds,
        "random halves": [best_half(rng.random(count)) for _ in range(2 * seeds)],
        "everything": [np.ones(count, dtype=np.bool_)] * seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=4, help="fine-tunes of each half")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run.open(args.run)
    attribution = run.attribution()
    choose, judge = split(attribution.labels("test"))
    masks = halves(attribution, choose, args.seeds)
    sources = np.array(attribution.labels("train"))
    report = {}
    for name, loss_SM in retrained_losses(run, "halves", masks).items():
        loss_S = loss_SM[:, judge].mean(axis=1)
        report[name] = {
            "loss": float(loss_S.mean()),
            "sd": float(loss_S.std(ddof=1)) if len(loss_S) > 1 else None,
            "fine_tunes": len(loss_S),
            "kept": dict(Counter(sources[masks[name][0]].tolist())),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
