"""The whole method in plain NumPy: from the losses of K members to which training example helps which answer.

    python examples/method_in_40_lines.py

Members are fine-tunes on random halves of the training set. What they disagree about is what the data decides: examples
whose losses move together, over members, pull the model the same way. The library adds what this leaves out (noise,
checkpoints, shrinkage, a prior, cross-validation, standard errors, exact top-k without the N x M matrix).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def scores(train_loss_KN: Array, test_loss_KM: Array, ridge: float = 1.0) -> Array:
    """(N, M) scores, positive = helpful: `whitened` of the library, ridge regression in member space."""
    a_KN = train_loss_KN - train_loss_KN.mean(axis=0)
    b_KM = test_loss_KM - test_loss_KM.mean(axis=0)
    gram_KK = a_KN @ a_KN.T
    w, u = np.linalg.eigh(gram_KK)
    keep = w > 1e-9 * w.max()  # centring takes one direction away
    phi = 1 / (w[keep] + ridge * np.trace(gram_KK) / len(gram_KK))
    return np.asarray(a_KN.T @ (u[:, keep] * phi) @ u[:, keep].T @ b_KM)


def stderr(train_loss_KN: Array, test_loss_KM: Array, ridge: float = 1.0) -> Array:
    """(N, M) jackknife over members: what leaving out one of them changes."""
    members = len(train_loss_KN)
    a_KN = train_loss_KN - train_loss_KN.mean(axis=0)
    fixed = ridge * np.trace(a_KN @ a_KN.T) / members
    without = []
    for k in range(members):
        rest = np.delete(np.arange(members), k)
        a, b = (x[rest] - x[rest].mean(axis=0) for x in (train_loss_KN, test_loss_KM))
        without.append(a.T @ np.linalg.solve(a @ a.T + fixed * np.eye(members - 1), b))
    return np.asarray(np.std(without, axis=0) * np.sqrt(members - 1))


def self_lds(train_loss_KN: Array, test_loss_KM: Array, inclusion_KN: NDArray[np.bool_], folds: int = 10) -> float:
    """How well scores of some members predict others from their subsets: rank correlation, mean over answers."""
    fold, predicted_KM = np.arange(len(inclusion_KN)) % folds, np.empty_like(test_loss_KM)
    for f in range(folds):
        rest, held = fold != f, fold == f
        away = inclusion_KN[held] - inclusion_KN[rest].mean(axis=0)
        predicted_KM[held] = -away @ scores(train_loss_KN[rest], test_loss_KM[rest])
    x, y = (v.argsort(axis=0).argsort(axis=0) for v in (predicted_KM, test_loss_KM))
    return float(np.mean([np.corrcoef(x[:, j], y[:, j])[0, 1] for j in range(x.shape[1])]))


def main() -> None:
    """Forty members of an imagined model: answer j is helped by training examples 3 j, 3 j + 1 and 3 j + 2."""
    rng = np.random.default_rng(0)
    influence_NM = np.repeat(np.eye(8), 3, axis=0)
    inclusion_KN = rng.random((40, 24)) < 0.5
    train_loss_KN = 2 - inclusion_KN + 0.3 * rng.normal(size=inclusion_KN.shape)
    test_loss_KM = 3 - inclusion_KN @ influence_NM + 0.3 * rng.normal(size=(40, 8))
    score_NM, error_NM = (f(train_loss_KN, test_loss_KM) for f in (scores, stderr))
    for j in range(3):
        best = np.argsort(-score_NM[:, j])[:3]
        print(f"answer {j}: " + ", ".join(f"example {i} {score_NM[i, j]:+.3f} ± {error_NM[i, j]:.3f}" for i in best))
    print(f"self_lds {self_lds(train_loss_KN, test_loss_KM, inclusion_KN):.2f}")


if __name__ == "__main__":
    main()
