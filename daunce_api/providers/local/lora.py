"""A language model whose linear layers take LoRA updates, another member's for every row of a batch, or whose weights
are replaced as a whole for a while.

The updates are added by forward hooks, so the model's own modules (plain, transposed or quantised linear layers) stay
as they are and one copy of the base weights serves every member.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ...errors import CapabilityError
from .head import Head
from .models import enable_checkpointing
from .packed import PackedDecoder, packed_decoder


@dataclass(frozen=True)
class ActiveLora:
    """The updates in force during a forward pass.

    With ``rows`` None one adapter serves the whole batch: A (rank, in), B (out, rank). Otherwise A (K, rank, in) and
    B (K, out, rank) hold K members and ``rows`` (R,) names the member of every row. ``masks[module]`` (R, T, in) are
    dropout masks, already scaled by 1 / (1 - p).
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float
    rows: Tensor | None = None
    masks: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class ActiveFull:
    """Tensors that stand in for all of the model's own weights, by the names of ``named_parameters``.

    With ``trained`` the model's parameters collect gradients while they are in force.
    """

    weights: Mapping[str, Tensor]
    trained: bool = False


Active = ActiveLora | ActiveFull


@dataclass(frozen=True)
class Positions:
    """Which positions of a padded batch (R, T) have their next-token distribution computed: ``row`` and ``column``
    (n,). ``target`` (n,) is the token that follows there."""

    row: Tensor
    column: Tensor
    target: Tensor


