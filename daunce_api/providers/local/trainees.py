"""What an optimiser step changes: the stacked LoRA adapters of several members, or all weights of one model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...data.tokenizers import EncodedExample
from ..randomness import DROPOUT, INIT, stream
from .head import Head
from .lora import Active, ActiveFull, ActiveLora, AdaptedModel
from .objectives import References
from .recipes import LoraSettings

Weights = dict[str, tuple[Tensor, Tensor]]
"""One LoRA adapter: A (rank, in) and B (out, rank) of each module."""
FullWeights = dict[str, Tensor]
"""All weights of a model, by the names of ``named_parameters``."""


@dataclass(frozen=True)
class Member:
    """One fine-tune of a group: its examples, its seed, and the adapter weights that it starts from (None: fresh; a
    full fine-tune gets its start elsewhere)."""

    examples: Sequence[EncodedExample]
    seed: int
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None


@dataclass
class Row:
    """One example of one member's batch; ``place`` in the batch, its ``weight`` in the mean, and its noise."""

    member: int
    example: EncodedExample
    place: int
    weight: float
    xi: float

    @property
    def length(self) -> int:
        return self.example.targets[-1]  # what follows the last target's predecessor is never read


class Trainee(Protocol):
    """Weights in training."""

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser changes."""
        ...

    @property
    def adapted(self) -> Iterable[str]:
        """Modules with an adapter."""
        ...

    def active(self, rows: Sequence[Row], step: int) -> Active:
        """What a forward pass of these rows is computed with."""
        ...

    def references(self, head: Head, keep_bytes: int) -> list[References]:
        """theta_0 of every member."""
        ...

    def before_step(self) -> None:
        """All gradients of the step are there."""
        ...

    def after_step(self) -> None:
        """The optimiser has changed :attr:`parameters`."""
        ...


def fresh_weights(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Weights:
    """LoRA's start as PEFT makes it: A uniform within +-1/sqrt(in), B zero. ``shapes[module] = (in, out)``."""
    random = stream(seed, INIT)
    weights = {}
    for name, (n_in, n_out) in shapes.items():
        bound = 1 / math.sqrt(n_in)
        a = torch.from_numpy(random.uniform(-bound, bound, (rank, n_in)).astype(np.float32))
        weights[name] = (a, torch.zeros(n_out, rank))
    return weights


class LoraTrainee:
    """The adapters of K members, stacked along a first axis where there are several."""

    def __init__(
        self,
        model: AdaptedModel,
        members: Sequence[Member],
        shapes: Mapping[str, tuple[int, int]],
        settings: LoraSettings,
    ) -> None:
        self._model, self._members, self._shapes, self._settings = model, members, shapes, settings
        self._together = len(members) > 1
        self._scaling = settings.alpha / settings.rank
        starts = [m.start or fresh_weights(shapes, settings.rank, m.seed) for m in members]
        stacked: Weights = {}
        for name in shapes:
            a, b = (
                torch.stack([s[name][i] for s in starts]) if self._together else starts[0][name][i].clone()
                for i in (0, 1)
            )
            stacked[name] = (a, b)
        self._weights = {n: (a.requires_grad_(), b.requires_grad_()) for n, (a, b) in model.placed(stacked).items()}

    @property
    def parameters(self) -> list[Tensor]:
        return [p for pair in self._weights.values() for p in pair]

    @property
    def adapted(self) -> Iterable[str]:
        return self._weights

    def active(self, rows: Sequence[Row], step: int) -> ActiveLora:
        owner = torch.tensor([r.member for r in rows], device=self._model.device) if self._together else None
        return ActiveLora(self._weights, self._scaling, owner, self._dropout(rows, step))

    def references(self, head: Head, keep_bytes: int) -> list[References]:
        """Members with the same start share one."""
        shared: dict[int, References] = {}
        for member in self._members:
            if id(member.start) not in shared:
                start = None
                if member.start is not None:
                    start = ActiveLora(self._model.placed(member.start), self._scaling)
                shared[id(member.start)] = References(self._model, head, start, keep_bytes)
        return [shared[id(m.start)] for m in self._members]

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...

    def weights(self) -> list[Weights]:
        """A copy of each member's adapter."""
        held = {n: (a.detach().cpu(), b.detach().cpu()) for n, (a, b) in self._weights.items()}
        if not self._together:
            return [{n: (a.clone(), b.clone()) for n, (a, b) in held.items()}]
        return [{n: (a[k].clone(), b[k].clone()) for n, (a, b) in held.items()} for k in range(len(self._members))]

    def _dropout(self, rows: Sequence[Row], step: int) -> dict[str, Tensor] | None:
        """Dropout masks that depend on member, step and place in the batch alone, never on how rows are grouped."""
        share = self._settings.dropout
        if not share:
            return None
        width = max(r.length for r in rows)
        masks = {name: torch.zeros(len(rows), width, n_in) for name, (n_in, _) in self._shapes.items()}
        for i, row in enumerate(rows):
            random = stream(self._members[row.member].seed, DROPOUT, step, row.place)
            for name, (n_in, _) in self._shapes.items():
                keep = random.random((row.length, n_in), dtype=np.float32) >= share
                masks[name][i, : row.length] = torch.from_numpy(keep) / (1 - share)
        return {name: mask.to(self._model.device) for name, mask in masks.items()}


class FullTrainee:
    """All weights of one model, trained on a copy; the model's own come back when it is no longer in use.

    Where the model is held in half precision, the optimiser works on float32 copies: most of its steps are smaller
    than what bfloat16 resolves.
    """

    def __init__(self, model: AdaptedModel, start: Mapping[str, Tensor] | None) -> None:
        """``start`` holds the weights that training begins with (theta_0); None: the base model's."""
        self._model = model
        self._start = ActiveFull(model.own_weights if start is None else start)
        self._held = ActiveFull({n: t.clone() for n, t in self._start.weights.items()}, trained=True)
        self._masters = {
            n: t if t.dtype in (torch.float32, torch.float64) else t.float() for n, t in self._held.weights.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return list(self._masters.values())

    @property
    def adapted(self) -> Iterable[str]:
        return ()

    def active(self, rows: Sequence[Row], step: int) -> ActiveFull:
        return self._held

    def references(self, head: Head, keep_bytes: int) -> list[References]:
        return [References(self._model, self._at_start(head), self._start, keep_bytes)]

    def _at_start(self, head: Head) -> Head:
        names = {id(p): n for n, p in self._model.parameters.items()}
        bias = None if head.bias is None else self._start.weights[names[id(head.bias)]]
        return head.at(self._start.weights[names[id(head.weight)]], bias)

    def before_step(self) -> None:
        for name, parameter in self._model.parameters.items():
            if parameter.grad is not None:
                self._masters[name].grad = parameter.grad.to(self._masters[name].dtype)
                parameter.grad = None

    def after_step(self) -> None:
        for name, master in self._masters.items():
            if master is not self._held.weights[name]:
                self._held.weights[name].copy_(master)

    def weights(self) -> FullWeights:
        """A copy of the weights as they are now, in the precision that the model computes with."""
        return {n: t.detach().clone() for n, t in self._held.weights.items()}
