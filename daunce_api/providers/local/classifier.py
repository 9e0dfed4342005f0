"""Members of any classifier (vision models and others), trained and measured many at a time.

A model is no more than a factory of ``torch.nn.Module`` whose call maps inputs (B, ...) to logits (B, classes).
Members' parameters are stacked along a first axis and run under ``torch.func.vmap``. Models that vmap cannot run, that
draw random numbers (dropout) are trained one at a time, with the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...errors import ConfigurationError, RejectedError
from ..objective import Objective, noise
from ..randomness import DROPOUT, ORDER, stream
from .losses import ExampleLoss, combine, example_cross_entropy, margin, statistics
from .memory import default_budget
from .models import seeded
from .options import ClassifierSettings

SUBSET = Objective()
CPU_BYTES = 64 << 20
"""Parameters, optimiser state and activations of the members trained at once on a CPU: more leaves its caches."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Members:
    """K trained models: parameters and buffers, each stacked along a first axis. A weight that a model holds under
    several names is here once, under the first; ``names`` has the first name of each."""

    parameters: State
    buffers: State
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def part(self, chunk: slice) -> Members:
        """Some of the members, in the same memory, for training."""
        parameters = {n: t[chunk].detach().requires_grad_() for n, t in self.parameters.items()}
        return Members(parameters, {n: t[chunk] for n, t in self.buffers.items()}, self.names)

    def own(self, member: int) -> State:
        """Views of one member's parameters and buffers."""
        return {n: t[member] for n, t in (self.parameters | self.buffers).items()}

    def state(self, member: int) -> State:
        """State dict of one member, for ``load_state_dict``."""
        own = self.own(member)
        return {n: own[first].detach().clone(memory_format=torch.contiguous_format) for n, first in self.names.items()}


