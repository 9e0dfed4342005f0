"""Real fine-tunes for the estimator study: many members at once, raw losses cached outside the repository.

Tasks, each with kinds of ensemble (members from the base on halves with the target's own recipe; members from the
target for one pass; short members from the base, see `short_members`) and a truth (models on random halves that are
never members, several seeds each):

* digits: a two-layer network (64-32-10) fine-tuned on 1,000 8x8 digits, 10 % of the labels wrong, from a base that saw
  497 others; 300 test examples. SGD.
* fashion: a two-layer network (196-64-10) trained from random weights on 5,000 Fashion-MNIST images (2x2 mean-pooled),
  10 % of the labels wrong; 300 test examples. SGD with momentum, cosine decay.
* lm: a LoRA fine-tune (rank 8, query and value projections) of the package's embedded language model on the demo data,
  160 training and 40 test examples. AdamW, linear decay.

* resnet: ResNet-9 from random weights on 2,000 Fashion-MNIST images (tasks_resnet.py).

All members of a chunk are trained together, as one batched matrix product a layer.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daunce_api.core import Rho

CACHE = Path(os.environ.get("DAUNCE_BENCHMARK_CACHE", Path.home() / ".cache" / "daunce-benchmarks"))
FASHION = Path(os.environ.get("FASHION_MNIST_DIR", "/usr/share/datasets/fashion-mnist"))
CHUNK = 50


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: passes over its subset, batch size, peak learning rate, momentum, learning-rate decay.

    The classifiers take SGD or, with ``adam``, AdamW at the settings of most libraries (.9, .999, 1e-8, weight decay
    .01).
    """

    epochs: int
    batch: int
    rate: float
    momentum: float = 0.0
    decay: str = "constant"
    adam: bool = False

    def rates(self, subset: int) -> np.ndarray:
        """(steps,) learning rate of every step."""
        steps = self.epochs * max(1, round(subset / self.batch))
        t = (np.arange(steps) + 0.5) / steps
        shape = {"constant": np.ones(steps), "linear": 1 - t, "cosine": (1 + np.cos(np.pi * t)) / 2}[self.decay]
        return self.rate * shape

    def checkpoints(self, subset: int) -> list[int]:
        """Steps after which checkpoints are scored, the last step not among them: the ends of epochs, or the quarters
        of a single epoch."""
        steps = self.epochs * max(1, round(subset / self.batch))
        parts = self.epochs if self.epochs > 1 else 4
        return [round(steps * i / parts) for i in range(1, parts)]


@dataclass(frozen=True)
class Kind:
    """One kind of model of a task: where it starts, the subset ratio, the recipe, how many are made, and whether
    members are scored at their checkpoints, too."""

    start: str
    ratio: float
    recipe: Recipe
    count: int
    seeds: int = 1
    checkpoints: bool = True


def short_members(target: Recipe, count: int, *, checkpoints: bool = True) -> Kind:
    """Members from the base that take one pass over .3 of the examples at the target's rate times its passes, so that
    an example moves them as far as it moves the target."""
    recipe = replace(target, epochs=1, rate=target.rate * target.epochs)
    return Kind("base", 0.3, recipe, count, checkpoints=checkpoints)


@dataclass(frozen=True)
class Task:
    """A data set, a model and its kinds of ensemble.

    `train` trains one chunk of models, from a starting point by a recipe on subsets with seeds, and returns their
    losses (S + 1, K, N) and (S + 1, K, M) after the S given numbers of steps and at the end.
    """

    name: str
    size: int
    target: Recipe
    kinds: dict[str, Kind]
    train: Callable[[str, Recipe, np.ndarray, np.ndarray, list[int]], tuple[np.ndarray, np.ndarray]]
    pairs: Callable[[], dict[str, list[Any]]] | None = None

    def rho(self, kind: str) -> Rho:
        """Member's learning-rate time over the target's, for members that start from the target (METHOD item 6)."""
        k = self.kinds[kind]
        if k.start != "target":
            return "base"
        member = k.recipe.rates(round(k.ratio * self.size)).sum()
        return float(member / self.target.rates(self.size).sum())


