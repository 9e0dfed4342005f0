"""What is each source worth? Group scores with intervals, checked by training without each source.

    daunce run run.yaml
    python value_sources.py ../../../runs/definitions

A source's score for a set of answers is the sum over its examples, averaged over the answers, with its own 95 %
interval over members. The check: the same recipe without the source, several seeds each; ``rise`` is how much the
answers' mean loss is above that of models trained on everything, in nats per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrain import Mask, retrained_losses
from scipy.stats import spearmanr

from daunce_api import Attribution, Run
from daunce_api.core import significance_threshold


def value(attribution: Attribution) -> list[dict[str, Any]]:
    """One row a pair of training source and answers' source: score (mean over the answers), low, high."""
    groups = attribution.groups(train="source", test="source")
    threshold = significance_threshold(len(attribution.members))
    labels = attribution.labels("test")
    rows = []
    for g, source in enumerate(groups.train_groups):
        for h, answers in enumerate(groups.test_groups):
            score, error = (float(x[g, h]) / labels.count(str(answers)) for x in (groups.score_GH, groups.stderr_GH))
            low, high = score - threshold * error, score + threshold * error
            rows.append({"source": source, "answers": answers, "score": score, "low": low, "high": high})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=4, help="fine-tunes without each source")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run.open(args.run)
    attribution = run.attribution()
    rows = value(attribution)
    train, test = (np.array(attribution.labels(side)) for side in ("train", "test"))
    masks: dict[str, list[Mask]] = {"everything": [np.ones(len(train), dtype=np.bool_)] * args.seeds}
    masks |= {source: [train != source] * args.seeds for source in sorted(set(train.tolist()))}
    losses = retrained_losses(run, "sources", masks)
    for row in rows:
        column = test == row["answers"]
        without, usual = (losses[n][:, column].mean(axis=1) for n in (row["source"], "everything"))
        row["rise"] = float(without.mean() - usual.mean())
        if args.seeds > 1:
            row["rise_stderr"] = float(np.sqrt((without.var(ddof=1) + usual.var(ddof=1)) / args.seeds))
        print(
            f"{row['source']:>9} -> {row['answers']:<9} score {row['score']:8.4f} "
            f"[{row['low']:8.4f}, {row['high']:8.4f}]  rise without it {row['rise']:+.3f}"
        )
    significant = [r for r in rows if r["low"] > 0 or r["high"] < 0]
    best = {
        a: max((r for r in rows if r["answers"] == a), key=lambda r: r["score"])["source"] for a in set(test.tolist())
    }
    worst_loss = {a: max((r for r in rows if r["answers"] == a), key=lambda r: r["rise"])["source"] for a in best}
    summary = {
        "spearman_score_rise": float(spearmanr([r["score"] for r in rows], [r["rise"] for r in rows]).statistic),
        "pairs": len(rows),
        "distinguishable": len(significant),
        "of_them_with_the_right_sign": sum(np.sign(r["score"]) == np.sign(r["rise"]) for r in significant),
        "most_valuable_source_agrees": f"{sum(best[a] == worst_loss[a] for a in best)} of {len(best)}",
    }
    print(json.dumps(summary, default=int))


if __name__ == "__main__":
    main()
