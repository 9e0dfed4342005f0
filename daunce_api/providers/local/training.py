"""The training loop: one optimiser step at a time, of K LoRA members of one frozen base model or of a whole model.

A single fine-tune is the case K = 1. Members never influence one another: their losses are summed, so each one's
gradient is its own, and AdamW works element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...data.tokenizers import EncodedExample
from ...errors import DataError, RejectedError, TrainingCancelledError
from ..objective import Objective, noise
from ..randomness import ORDER, stream
from .allocation import keep_freed_memory
from .batching import PACKED_TOKENS, consecutive_rows, split_rows
from .lora import AdaptedModel
from .objectives import row_values
from .recipes import FullSettings, LoraSettings, Recipe
from .trainees import FullTrainee, FullWeights, LoraTrainee, Member, Row, Trainee, Weights

SUBSET = Objective()
KEEP_BYTES = 1 << 28

AfterStep = Callable[[int, int, int, list[float]], None]


@dataclass(frozen=True)
class TrainOutcome:
    """What a fine-tune left.

    ``adapter`` is the folder: a LoRA adapter, or a whole model. ``losses``: one value an optimiser step, the mean over
    the batch's examples of each one's nats per completion token, before the step. ``epoch_of_step`` counts from 1.
    ``trained_tokens``: see :func:`trained_tokens`.
    """

    adapter: Path
    losses: tuple[float, ...]
    epoch_of_step: tuple[int, ...]
    trained_tokens: int


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


def learning_rate_at(step: int, total: int, recipe: Recipe) -> float:
    """Rate of optimiser step ``step`` (from 0): linear from above 0 over the warm-up, then a cosine to 0."""
    warmup = math.ceil(recipe.warmup_ratio * total)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_members(
    model: AdaptedModel,
    members: Sequence[Member],
    shapes: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
    *,
    objective: Objective = SUBSET,
    max_tokens: int,
    keep_bytes: int = KEEP_BYTES,
    after_step: AfterStep | None = None,
    after_epoch: Callable[[int, list[Weights]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[list[Weights], list[list[float]], list[int]]:
    """Train the LoRA adapters of K members side by side; returns their weights, their losses per step, and the epoch of
    each step.

    All members take the same number of steps. ``max_tokens`` bounds the tokens of one forward pass: padded ones, or,
    where the model is :mod:`packed`, real ones, which are at most ``PACKED_TOKENS`` besides. A longer single row is a
    pass of its own. ``keep_bytes`` bounds the hidden states of theta_0 (each member's start) that are kept for a
    perturbed objective. The losses that are reported are mean nats per completion token whatever the objective.
    On a CPU, glibc's malloc is set to keep freed memory, for the rest of the process
    (:func:`allocation.keep_freed_memory`).
    ``after_step(step from 1, total, epoch, losses of the K members)``. The K = 1 result is the same for the same
    examples, seed, settings and thread count, byte for byte on a CPU; in a group it differs by float32 round-off.

    Raises TrainingCancelledError once ``should_stop`` says so (asked before each step), DataError for an example
    without completion tokens, RejectedError where a loss is not finite.
    """
    _check(members)
    trainee = LoraTrainee(model, members, shapes, settings)
    losses, epochs = _train(
        model,
        trainee,
        members,
        settings,
        objective=objective,
        max_tokens=max_tokens,
        keep_bytes=keep_bytes,
        after_step=after_step,
        after_epoch=None if after_epoch is None else lambda epoch: after_epoch(epoch, trainee.weights()),
        should_stop=should_stop,
    )
    return trainee.weights(), losses, epochs


def train_full(
    model: AdaptedModel,
    member: Member,
    start: Mapping[str, Tensor] | None,
    settings: FullSettings,
    *,
    objective: Objective = SUBSET,
    max_tokens: int,
    keep_bytes: int = KEEP_BYTES,
    after_step: AfterStep | None = None,
    after_epoch: Callable[[int, FullWeights], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[FullWeights, list[float], list[int]]:
    """Train all weights of one member, from ``start`` (None: the base model); otherwise as :func:`train_members`.

    ``model`` has its own weights back when this returns or raises.
    """
    _check([member])
    trainee = FullTrainee(model, start)
    try:
        losses, epochs = _train(
            model,
            trainee,
            [member],
            settings,
            objective=objective,
            max_tokens=max_tokens,
            keep_bytes=keep_bytes,
            after_step=after_step,
            after_epoch=None if after_epoch is None else lambda epoch: after_epoch(epoch, trainee.weights()),
            should_stop=should_stop,
        )
    finally:
        for parameter in model.parameters.values():
            parameter.grad = None
    return trainee.weights(), losses[0], epochs


def _check(members: Sequence[Member]) -> None:
    empty = [e.example.id for m in members for e in m.examples if not e.targets]
    if empty or not all(m.examples for m in members):
        raise DataError("nothing to train on", [f"example {i!r} has no completion token" for i in empty])


def _train(
    model: AdaptedModel,
    trainee: Trainee,
    members: Sequence[Member],
    recipe: Recipe,
    *,
    objective: Objective,
    max_tokens: int,
    keep_bytes: int,
    after_step: AfterStep | None,
    after_epoch: Callable[[int], None] | None,
    should_stop: Callable[[], bool] | None,
) -> tuple[list[list[float]], list[int]]:
    """Losses of each member and step, and the epoch of each step."""
    schedules = [batches_of(len(m.examples), recipe, m.seed) for m in members]
    total = len(schedules[0])
    if any(len(s) != total for s in schedules):
        raise DataError("members that are trained together must take the same number of steps")
    head = model.output
    xi_K = [noise(len(m.examples), m.seed).tolist() for m in members]
    references = trainee.references(head, keep_bytes) if objective.perturbed else []
    optimizer = torch.optim.AdamW(trainee.parameters, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    packed = model.packs(trainee.adapted)
    if model.device.type == "cpu":
        keep_freed_memory()
    losses: list[list[float]] = [[] for _ in members]
    epochs: list[int] = []
    for step in range(total):
        if should_stop is not None and should_stop():
            raise TrainingCancelledError(f"training was cancelled at step {step} of {total}; nothing was written")
        epoch = schedules[0][step][0]
        rows = [
            Row(k, members[k].examples[i], place, 1 / len(schedule[step][1]), xi_K[k][i])
            for k, schedule in enumerate(schedules)
            for place, i in enumerate(schedule[step][1])
        ]
        step_losses = [0.0] * len(members)
        lengths = [r.length for r in rows]
        if packed:
            groups = consecutive_rows(lengths, max_tokens=min(max_tokens, PACKED_TOKENS))
        else:
            groups = split_rows(lengths, max_tokens=max_tokens)
        for group in groups:
            chosen = [rows[i] for i in sorted(group)]
            own = [r.example for r in chosen]
            fixed = [references[r.member].of([r.example])[0] for r in chosen] if objective.perturbed else []
            head_0 = references[0].head if references else None
            with model.training(), model.using(trainee.active(chosen, step)):
                values, nats = row_values(model, head, objective, own, fixed, [r.xi for r in chosen], head_0)
                weight = torch.tensor([r.weight for r in chosen], dtype=values.dtype, device=values.device)
                (values * weight).sum().backward()  # type: ignore[no-untyped-call]
            for row, value in zip(chosen, nats.tolist(), strict=True):
                step_losses[row.member] += value * row.weight
        if not all(map(math.isfinite, step_losses)):
            raise RejectedError(
                f"training diverged: the loss is not finite at step {step + 1} of {total}. Use a smaller learning rate."
            )
        for group_ in optimizer.param_groups:
            group_["lr"] = learning_rate_at(step, total, recipe)
        trainee.before_step()
        optimizer.step()
        optimizer.zero_grad()
        trainee.after_step()
        for history, value in zip(losses, step_losses, strict=True):
            history.append(value)
        epochs.append(epoch)
        if after_step is not None:
            after_step(step + 1, total, epoch, step_losses)
        if after_epoch is not None and (step + 1 == total or schedules[0][step + 1][0] != epoch):
            after_epoch(epoch)
    return losses, epochs