def losses(task: Task, kind: str) -> dict[str, np.ndarray]:
    """train (K, N), test (K, M) and inclusion (K, N) of all models of a kind; trains what the cache lacks.

    Members (not the truth) also have earlier_train (S, K, N) and earlier_test (S, K, M), the losses at their
    checkpoints. Models of one subset with different seeds are averaged in the truth ("per_seed" holds each).
    """
    spec = task.kinds[kind]
    folder = CACHE / task.name / kind
    folder.mkdir(parents=True, exist_ok=True)
    total = spec.count * spec.seeds
    parts = []
    for start in range(0, total, CHUNK):
        files = chunk_files(folder, start)
        if not all(path.exists() for path in files[: 2 if spec.seeds == 1 and spec.checkpoints else 1]):
            _train_chunk(task, kind, np.arange(start, min(start + CHUNK, total)), files)
        parts.append(read_chunk(files))
    out = joined(parts)
    if spec.seeds > 1:
        per_seed = out["test"].reshape(spec.count, spec.seeds, -1)
        out = {"inclusion": out["inclusion"][:: spec.seeds], "test": per_seed.mean(axis=1), "per_seed": per_seed}
    return out


def chunk_files(folder: Path, start: int) -> tuple[Path, Path]:
    """Where the losses of final models and of checkpoints are, of the models from number ``start`` on."""
    return folder / f"{start:05d}.npz", folder / f"{start:05d}.earlier.npz"


def read_chunk(files: tuple[Path, Path]) -> dict[str, np.ndarray]:
    """The arrays of one chunk; earlier ones where they are there."""
    with np.load(files[0]) as stored:
        out = {name: stored[name] for name in stored.files}
    if files[1].exists():
        with np.load(files[1]) as stored:
            out |= {f"earlier_{name}": stored[name] for name in stored.files}
    return out


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Chunks in a row: members are the last axis but one."""
    names = set(parts[0]).intersection(*parts[1:])
    return {name: np.concatenate([p[name] for p in parts], axis=-2) for name in names}


def _train_chunk(task: Task, kind: str, ids: np.ndarray, files: tuple[Path, Path]) -> None:
    spec = task.kinds[kind]
    subsets = np.stack([_subset(task, kind, int(i) // spec.seeds) for i in ids])
    seeds = np.array([_number(task.name, kind, int(i)) for i in ids])
    points = [] if spec.seeds > 1 or not spec.checkpoints else spec.recipe.checkpoints(int(subsets[0].sum()))
    train, test = task.train(spec.start, spec.recipe, subsets, seeds, points)
    if files[0].exists():
        with np.load(files[0]) as stored:
            if not np.allclose(stored["test"], test[-1], atol=1e-3):
                raise RuntimeError(f"{files[0]} was made by other code or another machine: delete {files[0].parent}.")
    else:
        _save(files[0], train=train[-1], test=test[-1], inclusion=subsets)
    if points:
        _save(files[1], train=train[:-1], test=test[:-1])


def _save(path: Path, **arrays: np.ndarray) -> None:
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    temporary.rename(path)


def _number(*parts: object) -> int:
    return int(np.random.SeedSequence([*json.dumps(parts).encode()]).generate_state(1)[0])


def _subset(task: Task, kind: str, index: int) -> np.ndarray:
    rng = np.random.default_rng(_number(task.name, kind, "subset", index))
    mask = np.zeros(task.size, dtype=bool)
    mask[rng.permutation(task.size)[: round(task.kinds[kind].ratio * task.size)]] = True
    return mask


# --- classifiers: all members of a chunk in one batched product -------------------------------------------------------


def logits(weights: list[Tensor], x: Tensor) -> Tensor:
    """x (K, B, D) or (B, D) under K two-layer networks: (K, B, C)."""
    w1, b1, w2, b2 = weights
    hidden = torch.relu(torch.matmul(x, w1) + b1)
    return torch.matmul(hidden, w2) + b2


def _fit(
    weights: list[Tensor],
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    subsets: np.ndarray,
    seeds: np.ndarray,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """SGD or AdamW on every member's own subset, in place; ``after`` is told the number of steps done."""
    chosen = [np.flatnonzero(mask) for mask in subsets]
    generators = [np.random.default_rng(int(seed)) for seed in seeds]
    rates = recipe.rates(len(chosen[0]))
    per_epoch = len(rates) // recipe.epochs
    step_with = _adamw(weights) if recipe.adam else _sgd(weights, recipe.momentum)
    for epoch in range(recipe.epochs):
        order = np.stack([g.permutation(c) for g, c in zip(generators, chosen, strict=True)])
        for step, batch in enumerate(np.array_split(order, per_epoch, axis=1)):
            index = torch.from_numpy(batch)
            live = [w.requires_grad_(True) for w in weights]
            found = logits(live, x[index])
            loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), y[index].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss / index.shape[1], live)
            with torch.no_grad():
                step_with(gradients, float(rates[epoch * per_epoch + step]))
            after(epoch * per_epoch + step + 1)
    for w in weights:
        w.requires_grad_(False)


