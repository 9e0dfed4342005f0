"""How a fine-tune is trained: what language models have in common, what is LoRA's or a full fine-tune's own, and what a
classifier takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Recipe:
    """AdamW without weight decay, linear warm-up, cosine to zero. ``warmup_ratio`` is the share of all optimiser
    steps. The model runs in evaluation mode: its own dropout is off, so that a loss is the one that scoring gives."""

    n_epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.03

    def __post_init__(self) -> None:
        wrong = [f"{name} = {getattr(self, name)} ({rule})" for name, rule, good in self._rules() if not good]
        if wrong:
            raise ConfigurationError(f"training settings out of range: {', '.join(wrong)}")

    def _rules(self) -> Iterator[tuple[str, str, bool]]:
        yield "n_epochs", "at least 1", self.n_epochs >= 1
        yield "batch_size", "at least 1", self.batch_size >= 1
        yield "learning_rate", "above 0", self.learning_rate > 0
        yield "warmup_ratio", "from 0 to 1", 0 <= self.warmup_ratio <= 1


@dataclass(frozen=True, slots=True)
class LoraSettings(Recipe):
    """LoRA (Hu et al., 2021): the update added to a layer is (alpha / rank) B A x.

    ``targets`` are module names as PEFT matches them (the last part, or the whole path); None takes PEFT's table for
    the architecture and, for architectures that are not in it, every linear layer but the output head.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def _rules(self) -> Iterator[tuple[str, str, bool]]:
        # Not super(): the class that slots=True makes is another one than this body's.
        yield from Recipe._rules(self)
        yield "rank", "at least 1", self.rank >= 1
        yield "alpha", "above 0", self.alpha > 0
        yield "dropout", "from 0 to below 1", 0 <= self.dropout < 1


@dataclass(frozen=True, slots=True)
class FullSettings(Recipe):
    """Every weight of the model is trained."""

    learning_rate: float = 5e-5


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """Of a classifier: SGD (with momentum) or AdamW. ``schedule`` lowers the rate to 0 over all steps, or keeps it."""

    n_epochs: int = 1
    batch_size: int = 25
    learning_rate: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        good = {
            "n_epochs": self.n_epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate > 0,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "optimizer": self.optimizer in ("sgd", "adamw"),
            "schedule": self.schedule in ("constant", "linear", "cosine"),
        }
        wrong = [f"{name}: {getattr(self, name)}" for name, fits in good.items() if not fits]
        if wrong:
            raise ConfigurationError(f"training settings out of range: {', '.join(wrong)}")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step (from 0), at the middle of its share of the schedule."""
        t = (step + 0.5) / total
        factor = {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[self.schedule]
        return self.learning_rate * factor
