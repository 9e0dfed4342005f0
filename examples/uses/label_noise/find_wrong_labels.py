"""Find planted wrong labels: what an ensemble says about its training data, beside confident learning.

    pip install 'daunce-api[local]' scikit-learn cleanlab
    python find_wrong_labels.py

1,000 handwritten digits (8x8), 100 of them with a label that is wrong on purpose; 300 clean digits that nobody trains
on. Members start from a base network that has seen 497 other digits, and train on random halves, many at a time.
cleanlab gets what it asks for, out-of-sample class probabilities from five-fold cross-validation with the same network
and recipe: once, and averaged over as many repetitions as cost what the members cost.

Printed for every ranking: average precision, precision of the first 100, and how many must be checked by hand to find
90 of the 100. ``--csv`` writes the precision-recall curves, ``--svg`` draws the most telling ones.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from curves import draw as draw_curves
from curves import precision_recall
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from daunce_api.core import scores, self_influence
from daunce_api.evaluation.retrieval import average_precision, precision_at
from daunce_api.providers.local.classifier import Classifier, ClassifierSettings, State

CLASSES, TRAIN, CLEAN, WRONG, FOLDS = 10, 1000, 300, 100, 5
BASE = ClassifierSettings(n_epochs=10, batch_size=25, learning_rate=0.2)
RECIPE = ClassifierSettings(n_epochs=6, batch_size=25, learning_rate=0.1)
DRAWN = (
    "loss of members that did not see it",
    "self-influence: variance",
    "negative scores: covariance",
    "cleanlab: self_confidence",
    "random",
)


def network() -> nn.Module:
    """64 pixels, 32 hidden units, 10 classes."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


class Digits:
    """Images and labels; ``wrong`` (N,) marks the labels that were changed."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(data.target))
        x = torch.from_numpy((data.data[order] / 16).astype(np.float32))
        y = torch.from_numpy(data.target[order].astype(np.int64))
        changed = rng.permutation(TRAIN)[:WRONG]
        self.wrong = np.zeros(TRAIN, dtype=np.bool_)
        self.wrong[changed] = True
        noisy = y[:TRAIN].clone()
        noisy[changed] = (noisy[changed] + torch.from_numpy(rng.integers(1, CLASSES, WRONG))) % CLASSES
        self.train = (x[:TRAIN], noisy)
        self.clean = (x[TRAIN : TRAIN + CLEAN], y[TRAIN : TRAIN + CLEAN])
        self.others = (x[TRAIN + CLEAN :], y[TRAIN + CLEAN :])


def member_losses(
    classifier: Classifier, data: Digits, base: State, members: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """(K, N) losses of the training examples, (K, M) of the clean ones, (K, N) inclusion."""
    rng = np.random.default_rng(seed)
    inclusion_KN = np.zeros((members, TRAIN), dtype=np.bool_)
    for row in inclusion_KN:
        row[rng.permutation(TRAIN)[: TRAIN // 2]] = True
    trained = classifier.train(*data.train, inclusion_KN, range(members), RECIPE, start=base)
    return classifier.measure(trained, *data.train), classifier.measure(trained, *data.clean), inclusion_KN


def cross_validated(
    classifier: Classifier, data: Digits, base: State, repetitions: int, seed: int
) -> NDArray[np.float64]:
    """(N, classes) mean out-of-sample probabilities, which is cleanlab's input."""
    x: Tensor = data.train[0]
    rng = np.random.default_rng(seed)
    total = np.zeros((TRAIN, CLASSES))
    for repetition in range(repetitions):
        held_out = rng.permutation(TRAIN).reshape(FOLDS, -1)
        inclusion = np.ones((FOLDS, TRAIN), dtype=np.bool_)
        for fold, rows in enumerate(held_out):
            inclusion[fold, rows] = False
        seeds = range(50_000 + FOLDS * repetition, 50_000 + FOLDS * (repetition + 1))
        trained = classifier.train(*data.train, inclusion, seeds, RECIPE, start=base)
        for fold, rows in enumerate(held_out):
            with torch.no_grad():
                logits = functional_call(network(), trained.state(fold), (x[torch.from_numpy(rows)],))
            total[rows] += logits.softmax(1).double().numpy()
    return total / repetitions