class Classifier:
    """A family of models that differ in weights alone."""

    def __init__(
        self, model_factory: Callable[[], nn.Module], *, loss: ExampleLoss = example_cross_entropy, device: str = "cpu"
    ) -> None:
        self._loss = loss
        self._device = torch.device(device)
        self._factory = model_factory
        self._skeleton = model_factory().to(self._device)
        tensors: dict[int, str] = {}
        places: dict[tuple[int, str], str] = {}
        self._names: dict[str, str] = {}
        """The first name of every parameter and buffer: tied weights have several."""
        for name, tensor in self._skeleton.state_dict(keep_vars=True).items():
            owner, _, attribute = name.rpartition(".")
            self._names[name] = tensors.setdefault(id(tensor), name)
            places.setdefault((id(self._skeleton.get_submodule(owner)), attribute), name)
        self._places = {name: self._names[name] for name in places.values()}
        """Where they go: a layer that is used twice has one place for its weight, which is filled once."""
        self._together: dict[bool, bool] = {}

    def fresh(self, seed: int) -> State:
        """Initial weights under a seed (torch's generators are left as they were)."""
        with seeded(seed, self._device):
            return dict(self._factory().state_dict())

    def train(
        self,
        inputs: Tensor,
        labels: Tensor,
        subsets: NDArray[Any],
        seeds: Sequence[int],
        settings: ClassifierSettings,
        *,
        start: State | None = None,
        objective: Objective = SUBSET,
        memory_limit: int | None = None,
        after_epoch: Callable[[int, int, Members], None] | None = None,
    ) -> Members:
        """Train K members, each on its own n of the N examples: a row of ``subsets``, positions (K, n) or inclusion
        (K, N; boolean, all rows of equal sums).

        Every member starts at ``start`` (the target model, or a common base), or where None at fresh weights of its
        own seed. With a perturbed ``objective`` (it needs ``start``) the model runs in evaluation mode, so that an
        example's logits do not depend on its batch. Members do not depend on which others are trained beside them,
        but for float32 round-off; a model that draws random numbers in training draws each member's own.
        ``memory_limit`` bytes bound the members trained at once; default: what a CPU's caches gain from, or half of a
        GPU's free memory. ``after_epoch`` is called after each epoch (from 1) with the members ``first``,
        ``first`` + 1, ... of all, which go on changing.
        """
        if subsets.dtype == bool and len(set(subsets.sum(axis=1))) == 1 and subsets.shape[1] == len(inputs):
            subsets = np.nonzero(subsets)[1].reshape(len(subsets), -1)
        if subsets.dtype == bool or subsets.size == 0 or len(subsets) != len(seeds):
            raise ConfigurationError("every member needs a seed and a subset of the same size, of at least one example")
        if objective.perturbed and start is None:
            raise ConfigurationError(f"objective {objective.kind} perturbs around a start: give start=")
        inputs, labels = inputs.to(self._device), labels.to(self._device)
        z_0 = self._logits_of(start, inputs) if objective.perturbed and start is not None else None
        together = self._can_batch(inputs, training=not objective.perturbed)
        limit = memory_limit or (CPU_BYTES if self._device.type == "cpu" else default_budget(self._device, 1))
        bytes_each = bytes_per_member(self._skeleton, inputs[: settings.batch_size], settings) if together else limit
        at_once = max(1, limit // bytes_each)
        members = self._stacked([start or self.fresh(seed) for seed in seeds])
        for first in range(0, len(seeds), at_once):
            chunk = slice(first, first + at_once)
            part, data = members.part(chunk), (inputs, labels, z_0)
            # For dropout: such a model is alone here.
            with seeded(int(stream(seeds[first], DROPOUT).integers(2**63)), self._device):
                for epoch in self._fit(part, data, subsets[chunk], seeds[chunk], settings, objective):
                    if after_epoch is not None:
                        after_epoch(epoch, first, part)
        return members

    def measure(self, members: Members, inputs: Tensor, labels: Tensor, *, batch: int = 512) -> NDArray[np.float64]:
        """Loss of every example under every member (K, N), in evaluation mode."""
        inputs, labels = inputs.to(self._device), labels.to(self._device)
        rows = [self._loss(self._logits_of(members.own(k), inputs, batch), labels) for k in range(len(members))]
        return torch.stack(rows).detach().cpu().double().numpy()

    def log_probabilities(self, state: State, inputs: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """log p_y (nats) of every example (n,) under one model, in evaluation mode; computed from logits in double
        precision so that 1 - p keeps its digits."""
        logits = self._logits_of(state, inputs.to(self._device)).cpu().double()
        return -torch.nn.functional.softplus(-margin(logits, labels), threshold=700).numpy()

    def check(self, state: State) -> None:
        """Raises ConfigurationError where these are no weights of this model."""
        own = self._skeleton.state_dict()
        if state.keys() != own.keys() or any(state[n].shape != own[n].shape for n in own):
            raise ConfigurationError("the weights belong to another model than model_factory() makes")

    def _logits_of(self, state: Mapping[str, Tensor], inputs: Tensor, batch: int = 512) -> Tensor:
        self._skeleton.eval()
        held = {n: t.to(self._device) for n, t in state.items()}
        with torch.no_grad():
            return torch.cat([self._call(held, x) for x in torch.split(inputs, batch)])

    def _call(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the module gives for ``x`` with these weights and buffers, each under its first name."""
        placed = {name: state[first] for name, first in self._places.items()}
        # Tied by functional_call itself, a layer that is used twice would keep these weights afterwards.
        out: Tensor = functional_call(self._skeleton, placed, (x,), tie_weights=False)
        return out

    def _stacked(self, states: Sequence[State]) -> Members:
        trained = dict(self._skeleton.named_parameters())
        once = dict.fromkeys(self._names.values())
        held = {n: torch.stack([s[n] for s in states]).to(self._device) for n in once}
        parameters, buffers = ({n: t for n, t in held.items() if (n in trained) == own} for own in (True, False))
        return Members(parameters, buffers, self._names)

    def _forward(self, members: Members, x: Tensor) -> Tensor:
        """Logits (K, B, classes) of inputs (K, B, ...); running statistics in the buffers are updated in place."""
        if len(members) == 1:
            return self._call(members.own(0), x[0])[None]
        together: Tensor = vmap(self._call)(members.parameters | members.buffers, x)
        return together

    def _fit(
        self,
        members: Members,
        data: tuple[Tensor, Tensor, Tensor | None],
        subsets: NDArray[np.integer[Any]],
        seeds: Sequence[int],
        settings: ClassifierSettings,
        objective: Objective,
    ) -> Iterator[int]:
        """Train ``members`` as they are iterated over: at the end of each epoch (from 1) it is given. ``data``: inputs,
        labels, and theta_0's logits of all examples where the objective is perturbed."""
        inputs, labels, logits_0 = data
        parameters = list(members.parameters.values())
        sgd = partial(torch.optim.SGD, momentum=settings.momentum)
        kind: Any = torch.optim.AdamW if settings.optimizer == "adamw" else sgd
        optimizer = kind(parameters, weight_decay=settings.weight_decay, fused=True)
        randoms = [stream(seed, ORDER) for seed in seeds]
        n = len(subsets[0])
        subset_Kn = torch.from_numpy(np.asarray(subsets, dtype=np.int64))
        noise_Kn = None if logits_0 is None else torch.from_numpy(np.stack([noise(n, seed) for seed in seeds]))
        total = settings.n_epochs * -(-n // settings.batch_size)
        self._skeleton.train(not objective.perturbed)
        step = 0
        for epoch in range(1, settings.n_epochs + 1):
            order_Kn = torch.from_numpy(np.stack([random.permutation(n) for random in randoms]))
            chosen_Kn = subset_Kn.gather(1, order_Kn).to(self._device)
            for first in range(0, n, settings.batch_size):
                batch = slice(first, first + settings.batch_size)
                chosen = chosen_Kn[:, batch]
                y = _rows(labels, chosen).flatten()
                logits = self._forward(members, _rows(inputs, chosen)).flatten(0, 1)
                if logits_0 is None or noise_Kn is None:
                    values = self._loss(logits, y)
                else:
                    z_0 = _rows(logits_0, chosen).flatten(0, 1)
                    xi = noise_Kn.gather(1, order_Kn)[:, batch].flatten().to(z_0)
                    values = combine(objective, statistics(self._loss, logits, y, z_0), xi)
                (values.sum() / chosen.shape[1]).backward()  # type: ignore[no-untyped-call]
                optimizer.param_groups[0]["lr"] = settings.rate(step, total)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
            yield epoch
        for tensor in parameters:
            tensor.requires_grad_(False)
            if not bool(tensor.isfinite().all()):
                raise RejectedError("training diverged: weights are not finite. Use a smaller learning rate.")

    def _can_batch(self, inputs: Tensor, *, training: bool) -> bool:
        """Whether members are trained together: vmap runs this module in this mode (tried once, with two members on two
        examples; it runs none that draws random numbers, whose members would depend on one another)."""
        if training not in self._together:
            self._skeleton.train(training)
            sample = inputs[:2].expand(2, *inputs[:2].shape)
            try:
                self._forward(self._stacked([self.fresh(0), self.fresh(1)]), sample)
                self._together[training] = True
            except (RuntimeError, ValueError, TypeError):
                self._together[training] = False
        return self._together[training]


def bytes_per_member(module: nn.Module, sample: Tensor, settings: ClassifierSettings) -> int:
    """Estimate of what one member takes in training on a batch like ``sample``: weights, gradient, optimiser state,
    and twice what a forward pass keeps for backward, which is counted."""
    model = copy.deepcopy(module).train()
    sample = sample.clone()  # a part of all inputs holds the memory of them all
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
    return int((2 + states) * weights + 2 * (sum(saved.values()) + logits.nbytes) + sample.nbytes)


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """``values[chosen]``; on a CPU several times as fast."""
    return values.index_select(0, chosen.flatten()).view(*chosen.shape, *values.shape[1:])
