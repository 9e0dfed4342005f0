"""Optimiser steps of members: by hand for plain networks, by autograd and torch's optimisers for all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .class_losses import BatchLoss
from .members import State
from .recipes import ClassifierSettings
from .stacked import PlainNetwork


class Steps(Protocol):
    def step(self, x: Tensor, loss: BatchLoss, rate: float) -> None:
        """Change the members' weights by the mean of ``loss`` over each one's own rows of ``x`` (K, B, ...)."""


class ByAutograd:
    """Of any module: ``forward`` gives logits (K, B, classes) by ``parameters``."""

    def __init__(
        self, forward: Callable[[Tensor], Tensor], parameters: list[Tensor], settings: ClassifierSettings
    ) -> None:
        self._forward = forward
        self._optimizer: torch.optim.Optimizer
        decay = settings.weight_decay
        if settings.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(parameters, weight_decay=decay, fused=True)
        else:
            self._optimizer = torch.optim.SGD(parameters, momentum=settings.momentum, weight_decay=decay, fused=True)

    def step(self, x: Tensor, loss: BatchLoss, rate: float) -> None:
        mean = loss.values(self._forward(x).flatten(0, 1)).sum() / x.shape[1]
        mean.backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()


class ByHand:
    """Of a plain network."""

    def __init__(self, network: PlainNetwork, weights: State, settings: ClassifierSettings) -> None:
        self._network = network
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        kind = _AdamW if settings.optimizer == "adamw" else _Sgd
        self._update: _AdamW | _Sgd = kind(self._weights, settings)

    def step(self, x: Tensor, loss: BatchLoss, rate: float) -> None:
        def gradient(logits: Tensor) -> Tensor:
            return loss.gradient(logits.flatten(0, 1)).view(logits.shape)

        with torch.no_grad():
            self._update.begin(rate, 1 / x.shape[1])
            self._network.step(self._weights, x, gradient, self._update)
            self._update.end()


class _Sgd:
    """As torch.optim.SGD. The product that gives a gradient adds it to the weights, or to their momentum."""

    def __init__(self, weights: Mapping[str, Tensor], settings: ClassifierSettings) -> None:
        self._weights = weights
        self._momentum, self._decay = settings.momentum, settings.weight_decay
        self._velocity = {n: torch.zeros_like(w) for n, w in weights.items()} if settings.momentum else {}
        self._rate = self._scale = 0.0

    def begin(self, rate: float, scale: float) -> None:
        """``scale``: of all gradients until the next step."""
        self._rate, self._scale = rate, scale

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        weight, velocity = self._weights[name], self._velocity.get(name)
        if velocity is None:
            weight.baddbmm_(left, right, beta=1 - self._rate * self._decay, alpha=-self._rate * self._scale)
        else:
            velocity.baddbmm_(left, right, beta=self._momentum, alpha=self._scale)
            self._move(weight, velocity)

    def value(self, name: str, gradient: Tensor) -> None:
        weight, velocity = self._weights[name], self._velocity.get(name)
        if velocity is None:
            weight.mul_(1 - self._rate * self._decay).add_(gradient, alpha=-self._rate * self._scale)
        else:
            velocity.mul_(self._momentum).add_(gradient, alpha=self._scale)
            self._move(weight, velocity)

    def _move(self, weight: Tensor, velocity: Tensor) -> None:
        if self._decay:
            velocity.add_(weight, alpha=self._decay)
        weight.add_(velocity, alpha=-self._rate)

    def end(self) -> None:
        """Nothing is left to do."""


class _AdamW:
    """torch.optim.AdamW over all members' weights."""

    def __init__(self, weights: Mapping[str, Tensor], settings: ClassifierSettings) -> None:
        self._weights = weights
        self._optimizer = torch.optim.AdamW(list(weights.values()), weight_decay=settings.weight_decay, fused=True)
        self._scale = 0.0

    def begin(self, rate: float, scale: float) -> None:
        self._scale = scale
        self._optimizer.param_groups[0]["lr"] = rate

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        self._weights[name].grad = torch.bmm(left, right).mul_(self._scale)

    def value(self, name: str, gradient: Tensor) -> None:
        self._weights[name].grad = gradient.mul_(self._scale)

    def end(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
