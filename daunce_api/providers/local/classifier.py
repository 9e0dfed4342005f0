"""Members of any classifier (vision models and others), trained and measured many at a time.

All that is asked of a model is a factory of ``torch.nn.Module`` whose call maps inputs (B, ...) to logits (B, classes).
Members' parameters are stacked along a first axis: one batched product a layer serves all of them. Plain networks have
these products, and their gradients, written out (``stacked``); other modules run under ``torch.func.vmap``. Those that
vmap cannot run, that draw random numbers (dropout) or that are faster so are trained one at a time, with the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap

from ...errors import ConfigurationError, RejectedError
from ..objective import Objective, noise
from ..randomness import DROPOUT, ORDER, stream
from .class_losses import BatchLoss, ExampleLoss, example_cross_entropy, margin
from .fresh import FreshWeights
from .images import SideBySide, channels_last, channels_last_weights
from .members import EpochView, Members, State
from .recipes import ClassifierSettings
from .stacked import PlainNetwork
from .steps import ByAutograd, ByHand, Steps
from .tied import TiedNames
from .together import members_at_once, one_at_a_time

__all__ = ["Classifier", "ClassifierSettings", "Members", "State", "example_cross_entropy", "margin"]

SUBSET = Objective()


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
        self._loss = loss
        self._measured = measured
        self._device = torch.device(device)
        self._limit = memory_limit
        self._skeleton = model_factory().to(self._device)
        self._names = TiedNames(self._skeleton)
        self._together: dict[bool, bool] = {}
        self._channels_last: frozenset[str] | None = None
        self._side_by_side = self._device.type == "cpu"
        self._plain, self._fresh = PlainNetwork.of(self._skeleton), FreshWeights(model_factory)

    def fresh(self, seed: int) -> State:
        """Initial weights under a seed (torch's generators are left as they were)."""
        return {n: t[0] for n, t in self._fresh.of([seed]).items()}

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
        but for float32 round-off; a model that draws random numbers in training draws each member's own. Raises
        ConfigurationError, and RejectedError where a loss is not finite.
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
        after_epoch: EpochView | None = None,
    ) -> Members:
        """:meth:`train` with each member's examples as positions (K, n). ``memory_limit`` replaces the constructor's.
        The members that ``after_epoch`` is shown go on changing."""
        if objective.perturbed and start is None:
            raise ConfigurationError(f"objective {objective.kind} perturbs around a start: give start=")
        inputs, labels = inputs.to(self._device), labels.to(self._device)
        if self._channels_last is None:
            self._channels_last = channels_last_weights(self._skeleton, inputs[:2])
        reference = self._logits_of(start, inputs) if objective.perturbed and start is not None else None
        together = not one_at_a_time(self._skeleton, self._device) and self._can_batch(
            inputs, training=not objective.perturbed
        )
        at_once = self._at_once(inputs[: settings.batch_size], settings, memory_limit) if together else 1
        parts = []
        for first in range(0, len(seeds), at_once):
            chunk = slice(first, first + at_once)
            members = self._stacked([start] * len(seeds[chunk])) if start else self._fresh_members(seeds[chunk])
            with torch.random.fork_rng():
                # For dropout: such a model is alone here.
                torch.manual_seed(int(stream(seeds[first], DROPOUT).integers(2**63)))
                shown = None if after_epoch is None else partial(after_epoch, first=first, members=members)
                steps = self._steps(members, settings, by_hand=together and self._plain is not None)
                self._fit(
                    members,
                    steps,
                    inputs,
                    labels,
                    subset_Kn[chunk],
                    seeds[chunk],
                    settings,
                    objective,
                    reference,
                    shown,
                )
            parts.append(members)
        if len(parts) == 1:
            return parts[0]
        return Members(
            {n: torch.cat([p.parameters[n] for p in parts]) for n in parts[0].parameters},
            {n: torch.cat([p.buffers[n] for p in parts]) for n in parts[0].buffers},
            self._names.others,
        )

    def measure(self, members: Members, inputs: Tensor, labels: Tensor, *, batch: int = 512) -> NDArray[np.float64]:
        """Loss, or negative margin, of every example under every member (K, N), in evaluation mode."""
        self._skeleton.eval()
        sample = inputs[:batch].to(self._device)
        at_once = 1 if self._plain is None else self._at_once(sample, ClassifierSettings(), None)
        columns = []
        with torch.no_grad():
            for first in range(0, len(inputs), batch):
                x = inputs[first : first + batch].to(self._device)
                y = labels[first : first + batch].to(self._device)
                rows = [self._measure_one(z, y) for z in self._each_logits(members, x, at_once)]
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

    def _each_logits(self, members: Members, x: Tensor, at_once: int) -> Iterator[Tensor]:
        if self._plain is not None:
            for first in range(0, len(members), at_once):
                weights = {n: t[first : first + at_once] for n, t in members.parameters.items()}
                own = min(at_once, len(members) - first)
                yield from self._plain.logits(weights, x.expand(own, *x.shape))
            return
        for k in range(len(members)):
            state = {n: t[k] for n, t in (members.parameters | members.buffers).items()}
            yield self._names.call(state, x)

    def _logits_of(self, state: Mapping[str, Tensor], inputs: Tensor, batch: int = 512) -> Tensor:
        self._skeleton.eval()
        held = {n: t.to(self._device) for n, t in self._names.once(state).items()}
        with torch.no_grad():
            parts = [self._names.call(held, x) for x in torch.split(inputs, batch)]
        return torch.cat(parts)

    def _stacked(self, states: Sequence[State]) -> Members:
        return self._members({n: torch.stack([s[n] for s in states]) for n in states[0]})

    def _fresh_members(self, seeds: Sequence[int]) -> Members:
        return self._members(self._fresh.of(seeds))

    def _members(self, stacked: State) -> Members:
        names = dict(self._skeleton.named_parameters())
        held = {n: t.to(self._device) for n, t in self._names.once(stacked).items()}
        held = channels_last(held, self._channels_last or frozenset())
        parameters = {n: t.requires_grad_() for n, t in held.items() if n in names}
        return Members(parameters, {n: t for n, t in held.items() if n not in names}, self._names.others)

    def _held(self, members: Members) -> list[Tensor]:
        """The module's own parameters and buffers, made those of a single member, in the same memory; returns the
        parameters. A member that is alone is trained so: an indirect call costs a tenth more."""
        for name, tensor in (*self._skeleton.named_parameters(), *self._skeleton.named_buffers()):
            stacked = members.parameters.get(name, members.buffers.get(name))
            if stacked is not None:
                tensor.data = stacked.detach()[0]
        return [parameter.requires_grad_() for parameter in self._skeleton.parameters()]

    def _forward(self, weights: State, buffers: State, x: Tensor) -> Tensor:
        """Logits (K, B, classes) of inputs (K, B, ...); running statistics in the buffers are updated in place."""
        if self._plain is not None:
            return self._plain.logits(weights, x)

        def one(parameters: State, buffers: State, inputs: Tensor) -> Tensor:
            return self._names.call(parameters | buffers, inputs)

        with SideBySide() if self._side_by_side else nullcontext():
            together: Tensor = vmap(one)(weights, buffers, x)
        return together

    def _steps(self, members: Members, settings: ClassifierSettings, *, by_hand: bool) -> Steps:
        if by_hand and self._plain is not None:
            return ByHand(self._plain, members.parameters, settings)
        if len(members) == 1:
            return ByAutograd(lambda x: self._skeleton(x[0])[None], self._held(members), settings)
        forward = partial(self._forward, members.parameters, members.buffers)
        return ByAutograd(forward, list(members.parameters.values()), settings)

    def _fit(
        self,
        members: Members,
        steps: Steps,
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
        n = len(subsets[0])
        subset_Kn = torch.from_numpy(np.asarray(subsets, dtype=np.int64))
        noise_Kn = None if reference is None else torch.from_numpy(np.stack([noise(n, seed) for seed in seeds]))
        total = settings.n_epochs * -(-n // settings.batch_size)
        self._skeleton.train(not objective.perturbed)
        step = 0
        for epoch in range(1, settings.n_epochs + 1):
            order_Kn = torch.from_numpy(np.stack([random.permutation(n) for random in randoms]))
            chosen_Kn = subset_Kn.gather(1, order_Kn).to(self._device)
            xi_Kn = None if noise_Kn is None else noise_Kn.gather(1, order_Kn).to(self._device)
            for first in range(0, n, settings.batch_size):
                batch = slice(first, first + settings.batch_size)
                chosen = chosen_Kn[:, batch]
                loss = BatchLoss(self._loss, _rows(labels, chosen).flatten(), objective)
                if reference is not None and xi_Kn is not None:
                    z_0 = _rows(reference, chosen).flatten(0, 1)
                    loss = replace(loss, logits_0=z_0, xi=xi_Kn[:, batch].flatten().to(z_0))
                steps.step(_rows(inputs, chosen), loss, settings.rate(step, total))
                step += 1
            if after_epoch is not None:
                after_epoch(epoch)
        for tensor in members.parameters.values():
            tensor.requires_grad_(False)
            if not bool(tensor.isfinite().all()):
                raise RejectedError("training diverged: weights are not finite. Use a smaller learning rate.")

    def _can_batch(self, inputs: Tensor, *, training: bool) -> bool:
        """Whether vmap runs this module in this mode: tried once, with two members on two examples. It runs none that
        draws random numbers, whose members would depend on one another."""
        if training not in self._together:
            pair = self._fresh_members([0, 1])
            self._skeleton.train(training)
            sample = (
                inputs[:2].expand(2, *inputs[:2].shape) if len(inputs) > 1 else inputs[None].expand(2, *inputs.shape)
            )
            self._together[training] = self._runs(pair, sample)
            if self._side_by_side and not self._together[training]:
                self._side_by_side = False
                self._together[training] = self._runs(pair, sample)
        return self._together[training]

    def _runs(self, pair: Members, sample: Tensor) -> bool:
        try:
            self._forward(pair.parameters, pair.buffers, sample)
        except (RuntimeError, ValueError, TypeError):
            return False
        return True

    def _at_once(self, sample: Tensor, settings: ClassifierSettings, given: int | None) -> int:
        return members_at_once(self._skeleton, sample, settings, self._device, given or self._limit)


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """``values[chosen]``; on a CPU several times as fast."""
    return values.index_select(0, chosen.flatten()).view(*chosen.shape, *values.shape[1:])