def _sgd(weights: list[Tensor], momentum: float) -> Callable[[Sequence[Tensor], float], None]:
    velocity = [torch.zeros_like(w) for w in weights]

    def step(gradients: Sequence[Tensor], rate: float) -> None:
        for w, v, g in zip(weights, velocity, gradients, strict=True):
            v.mul_(momentum).add_(g)
            w.sub_(rate * v)

    return step


def _adamw(weights: list[Tensor]) -> Callable[[Sequence[Tensor], float], None]:
    # Every operation is elementwise, so one optimiser over batched weights is an optimiser for each member.
    optimiser = torch.optim.AdamW(weights)

    def step(gradients: Sequence[Tensor], rate: float) -> None:
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()

    return step


def _all_losses(weights: list[Tensor], x: Tensor, y: Tensor) -> np.ndarray:
    parts = []
    with torch.no_grad():
        for start in range(0, len(x), 500):
            log_p = torch.log_softmax(logits(weights, x[start : start + 500]), dim=-1)
            label = y[start : start + 500].expand(log_p.shape[0], -1)[..., None]
            parts.append(-log_p.gather(-1, label)[..., 0])
    return torch.cat(parts, dim=1).numpy()


def _initial(count: int, sizes: tuple[int, int, int], seeds: np.ndarray) -> list[Tensor]:
    inputs, hidden, classes = sizes
    out: list[list[np.ndarray]] = []
    for seed in np.resize(seeds, count):
        rng = np.random.default_rng([int(seed), 1])
        out.append(
            [
                rng.normal(0, np.sqrt(2 / inputs), (inputs, hidden)),
                np.zeros((1, hidden)),
                rng.normal(0, np.sqrt(1 / hidden), (hidden, classes)),
                np.zeros((1, classes)),
            ]
        )
    return [torch.tensor(np.stack(w), dtype=torch.float32) for w in zip(*out, strict=True)]


