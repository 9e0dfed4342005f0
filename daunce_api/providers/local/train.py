"""The training loop: one optimiser step at a time, of K LoRA members of one frozen base model or of a whole model.

A single fine-tune is the case K = 1. Members never influence one another: their losses are summed, so each one's
gradient is its own, and AdamW works element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...data.tokenizers import EncodedExample
from ...errors import ConfigurationError, DataError, RejectedError
from ..objective import Objective, noise
from ..randomness import DROPOUT, INIT, ORDER, stream
from .lora import ActiveFull, ActiveLora, AdaptedModel, Batch
from .losses import row_values
from .memory import CPU_TOKENS, passes_of
from .options import LoraSettings, Recipe

SUBSET = Objective()
_LARGEST_WEIGHT = 1e6
"""Trained weights are below 10; above this a run has diverged, also where its loss is finite."""
_READ_EVERY = 16
"""Steps between two looks at the losses, each of which waits for the device."""

Weights = dict[str, tuple[Tensor, Tensor]]
"""One LoRA adapter: A (rank, in) and B (out, rank) of each module."""


@dataclass(frozen=True)
class Member:
    """One fine-tune of a group: its examples and its seed."""

    examples: Sequence[EncodedExample]
    seed: int


@dataclass(frozen=True)
class Row:
    """One example of one member's batch; ``place`` in the batch, its ``weight`` in the mean, and its noise."""

    member: int
    example: EncodedExample
    place: int
    weight: float
    xi: float


def batches_of(n_examples: int, recipe: Recipe, seed: int) -> list[tuple[int, list[int]]]:
    """(epoch from 1, example indices) of every step: a fresh order each epoch; an epoch's last batch may be short."""
    random = stream(seed, ORDER)
    steps = []
    for epoch in range(1, recipe.n_epochs + 1):
        order = random.permutation(n_examples).tolist()
        steps += [(epoch, order[i : i + recipe.batch_size]) for i in range(0, n_examples, recipe.batch_size)]
    return steps


def trained_tokens(examples: Sequence[EncodedExample], recipe: Recipe) -> int:
    """All tokens seen over all epochs, as a provider bills them."""
    return recipe.n_epochs * sum(len(e.ids) for e in examples)


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
    """The adapters of K members, stacked along a first axis; float32."""

    def __init__(
        self,
        model: AdaptedModel,
        members: Sequence[Member],
        shapes: Mapping[str, tuple[int, int]],
        settings: LoraSettings,
        start: Weights | None = None,
    ) -> None:
        """``start`` holds the adapter that all begin with (theta_0); None: fresh weights of each one's own seed."""
        if settings.dropout and model.head_name in shapes:
            raise ConfigurationError("lora_dropout is not computed for an adapter on the output head; leave one out.")
        self.members, self._model, self.settings = members, model, settings
        self._scaling = settings.alpha / settings.rank
        self.start = None if start is None else ActiveLora(model.placed(start), self._scaling)
        """theta_0; None: the base model, which fresh adapters do not change."""
        starts = [start or fresh_weights(shapes, settings.rank, m.seed) for m in members]
        stacked = {n: (torch.stack([s[n][0] for s in starts]), torch.stack([s[n][1] for s in starts])) for n in shapes}
        self._weights = {n: (a.requires_grad_(), b.requires_grad_()) for n, (a, b) in model.placed(stacked).items()}
        self.parameters = [part for pair in self._weights.values() for part in pair]

    def active(self, rows: Sequence[Row], step: int) -> ActiveLora:
        members = [r.member for r in rows] if len(self.members) > 1 else None
        keys = None
        if self.settings.dropout:
            streams = (stream(self.members[r.member].seed, DROPOUT, step, r.place) for r in rows)
            drawn = np.array([random.integers(-(2**63), 2**63) for random in streams])
            keys = torch.tensor(drawn, device=self._model.device)
        return ActiveLora(self._weights, self._scaling, members, self.settings.dropout, keys)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def weights(self, member: int) -> Weights:
        """A copy of a member's adapter."""

        def own(stacked: Tensor) -> Tensor:
            return stacked[member].detach().cpu().clone()

        return {n: (own(a), own(b)) for n, (a, b) in self._weights.items()}


