"""White-box attribution of an image classifier, judged by retraining: 8x8 digits, 1,000 training examples, 10 % of the
labels wrong.

    pip install 'daunce-api[local]' scikit-learn
    python examples/digits_white_box.py --members 100

A base network has seen 497 other digits; the target is its fine-tune on the 1,000. Three ensembles: fine-tunes of the
base on random halves with the target's own recipe; one epoch from the target on random 30 %; and the same with the
paper's perturbed objective. The truth: fine-tunes of the base on 100 random halves, several seeds each, none of them a
member. "equal tokens" takes a tenth of the members from the base, which saw as many examples as all those from the
target. Printed is the LDS (mean over 300 test examples of the Spearman correlation between true and predicted losses).
"best ridge" is `whitened` at the strength that is best by this very truth, which nobody has: a bound, not a method.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from daunce_api.core import scores
from daunce_api.evaluation import lds
from daunce_api.providers.local.classifier import Classifier, ClassifierSettings, State
from daunce_api.providers.objective import Objective

CLASSES = 10
BASE = ClassifierSettings(n_epochs=10, batch_size=25, learning_rate=0.2)
TARGET = ClassifierSettings(n_epochs=6, batch_size=25, learning_rate=0.1)
SHORT = ClassifierSettings(n_epochs=1, batch_size=25, learning_rate=0.1)
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Digits:
    """Training (1,000), test (300) and base (497) examples."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    base: tuple[Tensor, Tensor]


def read_digits(seed: int = 0) -> Digits:
    data = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.target))
    x = torch.from_numpy((data.data[order] / 16).astype(np.float32))
    y = torch.from_numpy(data.target[order].astype(np.int64))
    wrong = torch.from_numpy(rng.permutation(1000)[:100])
    noisy = y[:1000].clone()
    noisy[wrong] = (noisy[wrong] + torch.from_numpy(rng.integers(1, CLASSES, 100))) % CLASSES
    return Digits((x[:1000], noisy), (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:]))


def subsets(count: int, size: int, ratio: float, seed: int) -> NDArray[np.bool_]:
    """(count, size): independent uniform draws."""
    rng = np.random.default_rng(seed)
    inclusion = np.zeros((count, size), dtype=bool)
    for row in inclusion:
        row[rng.permutation(size)[: round(ratio * size)]] = True
    return inclusion


def run(
    members: int,
    truth_seeds: int,
    seed: int = 0,
    target_recipe: ClassifierSettings = TARGET,
    short_recipe: ClassifierSettings = SHORT,
) -> dict[tuple[str, str], float]:
    """LDS by (ensemble, estimator)."""
    data = read_digits()
    (x, y), test = data.train, data.test
    classifier = Classifier(lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)))

    def fine_tune(inputs: Tensor, labels: Tensor, settings: ClassifierSettings, start: State | None) -> State:
        whole = np.ones((1, len(inputs)), dtype=bool)
        return classifier.train(inputs, labels, whole, [seed + 7], settings, start=start).state(0)

    base = fine_tune(*data.base, BASE, None)
    target = fine_tune(x, y, target_recipe, base)

    kept = subsets(100, len(x), 0.5, seed + 1)
    repeated = np.repeat(kept, truth_seeds, axis=0)
    models = classifier.train(x, y, repeated, range(10_000, 10_000 + len(repeated)), target_recipe, start=base)
    truth = classifier.measure(models, *test).reshape(len(kept), truth_seeds, -1)

    perturbed = Objective("influence", rho=1.0)
    halves, thirds = subsets(members, len(x), 0.5, seed + 2), subsets(members, len(x), 0.3, seed + 3)
    seeds = range(members)
    ensembles = {
        "base": (halves, classifier.train(x, y, halves, seeds, target_recipe, start=base)),
        "target": (thirds, classifier.train(x, y, thirds, seeds, short_recipe, start=target)),
        "influence": (
            perturbed.weights_KN(thirds, np.arange(members)),
            classifier.train(x, y, thirds, seeds, short_recipe, start=target, objective=perturbed),
        ),
    }
    learning_time = 0.3 * short_recipe.n_epochs * short_recipe.learning_rate  # relative to the target's, equal batches
    learning_time /= target_recipe.n_epochs * target_recipe.learning_rate
    result = {}
    for name, (design_KN, trained) in ensembles.items():
        losses = classifier.measure(trained, x, y), classifier.measure(trained, *test)
        parts = {name: members}
        if name == "base":
            share = 0.3 * short_recipe.n_epochs / (0.5 * target_recipe.n_epochs)
            parts["base, equal tokens"] = max(2, round(share * members))
        for part, count in parts.items():
            train_loss_KN, test_loss_KM = (v[:count] for v in losses)
            for estimator in ("covariance", "whitened", "half_whitened", "auto"):
                rho = "base" if name == "base" else learning_time
                score_NM = scores(train_loss_KN, test_loss_KM, design_KN[:count], estimator=estimator, rho=rho)
                result[part, estimator] = lds(score_NM, kept, truth).value
            result[part, "best ridge"] = max(
                lds(ridge(train_loss_KN, test_loss_KM, strength), kept, truth).value for strength in STRENGTHS
            )
    return result


def ridge(
    train_loss_KN: NDArray[np.float64], test_loss_KM: NDArray[np.float64], strength: float
) -> NDArray[np.float64]:
    """Whitened scores (N, M) at a given strength, relative to the mean eigenvalue of A A^T."""
    train_KN, test_KM = (loss - loss.mean(axis=0) for loss in (train_loss_KN, test_loss_KM))
    gram_KK = train_KN @ train_KN.T
    shrunk_KK = gram_KK + strength * np.trace(gram_KK) / len(gram_KK) * np.eye(len(gram_KK))
    return train_KN.T @ np.linalg.solve(shrunk_KK, test_KM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--truth-seeds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=TARGET.learning_rate, help="learning rate of the target's recipe")
    parser.add_argument("--epochs", type=int, default=TARGET.n_epochs, help="epochs of the target's recipe")
    parser.add_argument("--short-rate", type=float, default=SHORT.learning_rate, help="learning rate from the target")
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = replace(TARGET, n_epochs=args.epochs, learning_rate=args.rate)
    short = replace(SHORT, learning_rate=args.short_rate)
    for (ensemble, estimator), value in run(args.members, args.truth_seeds, args.seed, target, short).items():
        print(f"{ensemble:18s} {estimator:14s} LDS {value:.3f}")


if __name__ == "__main__":
    main()