class AdaptedModel:
    """Hooks on a causal language model. One thread at a time uses it: :meth:`using` holds :attr:`lock`."""

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool = False) -> None:
        """``checkpointing`` keeps activations at layer boundaries only and computes the rest again in backward.

        Raises CapabilityError where the model has no output head that maps hidden states to logits.
        """
        self.model = model
        self.checkpointing = checkpointing
        if checkpointing:
            enable_checkpointing(model)
        self.lock = threading.RLock()
        self._active: Active | None = None
        self._full: ActiveFull | None = None
        self.parameters = dict(model.named_parameters())
        self.own_weights: Mapping[str, Tensor] = {n: p.data for n, p in self.parameters.items()}
        """The base model's, whatever stands in for them."""
        self._positions: Positions | None = None
        self._hidden: Tensor | None = None
        self._hooked: set[str] = set()
        self._training = False
        self._packed: dict[frozenset[str], PackedDecoder | None] = {}
        self.modules = dict(model.named_modules())
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise CapabilityError(f"{model.config.model_type} has no output head; give a causal language model.")
        self.head = head
        head.register_forward_pre_hook(self._select)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Passes are those of training: packed where the model :meth:`packs`, and in training mode where activations
        are checkpointed (layers do it in that mode alone)."""
        with self.lock:
            before, self._training = self._training, True
            self.model.train(self.checkpointing)
            try:
                yield
            finally:
                self._training = before
                self.model.eval()

    def packs(self, names: Iterable[str]) -> bool:
        """Whether training passes under adapters of these modules are computed without padding (:mod:`packed`), so that
        rows of any lengths may share one."""
        return self._decoder(frozenset(names)) is not None

    def _decoder(self, names: frozenset[str]) -> PackedDecoder | None:
        if names not in self._packed:
            before, self._training = self._training, False  # the comparison's passes are the model's own
            try:
                self._packed[names] = packed_decoder(self, names)
            finally:
                self._training = before
        return self._packed[names]

    @cached_property
    def output(self) -> Head:
        """The output head in slices, compared once with the model's own logits.

        Raises CapabilityError where they differ: the family does something else after its last layer.
        """
        head = Head(self.model)
        ids = torch.arange(min(4, head.vocabulary), device=self.device)
        with self.using(None), torch.no_grad():
            own = self.logits(ids[None]).float()
            hidden = self.hidden(ids[None], Positions(torch.zeros_like(ids), ids, ids))
            if not torch.allclose(head.logits(hidden, 0, head.vocabulary).float(), own, rtol=0.05, atol=0.05):
                raise CapabilityError(
                    f"{self.model.config.model_type} changes its logits in a way that is not known here; "
                    "it can be scored but not trained."
                )
        return head

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return torch.device(self.model.device)

    def placed(self, weights: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """An adapter, each part where the module is that it belongs to: with ``device_map`` not all are on one GPU."""
        devices = {name: next(self.modules[name].parameters()).device for name in weights}
        return {name: (a.to(devices[name]), b.to(devices[name])) for name, (a, b) in weights.items()}

    @contextmanager
    def using(self, active: Active | None) -> Iterator[None]:
        """Have every forward pass computed with ``active`` (None: the base model alone), also the passes that gradient
        checkpointing repeats in backward."""
        with self.lock:
            for name in active.weights if isinstance(active, ActiveLora) else ():
                if name not in self._hooked:
                    self.modules[name].register_forward_hook(self._hook(name))
                    self._hooked.add(name)
            before = self._active
            self._switch(active)
            try:
                yield
            finally:
                self._switch(before)

    def _switch(self, active: Active | None) -> None:
        full = active if isinstance(active, ActiveFull) else None
        if full is not self._full:
            weights = self.own_weights if full is None else full.weights
            for name, parameter in self.parameters.items():
                parameter.data = weights[name]
                parameter.requires_grad_(full is not None and full.trained)
            self._full = full
        self._active = active

    def hidden(self, inputs: Tensor, positions: Positions) -> Tensor:
        """Last hidden states (n, width), as the output head takes them, at the given positions of right-padded
        ``inputs`` (R, T).

        No attention mask is needed: attention is causal, and padding follows everything that is read.
        """
        active = self._active
        if self._training and isinstance(active, ActiveLora):
            decoder = self._decoder(frozenset(active.weights))
            if decoder is not None:
                return decoder.hidden(inputs, positions, active)
        self._positions = positions
        try:
            self.model(input_ids=inputs, use_cache=False)
            hidden = self._hidden
        finally:
            self._positions = self._hidden = None
        if hidden is None:
            raise CapabilityError(f"{self.model.config.model_type} does not compute its logits with its output head.")
        return hidden

    def logits(self, inputs: Tensor) -> Tensor:
        """The model's own logits (T, vocabulary) of one sequence (1, T)."""
        logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits[0]
        return logits

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        hidden = args[0]
        row, column = self._positions.row.to(hidden.device), self._positions.column.to(hidden.device)
        self._hidden = hidden[row, column]
        return (hidden[:0], *args[1:])  # the caller applies the head itself

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            active = self._active
            if not isinstance(active, ActiveLora) or name not in active.weights:
                return output
            mask = active.masks[name] if active.masks else None
            return add_update(args[0], output, *active.weights[name], active.scaling, active.rows, mask)

        return hook


def add_update(
    x: Tensor, output: Tensor, a: Tensor, b: Tensor, scaling: float, rows: Tensor | None, mask: Tensor | None
) -> Tensor:
    """``output + scaling * B A (mask * x)`` with A and B of each row's member (see :class:`ActiveLora`).

    Raises CapabilityError where ``x`` does not keep rows apart (the architecture mixes them before the layer).
    """
    x = x.to(a.dtype)
    if mask is not None:
        x = x * mask.to(x.device)
    if rows is None:
        update = linear(linear(x, a), b)
        return torch.add(output, update.to(output.dtype), alpha=scaling)
    if x.dim() != 3 or x.shape[0] != rows.shape[0]:
        raise CapabilityError("this architecture does not keep the rows of a batch apart; train one member at a time.")
    rows = rows.to(a.device)
    update = torch.bmm(torch.bmm(x, a.index_select(0, rows).mT), b.index_select(0, rows).mT)
    return torch.add(output, update.to(output.dtype), alpha=scaling)


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids as one right-padded batch (R, T)."""
    width = max(len(s) for s in sequences)
    batch = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        batch[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return batch.to(device)
