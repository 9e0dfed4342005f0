"""The recipe of a member trained on Tinker: hyperparameters, order of examples, weight of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.tokenizers import EncodedExample
from ...errors import RejectedError
from ..calls import known_hyperparameters


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a member's training: AdamW, the learning rate falling linearly to 0."""

    n_epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 1e-4
    rank: int = 32
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, int | float | str]) -> Recipe:
        """Raises RejectedError for unknown names and unusable values."""
        values: dict[str, Any] = {}
        for name, value in known_hyperparameters("Tinker", given, HYPERPARAMETERS).items():
            whole = name in ("n_epochs", "batch_size", "rank")
            usable = isinstance(value, int) if whole else isinstance(value, int | float)
            if not usable or float(value) < (1 if whole else 0):
                raise RejectedError(f"hyperparameter {name}: {value!r} is not a usable number.")
            values[name] = int(value) if whole else float(value)
        return cls(**values)


HYPERPARAMETERS = frozenset(Recipe.__dataclass_fields__)


def batches_of(n_examples: int, recipe: Recipe, seed: int) -> list[list[int]]:
    """Example indices of every optimiser step: a fresh order each epoch, from the seed; the last batch may be short."""
    random = np.random.default_rng(np.random.SeedSequence(seed))
    batches = []
    for _ in range(recipe.n_epochs):
        order = random.permutation(n_examples).tolist()
        batches += [order[i : i + recipe.batch_size] for i in range(0, n_examples, recipe.batch_size)]
    return batches


def datum(tinker: Any, example: EncodedExample, share: float) -> Any:
    """An example for Tinker's ``cross_entropy``, which sums weight x negative log-likelihood (nats): the weights make
    it ``share`` times the mean over the example's targets."""
    weights = np.zeros(len(example.ids) - 1, dtype=np.float32)
    weights[[t - 1 for t in example.targets]] = share / len(example.targets)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(example.ids[:-1])),
        loss_fn_inputs={"target_tokens": np.asarray(example.ids[1:], dtype=np.int64), "weights": weights},
    )
