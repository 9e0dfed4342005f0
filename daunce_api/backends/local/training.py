"""The training loop: K LoRA members of one frozen base model, one optimiser step of all of them at a time.

A single fine-tune is the case K = 1. Members never influence one another: their losses are summed, so each one's
gradient is its own, and AdamW works element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, RejectedError, TrainingCancelledError
from ...tokens import EncodedExample
from .adapters import LoraSettings
from .batching import split_rows
from .head import Head
from .lora import ActiveLora, AdaptedModel
from .objectives import Objective, References, noise, row_values
from .randomness import DROPOUT, INIT, ORDER, stream

Weights = dict[str, tuple[Tensor, Tensor]]

SUBSET = Objective()


@dataclass(frozen=True)
class TrainOutcome:
    """What a fine-tune left.

    ``losses``: one value an optimiser step, the mean over the batch's examples of each one's nats per completion
    token, before the step. ``epoch_of_step`` counts from 1. ``trained_tokens``: all tokens seen over all epochs, as a
    provider bills them.
    """

    adapter: Path
    losses: tuple[float, ...]
    epoch_of_step: tuple[int, ...]
    trained_tokens: int


@dataclass(frozen=True)
class Member:
    """One fine-tune of a group: its examples, its seed, and the adapter weights that it starts from (None: fresh)."""

    examples: Sequence[EncodedExample]
    seed: int
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None


def batches_of(n_examples: int, settings: LoraSettings, seed: int) -> list[tuple[int, list[int]]]:
    """(epoch from 1, example indices) of every step: a fresh order each epoch; an epoch's last batch may be short."""
    random = stream(seed, ORDER)
    steps = []
    for epoch in range(1, settings.n_epochs + 1):
        order = random.permutation(n_examples).tolist()
        steps += [(epoch, order[i : i + settings.batch_size]) for i in range(0, n_examples, settings.batch_size)]
    return steps


def learning_rate_at(step: int, total: int, settings: LoraSettings) -> float:
    """Rate of optimiser step ``step`` (from 0): linear from above 0 over the warm-up, then a cosine to 0."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def fresh_weights(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Weights:
    """LoRA's start as PEFT makes it: A uniform within +-1/sqrt(in), B zero. ``shapes[module] = (in, out)``."""
    random = stream(seed, INIT)
    weights = {}
    for name, (n_in, n_out) in shapes.items():
        bound = 1 / math.sqrt(n_in)
        a = torch.from_numpy(random.uniform(-bound, bound, (rank, n_in)).astype(np.float32))
        weights[name] = (a, torch.zeros(n_out, rank))
    return weights


@dataclass
class _Row:
    member: int
    example: EncodedExample
    place: int
    weight: float
    xi: float

    @property
    def length(self) -> int:
        return self.example.targets[-1]  # what follows the last target's predecessor is never read


