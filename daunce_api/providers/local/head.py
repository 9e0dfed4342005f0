"""The output head applied in slices of the vocabulary, so that memory does not grow with vocabulary x tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ...errors import CapabilityError

SLICE_ELEMENTS = 1 << 22
"""Logits held at once (tokens x slice of the vocabulary); 16 MiB in float32."""


class Head:
    """Logits of last hidden states (n, width), a slice of the vocabulary at a time, in float32 (float64 if they are).

    Knows what some families do to logits after the linear layer: a constant factor or divisor, or a soft cap.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises CapabilityError where the output head is not one linear layer."""
        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not isinstance(head, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise CapabilityError(f"the output head of {model.config.model_type} is not a plain linear layer.")
        self.weight = weight
        self.bias: Tensor | None = head.bias
        self.vocabulary = int(weight.shape[0])
        config = model.config
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0)
        self._factor /= float(getattr(config, "logits_scaling", None) or 1.0)

    def at(self, weight: Tensor, bias: Tensor | None) -> Self:
        """The same head with other weights."""
        other = copy.copy(self)
        other.weight, other.bias = weight, bias
        return other

    def slices(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(first, past the last) vocabulary index of each slice for this many tokens."""
        size = max(1, SLICE_ELEMENTS // max(1, tokens))
        for first in range(0, self.vocabulary, size):
            yield first, min(first + size, self.vocabulary)

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Logits (n, last - first) of these vocabulary entries."""
        bias = None if self.bias is None else self.bias[first:last]
        raw = linear(hidden.to(self.weight.device), self.weight[first:last], bias)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return self._after(raw)

    def _after(self, raw: Tensor) -> Tensor:
        if self._factor != 1.0:
            raw = raw * self._factor
        return raw if self._cap is None else torch.tanh(raw / self._cap) * self._cap

    def before(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Gradient for the linear layer's output, from that for the logits; both (n, slice)."""
        if self._cap is not None:
            gradient = gradient * (1 - (logits / self._cap) ** 2)
        if self._factor != 1.0:
            gradient = gradient * self._factor
        return gradient.to(self.weight.dtype)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,  # the head's own, here so that it gets a gradient where it is trained
        bias: Tensor | None,
        head: Head,
        target: Tensor,
        head_0: Head,
        hidden_0: Tensor | None,
        log_sum_0: Tensor | None,
        with_margin: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = torch.arange(n, device=hidden.device)
        log_sum = torch.full((n,), -torch.inf, dtype=dtype, device=hidden.device)
        log_others = log_sum.clone()
        own = torch.zeros(n, dtype=dtype, device=hidden.device)
        own_0 = torch.zeros_like(own)
        shift = torch.zeros_like(own)
        kept: Tensor | None = None
        for first, last in head.slices(n):
            z = head.logits(hidden, first, last)
            inside = (target >= first) & (target < last)
            at = (target - first).clamp(0, last - first - 1)
            own = torch.where(inside, z[rows, at], own)
            log_sum = torch.logaddexp(log_sum, z.logsumexp(1))
            if with_margin:
                others = z.clone()
                others[rows[inside], at[inside]] = -torch.inf
                log_others = torch.logaddexp(log_others, others.logsumexp(1))
            if hidden_0 is not None and log_sum_0 is not None:
                z_0 = head_0.logits(hidden_0, first, last)
                own_0 = torch.where(inside, z_0[rows, at], own_0)
                shift = shift + ((z_0 - log_sum_0[:, None]).exp() * (z - z_0)).sum(1)
            kept = z if last - first == head.vocabulary else None
        if hidden_0 is not None:
            shift = shift - (own - own_0)
        ctx.head, ctx.head_0, ctx.with_margin = head, head_0, with_margin
        ctx.save_for_backward(hidden, target, hidden_0, log_sum_0, log_sum, log_others, kept)
        return log_sum - own, own - log_others if with_margin else torch.zeros_like(own), shift

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for_nats, for_margin, for_shift = gradients
        hidden, target, hidden_0, log_sum_0, log_sum, log_others, kept = ctx.saved_tensors
        head: Head = ctx.head
        n = hidden.shape[0]
        rows = torch.arange(n, device=hidden.device)
        for_hidden = torch.zeros_like(hidden)
        for_weight = torch.zeros_like(head.weight) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(head.bias) if head.bias is not None and ctx.needs_input_grad[2] else None
        for first, last in head.slices(n):
            z = head.logits(hidden, first, last) if kept is None else kept
            inside = (target >= first) & (target < last)
            chosen, at = rows[inside], (target - first)[inside]
            gradient = for_nats[:, None] * (z - log_sum[:, None]).exp()
            own = -for_nats
            if ctx.with_margin:
                own = own + for_margin
                others = for_margin[:, None] * (z - log_others[:, None]).exp()
                others[chosen, at] = 0
                gradient = gradient - others
            if hidden_0 is not None:
                z_0 = ctx.head_0.logits(hidden_0, first, last)
                gradient = gradient + for_shift[:, None] * (z_0 - log_sum_0[:, None]).exp()
                own = own - for_shift
            gradient[chosen, at] += own[inside]
            raw = head.before(z, gradient)
            for_hidden += (raw @ head.weight[first:last]).to(hidden)
            if for_weight is not None:
                for_weight[first:last] = raw.mT @ hidden.to(raw)
            if for_bias is not None:
                for_bias[first:last] = raw.sum(0)
        return for_hidden, for_weight, for_bias, None, None, None, None, None, None


class _TargetNats(torch.autograd.Function):
    """-log p_y where nothing else is asked for and the head is frozen.

    Its gradient with respect to a hidden state, (softmax(z) - onehot(y)) W, is one number a token away from what
    backward returns, so that it is computed while the logits are there: they are neither kept nor computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
        n = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = torch.arange(n, device=hidden.device)
        log_sum = torch.full((n,), -torch.inf, dtype=dtype, device=hidden.device)
        own = torch.zeros(n, dtype=dtype, device=hidden.device)
        pull = torch.zeros_like(hidden, dtype=dtype)
        for first, last in head.slices(n):
            z = head.logits(hidden, first, last)
            inside = (target >= first) & (target < last)
            own = torch.where(inside, z[rows, (target - first).clamp(0, last - first - 1)], own)
            p = z.softmax(1)
            # logsumexp of this slice by two amax: .29 ms on a CPU at 1,500 x 2,048, where logsumexp itself takes 3.9
            part = z.amax(1) - p.amax(1).log()
            total = torch.logaddexp(log_sum, part)
            if ctx.needs_input_grad[0]:
                pulled = (head.before(z, p) @ head.weight[first:last]).to(dtype)
                pull.mul_((log_sum - total).exp_()[:, None]).addcmul_(pulled, (part - total).exp_()[:, None])
            log_sum = total
        if ctx.needs_input_grad[0]:
            factor = head.before(own[:, None], torch.ones_like(own)[:, None])
            pull -= head.weight.index_select(0, target) * factor
        ctx.save_for_backward(pull.to(hidden.dtype))
        return log_sum - own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (pull,) = ctx.saved_tensors
        return (pull * gradient[:, None]).to(pull.dtype), None, None


def token_statistics(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    hidden_0: Tensor | None = None,
    log_sum_0: Tensor | None = None,
    *,
    head_0: Head | None = None,
    with_margin: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token (n,): nats -log p_y; margin log p_y - log(1 - p_y); and <g, z - z_0>, g = softmax(z_0) - onehot(y).

    ``hidden`` and ``hidden_0`` (n, width) are the last hidden states at theta and at theta_0, ``log_sum_0`` (n,) the
    logarithm of the sum of exp(z_0), ``head_0`` theta_0's head where it is another one. Differentiable with respect to
    ``hidden`` and the head's weights; without ``hidden_0`` the third value is zero, and so is the margin unless it is
    asked for. Logits are recomputed in the backward pass unless they fit into one slice.
    """
    device = head.weight.device  # with device_map the head may be on another one than the tokens
    hidden, target = hidden.to(device), target.to(device)
    if hidden_0 is not None and log_sum_0 is not None:
        hidden_0, log_sum_0 = hidden_0.to(device), log_sum_0.to(device)
    frozen = not head.weight.requires_grad and (head.bias is None or not head.bias.requires_grad)
    if hidden_0 is None and not with_margin and frozen:
        nats = _TargetNats.apply(hidden, head, target)  # type: ignore[no-untyped-call]
        return nats, torch.zeros_like(nats), torch.zeros_like(nats)
    nats, margin, shift = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, target, head_0 or head, hidden_0, log_sum_0, with_margin
    )
    return nats, margin, shift


def log_sum_exp(hidden: Tensor, head: Head) -> Tensor:
    """Logarithm of the sum of exp(logits) of each hidden state (n,)."""
    total: Tensor | None = None
    for first, last in head.slices(hidden.shape[0]):
        part = head.logits(hidden, first, last).logsumexp(1)
        total = part if total is None else torch.logaddexp(total, part)
    if total is None:
        raise CapabilityError("the output head has no vocabulary")
    return total