class FullTrainee:
    """All weights of one model (of its text part), trained on a copy; the model's own come back when it is no longer in
    use.

    Where the model is held in half precision, the optimiser works on float32 copies: most of its steps are smaller
    than what bfloat16 resolves.
    """

    def __init__(self, model: AdaptedModel, member: Member, start: Mapping[str, Tensor] | None = None) -> None:
        """``start`` holds the weights that training begins with (theta_0); None: the base model's."""
        self.members, self._model = [member], model
        first = model.own_weights if start is None else start
        self.start = ActiveFull(first)
        held = {n: t.clone() if model.is_text(n) else t for n, t in first.items()}
        self.held = ActiveFull(held, trained=True)
        text = {n: t for n, t in held.items() if model.is_text(n)}
        self._masters = {n: t if t.dtype.itemsize >= 4 else t.float() for n, t in text.items()}
        self.parameters = list(self._masters.values())

    def active(self, rows: Sequence[Row], step: int) -> ActiveFull:
        return self.held

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, master in self._masters.items():
            parameter = self._model.parameters[name]
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
        optimizer.step()
        for name, master in self._masters.items():
            if master is not self.held.weights[name]:
                self.held.weights[name].copy_(master)


def fine_tune(
    model: AdaptedModel,
    trainee: LoraTrainee | FullTrainee,
    recipe: Recipe,
    *,
    objective: Objective = SUBSET,
    max_tokens: int = CPU_TOKENS,
    after_step: Callable[[int, int, list[float]], None] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Train what ``trainee`` holds, its K members side by side; returns each one's losses per step.

    All members take the same number of steps. ``max_tokens`` bounds the padded tokens of one forward pass; a longer
    single row is a pass of its own. The losses that are reported are mean nats per completion token whatever the
    objective. ``after_step(step from 1, total, losses of the K members)``. The K = 1 result is the same for the
    same examples, seed, settings and thread count, byte for byte on a CPU; in a group it differs by float32 round-off.
    The model has its own weights back when this returns or raises.

    Raises DataError for an example without completion tokens, RejectedError where a loss is not finite or weights are
    absurd.
    """
    members = trainee.members
    empty = [e.example.id for m in members for e in m.examples if not e.targets]
    if empty or not all(m.examples for m in members):
        raise DataError("nothing to train on", [f"example {i!r} has no completion token" for i in empty])
    schedules = [batches_of(len(m.examples), recipe, m.seed) for m in members]
    total = len(schedules[0])
    if any(len(s) != total for s in schedules):
        raise DataError("members that are trained together must take the same number of steps")
    xi_K = [noise(len(m.examples), m.seed).tolist() for m in members]
    start = trainee.start if objective.perturbed else None
    optimizer = torch.optim.AdamW(trainee.parameters, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    losses: list[list[float]] = [[] for _ in members]
    unread: list[Tensor] = []
    for step in range(total):
        epoch = schedules[0][step][0]
        rows = [
            Row(k, members[k].examples[i], place, 1 / len(schedule[step][1]), xi_K[k][i])
            for k, schedule in enumerate(schedules)
            for place, i in enumerate(schedule[step][1])
        ]
        step_losses = torch.zeros(len(members), device=model.device)
        for group in passes_of([r.example.targets[-1] for r in rows], max_tokens, model.alone_above):
            chosen = [rows[i] for i in sorted(group)]
            with model.using(trainee.active(chosen, step), training=True):
                batch = Batch.of([(r.example.ids, r.example.targets) for r in chosen], model.device)
                values, nats = row_values(model, objective, batch, [r.xi for r in chosen], start)
                weight = torch.tensor([r.weight for r in chosen], dtype=values.dtype, device=values.device)
                (values * weight).sum().backward()  # type: ignore[no-untyped-call]
            owner = torch.tensor([r.member for r in chosen], device=model.device)
            step_losses.index_add_(0, owner, (nats * weight).to(step_losses))
        unread.append(step_losses)
        last = step + 1 == total or schedules[0][step + 1][0] != epoch
        if after_step is not None or last or len(unread) == _READ_EVERY:
            _read(unread, losses, total)
        optimizer.param_groups[0]["lr"] = recipe.rate(step, total)
        trainee.step(optimizer)
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step + 1, total, [history[-1] for history in losses])
        if after_epoch is not None and last:
            after_epoch(epoch)
    peak = max(float(parameter.detach().abs().amax()) for parameter in trainee.parameters)
    if not peak < _LARGEST_WEIGHT:  # normalisation can hide weights like these from the loss
        raise RejectedError(f"training diverged: weights reach {peak:.1e}. Use a smaller learning rate.")
    return losses


def _read(unread: list[Tensor], losses: list[list[float]], total: int) -> None:
    """Add the losses (K,) of some steps to each member's own. Raises RejectedError where one is not finite."""
    for values in torch.stack(unread).tolist():
        if not all(map(math.isfinite, values)):
            raise RejectedError(
                f"training diverged: the loss is not finite at step {len(losses[0]) + 1} of {total}. "
                "Use a smaller learning rate."
            )
        for history, value in zip(losses, values, strict=True):
            history.append(value)
    unread.clear()