def train_members(
    model: AdaptedModel,
    members: Sequence[Member],
    shapes: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
    *,
    objective: Objective = SUBSET,
    max_tokens: int,
    keep_bytes: int = 1 << 28,
    after_step: Callable[[int, int, int, list[float]], None] | None = None,
    after_epoch: Callable[[int, list[Weights]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[list[Weights], list[list[float]], list[int]]:
    """Train K members side by side; returns their weights, their losses per step, and the epoch of each step.

    All members take the same number of steps. ``max_tokens`` bounds the padded tokens of one forward pass,
    ``keep_bytes`` the hidden states of theta_0 (each member's start) that are kept for a perturbed objective. The
    losses that are reported are mean nats per completion token whatever the objective.
    ``after_step(step from 1, total, epoch, losses of the K members)``. The K = 1 result is the same for the same
    examples, seed, settings and thread count, byte for byte on a CPU; in a group it differs by float32 round-off.

    Raises TrainingCancelledError once ``should_stop`` says so (asked before each step), DataError for an example
    without completion tokens, RejectedError where a loss is not finite.
    """
    empty = [e.example.id for m in members for e in m.examples if not e.targets]
    if empty or not all(m.examples for m in members):
        raise DataError("nothing to train on", [f"example {i!r} has no completion token" for i in empty])
    schedules = [batches_of(len(m.examples), settings, m.seed) for m in members]
    total = len(schedules[0])
    if any(len(s) != total for s in schedules):
        raise DataError("members that are trained together must take the same number of steps")
    starts = [m.start or fresh_weights(shapes, settings.rank, m.seed) for m in members]
    together = len(members) > 1
    names = list(shapes)
    parameters: Weights = {}
    for name in names:
        pair = [torch.stack([s[name][i] for s in starts]) if together else starts[0][name][i].clone() for i in (0, 1)]
        parameters[name] = (
            pair[0].to(model.device).requires_grad_(),
            pair[1].to(model.device).requires_grad_(),
        )
    scaling = settings.alpha / settings.rank
    head = model.output
    xi_K = [noise(len(m.examples), m.seed).tolist() for m in members]
    references = _references(model, head, members, scaling, keep_bytes) if objective.perturbed else []
    flat = [p for name in names for p in parameters[name]]
    optimizer = torch.optim.AdamW(flat, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    losses: list[list[float]] = [[] for _ in members]
    epochs: list[int] = []
    for step in range(total):
        if should_stop is not None and should_stop():
            raise TrainingCancelledError(f"training was cancelled at step {step} of {total}; nothing was written")
        epoch = schedules[0][step][0]
        rows = [
            _Row(k, members[k].examples[i], place, 1 / len(schedule[step][1]), xi_K[k][i])
            for k, schedule in enumerate(schedules)
            for place, i in enumerate(schedule[step][1])
        ]
        step_losses = [0.0] * len(members)
        for group in split_rows([r.length for r in rows], max_tokens=max_tokens):
            chosen = [rows[i] for i in sorted(group)]
            masks = _dropout(model, shapes, settings, [members[r.member].seed for r in chosen], chosen, step)
            owner = torch.tensor([r.member for r in chosen], device=model.device) if together else None
            own = [r.example for r in chosen]
            fixed = [references[r.member].of([r.example])[0] for r in chosen] if objective.perturbed else []
            with model.training(), model.using(ActiveLora(parameters, scaling, owner, masks)):
                values, nats = row_values(model, head, objective, own, fixed, [r.xi for r in chosen])
                weight = torch.tensor([r.weight for r in chosen], dtype=values.dtype, device=values.device)
                (values * weight).sum().backward()  # type: ignore[no-untyped-call]
            for row, value in zip(chosen, nats.tolist(), strict=True):
                step_losses[row.member] += value * row.weight
        if not all(map(math.isfinite, step_losses)):
            raise RejectedError(
                f"training diverged: the loss is not finite at step {step + 1} of {total}. Use a smaller learning rate."
            )
        for group_ in optimizer.param_groups:
            group_["lr"] = learning_rate_at(step, total, settings)
        optimizer.step()
        optimizer.zero_grad()
        for history, value in zip(losses, step_losses, strict=True):
            history.append(value)
        epochs.append(epoch)
        if after_step is not None:
            after_step(step + 1, total, epoch, step_losses)
        if after_epoch is not None and (step + 1 == total or schedules[0][step + 1][0] != epoch):
            after_epoch(epoch, _members_of(parameters, len(members)))
    return _members_of(parameters, len(members)), losses, epochs


def _references(
    model: AdaptedModel, head: Head, members: Sequence[Member], scaling: float, keep_bytes: int
) -> list[References]:
    """theta_0 of every member; members with the same start share one."""
    shared: dict[int, References] = {}
    for member in members:
        if id(member.start) not in shared:
            start = None
            if member.start is not None:
                weights = {n: (a.to(model.device), b.to(model.device)) for n, (a, b) in member.start.items()}
                start = ActiveLora(weights, scaling)
            shared[id(member.start)] = References(model, head, start, keep_bytes)
    return [shared[id(m.start)] for m in members]


def _members_of(parameters: Weights, count: int) -> list[Weights]:
    held = {n: (a.detach().cpu(), b.detach().cpu()) for n, (a, b) in parameters.items()}
    if count == 1:
        return [{n: (a.clone(), b.clone()) for n, (a, b) in held.items()}]
    return [{n: (a[k].clone(), b[k].clone()) for n, (a, b) in held.items()} for k in range(count)]


def _dropout(
    model: AdaptedModel,
    shapes: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
    seeds: Sequence[int],
    rows: Sequence[_Row],
    step: int,
) -> dict[str, Tensor] | None:
    """Dropout masks that depend on member, step and place in the batch alone, never on how rows are grouped."""
    if not settings.dropout:
        return None
    width = max(r.length for r in rows)
    masks = {name: torch.zeros(len(rows), width, n_in) for name, (n_in, _) in shapes.items()}
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        random = stream(seed, DROPOUT, step, row.place)
        for name, (n_in, _) in shapes.items():
            keep = random.random((row.length, n_in), dtype=np.float32) >= settings.dropout
            masks[name][i, : row.length] = torch.from_numpy(keep) / (1 - settings.dropout)
    return {name: mask.to(model.device) for name, mask in masks.items()}
