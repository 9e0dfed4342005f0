"""Members of any classifier (vision models and others), trained and measured many at a time.

All that is asked of a model is a factory of ``torch.nn.Module`` whose call maps inputs (B, ...) to logits (B, classes).
Members' parameters are stacked along a first axis and the module runs under ``torch.func.vmap``: one batched product a
layer serves all of them. Modules that vmap cannot run are trained one at a time, with the same numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import one_hot

from ...errors import ConfigurationError, RejectedError
from ..objective import Objective, noise
from ..randomness import ORDER, stream
from .memory import default_limit
from .objectives import combine
from .stacked import run_layers, stacked_layers

State = dict[str, Tensor]
ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), labels (B,)) -> losses (B,), in nats."""

SUBSET = Objective()
CPU_BYTES = 64 << 20
"""Parameters, optimiser state and activations of the members trained at once on a CPU: more leaves its caches."""


def example_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of each example (B,)."""
    # For few classes this takes a third of the time of torch's cross_entropy, forward and backward.
    return logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y - log(1 - p_y) of each example (B,)."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(1)


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """SGD (with momentum) or AdamW. ``schedule`` lowers the rate to 0 over all steps, or keeps it."""

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


@dataclass(frozen=True)
class Members:
    """K trained models: parameters and buffers, each stacked along a first axis."""

    parameters: State
    buffers: State

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def state(self, member: int) -> State:
        """State dict of one member, for ``load_state_dict``."""
        return {n: t[member].detach().clone() for n, t in (self.parameters | self.buffers).items()}


class EpochView(Protocol):
    """Called after each epoch (from 1) with members ``first``, ``first`` + 1, ... of all."""

    def __call__(self, epoch: int, first: int, members: Members) -> None: ...


class Classifier:
    """A family of models that differ in weights alone."""

    def __init__(
        self,
        model_factory: Callable[[], nn.Module],
        *,
        loss: ExampleLoss = example_cross_entropy,
        measured: Literal["loss", "margin"] = "loss",
        device: str = "cpu",
        memory_limit: int | None = None,
    ) -> None:
        """``measured``: what :meth:`measure` gives, the loss or the negative margin (both: lower is better).

        ``memory_limit`` bytes bound the members trained at once; default: what a CPU's caches gain from, or half of a
        GPU's free memory.
        """
        self._factory = model_factory
        self._loss = loss
        self._measured = measured
        self._device = torch.device(device)
        self._limit = memory_limit
        self._skeleton = model_factory().to(self._device)
        self._together: bool | None = None
        self._layers = stacked_layers(self._skeleton, frozenset(name for name, _ in self._skeleton.named_parameters()))

    def fresh(self, seed: int) -> State:
        """Initial weights under a seed (torch's generators are left as they were)."""
        return {n: t.clone() for n, t in self._fresh([seed])[0].items()}

    def _fresh(self, seeds: Sequence[int]) -> list[State]:
        states = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a small model's weights
                states.append(dict(self._factory().state_dict()))
        return states

    def train(
        self,
        inputs: Tensor,
        labels: Tensor,
        inclusion_KN: NDArray[np.bool_],
        seeds: Sequence[int],
        settings: ClassifierSettings,
        *,
        start: State | None = None,
        objective: Objective = SUBSET,
    ) -> Members:
        """Train one member a row of ``inclusion_KN`` (K, N), all rows of equal sums, on that subset of the N examples.

        Every member starts at ``start`` (the target model, or a common base), or where None at fresh weights of its
        own seed. With a perturbed ``objective`` (it needs ``start``) the model runs in evaluation mode, so that an
        example's logits do not depend on its batch. Members do not depend on which others are trained beside them,
        but for float32 round-off. Raises ConfigurationError, and RejectedError where a loss is not finite.
        """
        sizes = inclusion_KN.sum(axis=1)
        if len(seeds) != len(inclusion_KN) or inclusion_KN.shape[1] != len(inputs):
            raise ConfigurationError("inclusion_KN needs a row for every seed and a column for every example")
        if len(seeds) == 0 or sizes.min() != sizes.max() or sizes[0] == 0:
            raise ConfigurationError("every member needs a subset of the same size, of at least one example")
        subsets = np.stack([np.flatnonzero(row) for row in inclusion_KN])
        return self.train_subsets(inputs, labels, subsets, seeds, settings, start=start, objective=objective)

    def train_subsets(
        self,
        inputs: Tensor,
        labels: Tensor,
        subset_Kn: NDArray[np.integer[Any]],
        seeds: Sequence[int],
        settings: ClassifierSettings,
        *,
        start: State | None = None,
        objective: Objective = SUBSET,
        memory_limit: int | None = None,
        at_once: int | None = None,
        after_epoch: EpochView | None = None,
    ) -> Members:
        """:meth:`train` with each member's examples as positions (K, n). ``memory_limit`` replaces the constructor's,
        ``at_once`` bounds the members trained together further. The members that ``after_epoch``
        is shown go on changing."""
        if objective.perturbed and start is None:
            raise ConfigurationError(f"objective {objective.kind} perturbs around a start: give start=")
        inputs, labels = inputs.to(self._device), labels.to(self._device)
        reference = self._logits_of(start, inputs) if objective.perturbed and start is not None else None
        fitting = self._at_once(inputs[: settings.batch_size], settings, memory_limit) if self._can_batch(inputs) else 1
        at_once = min(fitting, at_once or fitting)
        parts = []
        for first in range(0, len(seeds), at_once):
            chunk = slice(first, first + at_once)
            members = self._stacked([start] * len(seeds[chunk]) if start else self._fresh(seeds[chunk]))
            with torch.random.fork_rng():
                torch.manual_seed(seeds[first])  # for dropout in the model
                shown = None if after_epoch is None else partial(after_epoch, first=first, members=members)
                self._fit(
                    members, inputs, labels, subset_Kn[chunk], seeds[chunk], settings, objective, reference, shown
                )
            parts.append(members)
        return Members(
            {n: torch.cat([p.parameters[n] for p in parts]) for n in parts[0].parameters},
            {n: torch.cat([p.buffers[n] for p in parts]) for n in parts[0].buffers},
        )

    def measure(self, members: Members, inputs: Tensor, labels: Tensor, *, batch: int = 512) -> NDArray[np.float64]:
        """Loss, or negative margin, of every example under every member (K, N), in evaluation mode."""
        self._skeleton.eval()
        columns = []
        with torch.no_grad():
            for first in range(0, len(inputs), batch):
                x = inputs[first : first + batch].to(self._device)
                y = labels[first : first + batch].to(self._device)
                rows = [self._measure_one(z, y) for z in self._each_logits(members, x)]
                columns.append(torch.stack(rows).double().cpu())
        return torch.cat(columns, dim=1).numpy()

    def log_probabilities(self, state: State, inputs: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """log p_y (nats) of every example (n,) under one model, in evaluation mode; computed from logits in double
        precision so that 1 - p keeps its digits."""
        logits = self._logits_of(state, inputs.to(self._device)).double()
        return -torch.nn.functional.softplus(-margin(logits, labels.to(self._device)), threshold=700).cpu().numpy()

    def check(self, state: State) -> None:
        """Raises ConfigurationError where these are no weights of this model."""
        own = self._skeleton.state_dict()
        if state.keys() != own.keys() or any(state[n].shape != own[n].shape for n in own):
            raise ConfigurationError("the weights belong to another model than model_factory() makes")

    def _measure_one(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._loss(logits, labels) if self._measured == "loss" else -margin(logits, labels)

    def _each_logits(self, members: Members, x: Tensor) -> Iterator[Tensor]:
        if self._layers is not None:
            fitting = self._at_once(x, ClassifierSettings(), None)
            for first in range(0, len(members), fitting):
                weights = {n: t[first : first + fitting] for n, t in members.parameters.items()}
                own = min(fitting, len(members) - first)
                yield from run_layers(self._layers, weights, x.expand(own, *x.shape))
            return
        for k in range(len(members)):
            state = {n: t[k] for n, t in (members.parameters | members.buffers).items()}
            yield functional_call(self._skeleton, state, (x,))

    def _logits_of(self, state: Mapping[str, Tensor], inputs: Tensor, batch: int = 512) -> Tensor:
        self._skeleton.eval()
        held = {n: t.to(self._device) for n, t in state.items()}
        with torch.no_grad():
            parts = [functional_call(self._skeleton, held, (x,)) for x in torch.split(inputs, batch)]
        return torch.cat(parts)

    def _stacked(self, states: Sequence[State]) -> Members:
        names = dict(self._skeleton.named_parameters())
        stacked = {n: torch.stack([s[n] for s in states]).to(self._device) for n in states[0]}
        parameters = {n: t.requires_grad_() for n, t in stacked.items() if n in names}
        return Members(parameters, {n: t for n, t in stacked.items() if n not in names})

    def _forward(self, members: Members, x: Tensor) -> Tensor:
        """Logits (K, B, classes) of inputs (K, B, ...); running statistics in the buffers are updated in place."""
        if len(members) == 1:
            state = {n: t[0] for n, t in (members.parameters | members.buffers).items()}
            logits: Tensor = functional_call(self._skeleton, state, (x[0],))
            return logits[None]

        if self._layers is not None:
            return run_layers(self._layers, members.parameters, x)

        def one(parameters: State, buffers: State, inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(self._skeleton, (parameters, buffers), (inputs,))
            return out

        together: Tensor = vmap(one, randomness="different")(members.parameters, members.buffers, x)
        return together

    def _fit(
        self,
        members: Members,
        inputs: Tensor,
        labels: Tensor,
        subsets: NDArray[np.integer[Any]],
        seeds: Sequence[int],
        settings: ClassifierSettings,
        objective: Objective,
        reference: Tensor | None,
        after_epoch: Callable[[int], None] | None,
    ) -> None:
        randoms = [stream(seed, ORDER) for seed in seeds]
        xi = [torch.from_numpy(noise(len(s), seed)).to(inputs) for s, seed in zip(subsets, seeds, strict=True)]
        n = len(subsets[0])
        steps_per_epoch = -(-n // settings.batch_size)
        total = settings.n_epochs * steps_per_epoch
        optimizer = _optimizer(list(members.parameters.values()), settings)
        self._skeleton.train(not objective.perturbed)
        step = 0
        for epoch in range(1, settings.n_epochs + 1):
            order = np.stack([random.permutation(n) for random in randoms])
            for first in range(0, n, settings.batch_size):
                within = order[:, first : first + settings.batch_size]
                chosen = torch.from_numpy(np.take_along_axis(subsets, within, 1)).to(self._device)
                z, y = self._forward(members, _rows(inputs, chosen)), _rows(labels, chosen)
                if reference is None:
                    loss = self._loss(z.flatten(0, 1), y.flatten())
                else:
                    drawn = torch.stack([v[torch.from_numpy(i)] for v, i in zip(xi, within, strict=True)])
                    loss = _perturbed(
                        objective, z.flatten(0, 1), y.flatten(), reference[chosen.flatten()], drawn.flatten()
                    )
                (loss.sum() / within.shape[1]).backward()
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate(step, total)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
            if after_epoch is not None:
                after_epoch(epoch)
        for tensor in members.parameters.values():
            tensor.requires_grad_(False)
            if not bool(tensor.isfinite().all()):
                raise RejectedError("training diverged: weights are not finite. Use a smaller learning rate.")

    def _can_batch(self, inputs: Tensor) -> bool:
        """Whether vmap runs this module: tried once, with two members on two examples."""
        if self._together is None:
            pair = self._stacked(self._fresh([0, 1]))
            self._skeleton.train()
            sample = (
                inputs[:2].expand(2, *inputs[:2].shape) if len(inputs) > 1 else inputs[None].expand(2, *inputs.shape)
            )
            try:
                self._forward(pair, sample)
                self._together = True
            except (RuntimeError, ValueError, TypeError):
                self._together = False
        return self._together

    def _at_once(self, sample: Tensor, settings: ClassifierSettings, given: int | None) -> int:
        limit = given or self._limit or (CPU_BYTES if self._device.type == "cpu" else default_limit(self._device, 1))
        return max(1, limit // self.bytes_per_member(sample, settings))

    def bytes_per_member(self, sample: Tensor, settings: ClassifierSettings) -> int:
        """Estimate of what one member takes in training on a batch like ``sample``: weights, gradient, optimiser state,
        activations (counted), and a quarter for what lives only during a pass."""
        model = copy.deepcopy(self._skeleton).train()
        weights = sum(p.nbytes for p in model.parameters())
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            logits = model(sample)
        states = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
        return (2 + states) * weights + int(1.25 * (sum(saved.values()) + logits.nbytes)) + sample.nbytes


def _optimizer(parameters: list[Tensor], settings: ClassifierSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """``values[chosen]``; on a CPU several times as fast."""
    return values.index_select(0, chosen.flatten()).view(*chosen.shape, *values.shape[1:])


def _perturbed(objective: Objective, logits: Tensor, labels: Tensor, logits_0: Tensor, xi: Tensor) -> Tensor:
    onehot = one_hot(labels, logits.shape[1])
    shift = ((logits_0.softmax(1) - onehot) * (logits - logits_0)).sum(1)
    nats, nats_0 = example_cross_entropy(logits, labels), example_cross_entropy(logits_0, labels)
    return combine(objective, nats, margin(logits, labels), shift, nats_0, margin(logits_0, labels), xi)