class _Classifier:
    """Data and starting points of a classifier task; everything deterministic, targets cached."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        load: Callable[[], dict[str, np.ndarray]],
        target: Recipe,
        base: Recipe | None,
    ) -> None:
        self.sizes, self.load, self.target, self.base = sizes, load, target, base
        self.data: dict[str, Tensor] = {}
        self._base: list[Tensor] | None = None
        self._target: list[Tensor] | None = None

    def start(self, where: str, count: int, seeds: np.ndarray) -> list[Tensor]:
        if not self.data:
            self.data = {name: torch.from_numpy(value) for name, value in self.load().items()}
        if where == "base" and self.base is None:
            return _initial(count, self.sizes, seeds)
        if where == "base":
            if self._base is None:
                self._base = _initial(1, self.sizes, np.array([7]))
                x, y = self.data["base_x"], self.data["base_y"]
                assert self.base is not None
                _fit(self._base, x, y, self.base, np.ones((1, len(x)), dtype=bool), np.array([8]))
            return [w.repeat(count, 1, 1) for w in self._base]
        if self._target is None:
            self._target = self.start("base", 1, np.array([9]))
            whole = np.ones((1, len(self.data["x"])), dtype=bool)
            _fit(self._target, self.data["x"], self.data["y"], self.target, whole, np.array([10]))
        return [w.repeat(count, 1, 1) for w in self._target]

    def train(
        self, start: str, recipe: Recipe, subsets: np.ndarray, seeds: np.ndarray, points: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        weights = self.start(start, len(subsets), seeds)
        train, test = [], []

        def score(step: int) -> None:
            if step in points:
                train.append(_all_losses(weights, self.data["x"], self.data["y"]))
                test.append(_all_losses(weights, self.data["test_x"], self.data["test_y"]))

        points = [*points, len(recipe.rates(int(subsets[0].sum())))]
        _fit(weights, self.data["x"], self.data["y"], recipe, subsets, seeds, score)
        return np.stack(train), np.stack(test)


def _with_wrong_labels(y: np.ndarray, rng: np.random.Generator, share: float = 0.1) -> np.ndarray:
    y = y.copy()
    wrong = rng.permutation(len(y))[: round(share * len(y))]
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return y


def _load_digits(wrong: float = 0.1) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int64)
    return {
        "x": x[:1000],
        "y": _with_wrong_labels(y[:1000], rng, wrong),
        "test_x": x[1000:1300],
        "test_y": y[1000:1300],
        "base_x": x[1300:],
        "base_y": y[1300:],
    }


def _read_idx(name: str) -> np.ndarray:
    with gzip.open(FASHION / f"{name}.gz") as file:
        raw = file.read()
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def _load_fashion() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    out: dict[str, np.ndarray] = {}
    for split, count, prefix in (("train", 5000, ""), ("t10k", 300, "test_")):
        images, labels = _read_idx(f"{split}-images-idx3-ubyte"), _read_idx(f"{split}-labels-idx1-ubyte")
        pick = rng.permutation(len(labels))[:count]
        pooled = images[pick].reshape(count, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(count, 196)
        out[prefix + "x"] = ((pooled - 72.0) / 82.0).astype(np.float32)
        out[prefix + "y"] = labels[pick].astype(np.int64)
    out["y"] = _with_wrong_labels(out["y"], rng)
    return out


def wrong_labels(name: str) -> np.ndarray:
    """(N,) which training labels of a classifier task were made wrong."""
    if name == "digits":
        from sklearn.datasets import load_digits

        true = load_digits().target[np.random.default_rng(0).permutation(1797)][:1000]
        return _load_digits()["y"] != true
    labels = _read_idx("train-labels-idx1-ubyte")
    return _load_fashion()["y"] != labels[np.random.default_rng(1).permutation(len(labels))[:5000]]


def digits_classifier(target: Recipe, wrong: float) -> _Classifier:
    """Data, base and target of the digits task under a recipe."""
    return _Classifier((64, 64, 10), partial(_load_digits, wrong), target, Recipe(10, 25, 0.2))


def digits_task(name: str, target: Recipe, wrong: float = 0.1, members: int = 600, seeds: int = 10) -> Task:
    """The digits task under a recipe, with a share of wrong labels; short members take one pass."""
    digits = digits_classifier(target, wrong)
    once = replace(target, epochs=1)
    kinds = {
        "base": Kind("base", 0.5, target, members),
        "target": Kind("target", 0.3, once, members),
        "short": short_members(target, members),
        "truth": Kind("base", 0.5, target, 100, seeds=seeds),
    }
    return Task(name, 1000, target, kinds, digits.train)


def classifier_tasks() -> dict[str, Task]:
    """digits and fashion."""
    fashion_target = Recipe(10, 50, 0.03, 0.9, "cosine")
    fashion = _Classifier((196, 64, 10), _load_fashion, fashion_target, None)
    return {
        "digits": digits_task("digits", Recipe(6, 25, 0.1)),
        "fashion": Task(
            "fashion",
            5000,
            fashion_target,
            {
                "base": Kind("base", 0.5, fashion_target, 400),
                "target": Kind("target", 0.3, Recipe(1, 50, 0.03, 0.9, "cosine"), 400),
                "short": short_members(fashion_target, 400),
                "truth": Kind("base", 0.5, fashion_target, 100, seeds=5),
            },
            fashion.train,
        ),
    }


def all_tasks(names: Sequence[str] = ()) -> dict[str, Any]:
    """Every task by name, or those of some names; language models and ResNets are imported only where needed."""
    from tests.benchmarks.tasks_lm import text_tasks

    found: dict[str, Any] = {**classifier_tasks(), **text_tasks()}
    if not names or "resnet" in names:
        from tests.benchmarks.tasks_resnet import resnet_task

        found["resnet"] = resnet_task()
    return found
