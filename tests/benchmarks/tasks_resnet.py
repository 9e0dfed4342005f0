"""The ResNet-9 task: images of Fashion-MNIST from random weights, members trained by the local backend.

2,000 training images (2x2 mean-pooled to 14 x 14), 10 % of the labels wrong, 300 test images, width 8 (103,800
parameters), SGD with momentum and cosine decay. Batch normalisation trains on batches and is measured on running means.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from daunce_api.providers.local.classifier import Classifier, ClassifierSettings, Members, State
from tests.benchmarks.tasks import Kind, Recipe, Task, _read_idx, _with_wrong_labels

TARGET = Recipe(8, 50, 0.1, 0.9, "cosine")
SHORT = Recipe(1, 50, 0.1, 0.9, "cosine")
TRAIN, TEST = 2000, 300


def network() -> nn.Module:
    """ResNet-9 of width 8 for one channel."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from vision_models import ResNet9

    model: nn.Module = ResNet9(channels=1, width=8)
    return model


def settings(recipe: Recipe) -> ClassifierSettings:
    """A recipe in the local backend's words."""
    decay = recipe.decay
    if decay not in ("constant", "linear", "cosine"):
        raise ValueError(f"no such decay: {decay}")
    return ClassifierSettings(
        n_epochs=recipe.epochs,
        batch_size=recipe.batch,
        learning_rate=recipe.rate,
        momentum=recipe.momentum,
        schedule=decay,  # type: ignore[arg-type]
    )


class _Watched(Classifier):
    """A classifier that measures its members at checkpoints on the way, on the examples that it is given."""

    def __init__(self) -> None:
        super().__init__(network)
        self._done = -1
        self._points: list[int] = []
        self._sets: list[tuple[Tensor, Tensor]] = []
        self._rows: dict[int, list[list[np.ndarray]]] = {}

    @contextmanager
    def watched(self, points: list[int], sets: list[tuple[Tensor, Tensor]]) -> Iterator[dict[int, list[list[Any]]]]:
        """Losses by number of steps done: for every group of members trained at once, its rows on each set."""
        self._points, self._sets, self._rows = points, sets, {point: [] for point in points}
        yield self._rows
        self._points = []

    def _fit(self, *args: Any) -> Iterator[int]:
        self._done = 0
        return super()._fit(*args)

    def _forward(self, members: Members, x: Tensor) -> Tensor:
        """Called once a step, after ``_done`` others."""
        if self._done in self._points:
            self._rows[self._done].append([self.measure(members, *s) for s in self._sets])
            self._skeleton.train()
        self._done += 1
        return super()._forward(members, x)


class ResNetTask:
    """Data, target and members; everything deterministic."""

    def __init__(self) -> None:
        self.data: dict[str, Tensor] = {}
        self.classifier = _Watched()
        self._target: State | None = None

    def load(self) -> dict[str, Tensor]:
        """x (2000, 1, 14, 14), y, test_x (300, 1, 14, 14), test_y."""
        if not self.data:
            rng = np.random.default_rng(2)
            for split, count, prefix in (("train", TRAIN, ""), ("t10k", TEST, "test_")):
                images, labels = _read_idx(f"{split}-images-idx3-ubyte"), _read_idx(f"{split}-labels-idx1-ubyte")
                pick = rng.permutation(len(labels))[:count]
                pooled = images[pick].reshape(count, 1, 14, 2, 14, 2).mean(axis=(3, 5))
                self.data[prefix + "x"] = torch.from_numpy(((pooled - 72.0) / 82.0).astype(np.float32))
                y = labels[pick].astype(np.int64)
                self.data[prefix + "y"] = torch.from_numpy(y if prefix else _with_wrong_labels(y, rng))
        return self.data

    def whole(self, seeds: list[int]) -> Members:
        """Models of all training examples, one a seed: the target's is 10."""
        data = self.load()
        inclusion = np.ones((len(seeds), TRAIN), dtype=bool)
        return self.classifier.train(data["x"], data["y"], inclusion, seeds, settings(TARGET))

    def target(self) -> State:
        """theta_0."""
        if self._target is None:
            self._target = self.whole([10]).state(0)
        return self._target

    def train(
        self, start: str, recipe: Recipe, subsets: np.ndarray, seeds: np.ndarray, points: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses of one chunk of members on the training and test examples, after so many steps and at the end."""
        data = self.load()
        first = self.target() if start == "target" else None
        sets = [(data["x"], data["y"]), (data["test_x"], data["test_y"])]
        with self.classifier.watched(points, sets) as rows:
            members = self.classifier.train(
                data["x"], data["y"], subsets, [int(s) for s in seeds], settings(recipe), start=first
            )
        sides = []
        for side, examples in enumerate(sets):
            earlier = [np.concatenate([group[side] for group in rows[point]]) for point in points]
            sides.append(np.stack([*earlier, self.classifier.measure(members, *examples)]).astype(np.float32))
        return sides[0], sides[1]


def resnet_task() -> Task:
    """ResNet-9 from scratch."""
    kinds = {
        "truth": Kind("base", 0.5, TARGET, 100, seeds=5),
        "base": Kind("base", 0.5, TARGET, 100),
        "target": Kind("target", 0.3, SHORT, 200),
    }
    return Task("resnet", TRAIN, TARGET, kinds, ResNetTask().train)
