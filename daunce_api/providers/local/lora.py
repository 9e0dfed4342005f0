"""A language model whose linear layers take LoRA updates, another member's for every row of a batch, or whose weights
are replaced as a whole for a while.

The updates are added by forward hooks, so the model's own modules (plain, transposed or quantised linear layers) stay
as they are and one copy of the base weights serves every member.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...errors import CapabilityError
from .models import enable_checkpointing, text_part


@dataclass(frozen=True)
class ActiveLora:
    """The updates in force during a forward pass.

    With ``members`` None one adapter serves the whole batch: A (rank, in), B (out, rank), with or without a first axis
    of one. Otherwise A (K, rank, in) and B (K, out, rank) hold K members and ``members`` (R entries) names the member
    of every row, ascending.
    ``dropout``: share of the inputs that is left out, drawn by ``keys`` (R,), one random 64-bit number a row.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float
    members: Sequence[int] | None = None
    dropout: float = 0.0
    keys: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ActiveFull:
    """Tensors that stand in for the model's own weights, by the names of ``named_parameters``.

    With ``trained`` the model's parameters collect gradients while they are in force.
    """

    weights: Mapping[str, Tensor]
    trained: bool = False


Active = ActiveLora | ActiveFull


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (R, T), and the n positions whose next-token distribution is read: ``row`` and ``column``
    (n,), the token ``target`` (n,) that follows there, and the number of positions of each row (R entries)."""

    ids: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    counts: list[int]

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> Batch:
        """Of (token ids, indices of the targets among them). What follows the last target's predecessor is left out,
        since attention is causal."""
        ids = pad_sequence([torch.tensor(ids[: max(targets)]) for ids, targets in sequences], batch_first=True)
        places = [(r, t - 1, ids[t]) for r, (ids, targets) in enumerate(sequences) for t in targets]
        row, column, target = torch.tensor(list(zip(*places, strict=True)), device=device)
        return cls(ids.to(device), row, column, target, [len(targets) for _, targets in sequences])


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
        self.device = torch.device(model.device)
        """Where token ids go in."""
        self.config = model.config.get_text_config(decoder=True)
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())
        self.own_weights: Mapping[str, Tensor] = {n: p.data for n, p in self.parameters.items()}
        """The base model's, whatever stands in for them."""
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise CapabilityError(f"{model.config.model_type} has no output head; give a causal language model.")
        self.head = head
        self.head_name = next(str(name) for name, module in self.modules.items() if module is head)
        # Text models taken out of a larger checkpoint (Llama 4) name a part of that one as their base.
        body = model.base_model if model.base_model is not model else getattr(model, "model", None)
        if not isinstance(body, nn.Module):
            raise CapabilityError(f"{model.config.model_type} has no decoder apart from its output head.")
        self.body = body
        self.cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.factor = float(getattr(self.config, "logit_scale", None) or 1.0)
        self.factor /= float(getattr(self.config, "logits_scaling", None) or 1.0)
        self.text = text_part(model)
        """Prefix of the names of the text decoder's modules; '' where the model is nothing else."""
        self._active: Active | None = None
        self._hooked: set[str] = set()

    @cached_property
    def alone_above(self) -> int | None:
        """Rows longer than this are a pass of their own: positions of some families depend on the padded length from
        there on."""
        rope = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        if "dynamic" not in str(rope) and "longrope" not in str(rope):
            return None
        name = "original_max_position_embeddings"
        return int(rope.get(name) or getattr(self.config, name, None) or self.config.max_position_embeddings)

    @cached_property
    def head_width(self) -> int:
        """Number of logits that the output head gives.

        Raises CapabilityError where :meth:`head_logits` are not the model's own (the family does something else), and
        where a token sees those after it (an encoder).
        """
        ids = list(range(min(5, int(self.config.vocab_size))))
        with self.using(None), torch.no_grad():
            batch = Batch.of([(ids, range(1, len(ids)))], self.device)
            own, first = self.logits(batch.ids).float(), self.logits(batch.ids[:, :2]).float()
            if (first - own[:2]).std() > 0.1 * own[:2].std():
                kind = self.model.config.model_type
                raise CapabilityError(f"{kind} lets a token see those after it; give a causal language model.")
            found = self.head_logits(self.hidden(batch), batch.row)
        if found.shape != own.shape or not torch.allclose(found.float(), own, rtol=0.05, atol=0.05):
            raise CapabilityError(
                f"{self.model.config.model_type} changes its logits in a way that is not known here; "
                "kind: vllm scores such a model."
            )
        return int(found.shape[1])

    @property
    def trains_head(self) -> bool:
        """Whether what is in force trains the output head, by itself or by an adapter."""
        active = self._active
        if isinstance(active, ActiveLora):
            return self.head_name in active.weights
        return isinstance(active, ActiveFull) and active.trained

    def is_text(self, name: str) -> bool:
        """Whether a module or weight belongs to the text part, not to a tower for images or sound."""
        return name.startswith(self.text) or name.startswith(self.head_name)

    def placed(self, weights: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """An adapter, each part where the module is that it belongs to: with ``device_map`` not all are on one GPU."""
        devices = {name: next(self.modules[name].parameters()).device for name in weights}
        return {name: (a.to(devices[name]), b.to(devices[name])) for name, (a, b) in weights.items()}

    @contextmanager
    def using(self, active: Active | None, *, training: bool = False) -> Iterator[None]:
        """Have every forward pass computed with ``active`` (None: the base model alone), also the passes that gradient
        checkpointing repeats in backward. With ``training`` activations are checkpointed where the model does so."""
        with self.lock:
            for name in active.weights if isinstance(active, ActiveLora) else ():
                if name not in self._hooked:
                    self.modules[name].register_forward_hook(self._hook(name))
                    self._hooked.add(name)
            before = self._active
            self._switch(active)
            checkpointed = training and self.checkpointing
            if checkpointed:  # layers do it in training mode alone
                self.model.train()
            try:
                yield
            finally:
                self._switch(before)
                if checkpointed:
                    self.model.eval()

    def _switch(self, active: Active | None) -> None:
        if active is not self._active and (isinstance(active, ActiveFull) or isinstance(self._active, ActiveFull)):
            full = active if isinstance(active, ActiveFull) else ActiveFull({})
            for name, parameter in self.parameters.items():
                parameter.data = full.weights.get(name, self.own_weights[name])
                parameter.requires_grad_(full.trained and name in full.weights)
        self._active = active

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states (n, width), as the output head takes them, at the positions of ``batch``.

        No attention mask is needed: attention is causal, and padding follows everything that is read.
        """
        states: Tensor = self.body(input_ids=batch.ids, use_cache=False)[0]
        return states[batch.row.to(states.device), batch.column.to(states.device)]

    def head_logits(self, states: Tensor, rows: Tensor) -> Tensor:
        """Logits (n, vocabulary) of last hidden states (n, width) of ``rows`` (n,) of a batch, in float32 (float64
        if they are): by the model's own output head, and the constant factor, divisor or soft cap of some families.
        """
        active = self._active
        if isinstance(active, ActiveLora) and active.members is not None and self.head_name in active.weights:
            active = replace(active, members=[active.members[r] for r in rows.tolist()])
        with self.using(active):
            logits: Tensor = self.head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def logits(self, inputs: Tensor) -> Tensor:
        """The model's own logits (T, vocabulary) of one sequence (1, T)."""
        logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits[0]
        return logits

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        own_key = zlib.crc32(name.encode())

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            active, x = self._active, args[0]
            if not isinstance(active, ActiveLora) or name not in active.weights:
                return output
            if active.keys is not None:
                rows = x.view(len(active.keys), -1, x.shape[-1])
                x = dropped(rows, active.keys.to(x.device) ^ own_key, active.dropout).view(x.shape)
            return updated(output, x, *active.weights[name], active.scaling, active.members)

        return hook


def updated(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, members: Sequence[int] | None = None
) -> Tensor:
    """``output`` + scaling B A x with A and B of each row's member (see :class:`ActiveLora`); x (R, T, in), or
    (R x T, in) as experts have it. The update is computed in float32, or in the model's own bfloat16.

    Raises CapabilityError where ``x`` does not keep rows apart (the architecture mixes them before the layer).
    """
    if x.dtype == torch.bfloat16:
        a, b = a.to(x.dtype), b.to(x.dtype)
    else:
        x = x.to(a.dtype)
    count = 1 if members is None else len(members)
    if x.shape[0] % count:
        raise CapabilityError("this architecture does not keep the rows of a batch apart; train one member at a time.")
    rows = x.reshape(count, -1, x.shape[-1])
    if members is not None and 2 * a.shape[1] > rows.shape[1]:  # copies of A and B would be large beside the rows
        parts = torch.split(rows, [len(list(same)) for _, same in groupby(members)])
        out = torch.cat([linear(linear(p, a[k]), b[k]) for p, (k, _) in zip(parts, groupby(members), strict=True)])
    else:
        if members is None:
            a_R, b_R = (t.view(1, *t.shape[-2:]) for t in (a, b))
        else:
            a_R, b_R = (t.index_select(0, _index(tuple(members), t.device)) for t in (a, b))
        inner = torch.bmm(rows, a_R.mT)
        if inner.dtype == output.dtype:
            whole = torch.baddbmm(output.view(count, -1, output.shape[-1]), inner, b_R.mT, alpha=scaling)
            return whole.view(output.shape)
        out = torch.bmm(inner, b_R.mT)
    return torch.add(output, out.view(output.shape).to(output.dtype), alpha=scaling)


@lru_cache(maxsize=4)
def _index(members: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device; all modules of a pass share one copy."""
    return torch.tensor(members, device=device)


def dropped(x: Tensor, keys: Tensor, share: float) -> Tensor:
    """x (R, T, in) with dropout whose mask depends on a row's key (R,) and the place in the row alone, never on how
    rows are padded or grouped: the top bits of a hash (the finaliser of SplitMix64; Steele et al., 2014), computed
    where x is."""
    place = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(1, x.shape[1], x.shape[2])
    h = place * -0x61C8864680B583EB + keys[:, None, None]
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        h = (h ^ (h >> shift & (1 << 64 - shift) - 1)) * factor
    uniform = (h >> 40 & 0xFFFFFF).to(torch.float32) / (1 << 24)
    return x * ((uniform >= share).to(x.dtype) / (1 - share))