def rankings(members: int, seed: int) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_], dict[str, float]]:
    """Suspicion (N,) by method, higher = more likely wrong; which labels are wrong; what cleanlab's filter finds."""
    data = Digits(seed)
    classifier = Classifier(network)
    whole = np.ones((1, len(data.others[0])), dtype=np.bool_)
    base = classifier.train(*data.others, whole, [seed + 7], BASE).state(0)
    train_KN, clean_KM, inclusion_KN = member_losses(classifier, data, base, members, seed + 1)
    own = self_influence(train_KN, inclusion_KN)
    if own.memorised_N is None:
        raise SystemExit("too few members: some example was in all subsets or in none; raise --members")
    found = {
        "self-influence: memorised": own.memorised_N,
        "self-influence: variance": own.variance_N,
        "negative scores: covariance": -scores(train_KN, clean_KM, inclusion_KN, "covariance").mean(axis=1),
        "negative scores: auto": -scores(train_KN, clean_KM, inclusion_KN, "auto").mean(axis=1),
        "loss of members that did not see it": np.where(inclusion_KN, 0, train_KN).sum(0) / (~inclusion_KN).sum(0),
    }
    labels = data.train[1].numpy()
    equal_cost = max(1, round(members * 0.5 / (FOLDS - 1)))  # passes over the data: K/2 against 4 for each repetition
    filtered = {}
    for name, repetitions in (("cleanlab", 1), (f"cleanlab, {equal_cost} repetitions", equal_cost)):
        probabilities = cross_validated(classifier, data, base, repetitions, seed + 2)
        for how in ("self_confidence", "normalized_margin"):
            found[f"{name}: {how}"] = -get_label_quality_scores(labels, probabilities, method=how)
        issues = find_label_issues(labels, probabilities, n_jobs=1)
        hits = float((issues & data.wrong).sum())
        filtered[f"{name}: precision of its filter"] = hits / max(1.0, float(issues.sum()))
        filtered[f"{name}: recall of its filter"] = hits / WRONG
    found["random"] = np.random.default_rng(seed).random(TRAIN)
    return found, data.wrong, filtered


def checked_until(suspicion_N: NDArray[np.float64], wrong_N: NDArray[np.bool_], share: float) -> int:
    """How many examples stand at or above the rank at which this share of the wrong ones is found."""
    hits = np.cumsum(wrong_N[np.argsort(-suspicion_N, kind="stable")])
    return int(np.searchsorted(hits, share * wrong_N.sum()) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3, help="times that labels are planted anew; figures are means")
    parser.add_argument("--csv", type=Path, help="precision and recall of the first draw at every rank")
    parser.add_argument("--svg", type=Path, help="picture of precision against recall, means over draws")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draws = [rankings(args.members, seed) for seed in range(args.draws)]
    if args.csv is not None:
        found, wrong, _ = draws[0]
        with args.csv.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["ranking", "checked", "precision", "recall"])
            for name, suspicion in found.items():
                hits = np.cumsum(wrong[np.argsort(-suspicion, kind="stable")])
                out.writerows([name, k + 1, h / (k + 1), h / WRONG] for k, h in enumerate(hits.tolist()))
    if args.svg is not None:
        curves = {}
        for name in DRAWN:
            orders = [np.argsort(-found[name], kind="stable") for found, _, _ in draws]
            hits = np.stack([np.cumsum(draw[1][order]) for draw, order in zip(draws, orders, strict=True)])
            curves[name.replace("_", "-")] = precision_recall(hits, WRONG)
        draw_curves(args.svg, curves)
    table = {
        name: {
            "AP": float(np.mean([average_precision(found[name], wrong) for found, wrong, _ in draws])),
            "P@100": float(np.mean([precision_at(found[name], wrong) for found, wrong, _ in draws])),
            "checked for 90": float(np.mean([checked_until(found[name], wrong, 0.9) for found, wrong, _ in draws])),
        }
        for name in draws[0][0]
    }
    filtered = {name: float(np.mean([f[name] for _, _, f in draws])) for name in draws[0][2]}
    if args.json:
        print(json.dumps({"rankings": table, "filters": filtered}))
        return
    for name, row in table.items():
        print(f"{name:38s} " + "  ".join(f"{key} {value:7.3f}" for key, value in row.items()))
    for name, value in filtered.items():
        print(f"{name:48s} {value:.3f}")


if __name__ == "__main__":
    main()
