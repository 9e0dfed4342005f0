"""Losses: of language models' tokens, through the output head a few tokens at a time, of classifiers' examples, and the
objectives of :mod:`daunce_api.providers.objective` around either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..objective import Objective
from .lora import Active, AdaptedModel, Batch

CPU_LOGITS = 1 << 22
"""Logits held at once (tokens x vocabulary): 16 MiB in float32."""
GPU_LOGITS = 1 << 26

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), labels (B,)) -> losses (B,), in nats; each one of its own example's logits alone."""


class _Nats(torch.autograd.Function):
    """-log p_y where the head is frozen.

    The gradient with respect to a hidden state is one number a token away from what backward returns, so that it is
    computed while the logits are there: they are neither kept nor computed twice. With respect to the logits it is
    softmax(z) - onehot(y).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, model: AdaptedModel, rows: Tensor, target: Tensor) -> Tensor:
        nats, pulls = [], []
        for part in _parts(model, len(target)):
            with torch.enable_grad():
                own = states[part].detach().requires_grad_()
                logits = model.head_logits(own, rows[part])
            logprobs, y = logits.detach().log_softmax(1), target[part, None]
            nats.append(-logprobs.gather(1, y)[:, 0])
            pull = logprobs.exp_().scatter_add_(1, y, logprobs.new_full(y.shape, -1))
            pulls.append(torch.autograd.grad(logits, own, pull)[0])
        ctx.save_for_backward(torch.cat(pulls))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (pull,) = ctx.saved_tensors
        return (pull * gradient[:, None]).to(pull.dtype), None, None, None


def token_nats(model: AdaptedModel, states: Tensor, batch: Batch) -> Tensor:
    """-log p_y of each token (n,), from last hidden states (n, width); differentiable in them and in what is trained of
    the head."""
    target = batch.target.to(states.device)
    if states.requires_grad and not model.trains_head:
        nats: Tensor = _Nats.apply(states, model, batch.row, target)  # type: ignore[no-untyped-call]
        return nats

    def of(states: Tensor, part: slice) -> Tensor:
        return cross_entropy(model.head_logits(states, batch.row[part]), target[part], reduction="none")

    return torch.cat(_in_parts(model, of, states))


def token_statistics(
    model: AdaptedModel, states: Tensor, states_0: Tensor, batch: Batch, start: Active | None
) -> tuple[Tensor, ...]:
    """Per token (n,): nats -log p_y and margin log p_y - log(1 - p_y); <g, z - z_0>, g = softmax(z_0) - onehot(y);
    and nats and margin at theta_0, which ``start`` is (None: the base model). ``states`` and ``states_0`` (n, width)
    are the last hidden states at theta and at theta_0."""
    target = batch.target.to(states.device)

    def of(states: Tensor, states_0: Tensor, part: slice) -> Tensor:
        with torch.no_grad(), model.using(start):
            z_0 = model.head_logits(states_0, batch.row[part])
        z = model.head_logits(states, batch.row[part])
        return torch.stack(statistics(partial(cross_entropy, reduction="none"), z, target[part], z_0))

    return torch.cat(_in_parts(model, of, states, states_0.to(states.device)), dim=1).unbind()


def _parts(model: AdaptedModel, n: int) -> list[slice]:
    """``n`` positions, cut so that the logits of one part are few enough to be held at once."""
    size = max(1, (CPU_LOGITS if model.device.type == "cpu" else GPU_LOGITS) // model.head_width)
    return [slice(first, first + size) for first in range(0, n, size)]


def _in_parts(model: AdaptedModel, of: Callable[..., Tensor], *states: Tensor) -> list[Tensor]:
    """``of`` parts of ``states``; the logits of more than one part are computed again in backward, not kept."""
    parts = _parts(model, len(states[0]))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return [of(*(s[part] for s in states), part) for part in parts]
    return [checkpoint(of, *(s[part] for s in states), part, use_reentrant=False) for part in parts]


def row_values(
    model: AdaptedModel, objective: Objective, batch: Batch, xi: Sequence[float], start: Active | None
) -> tuple[Tensor, Tensor]:
    """Objective and mean nats per completion token of each example of a batch (R,), under the weights that are in
    force. ``xi`` and ``start`` (theta_0; None: the base model) are those of the perturbed objectives."""
    if not objective.perturbed:
        mean = _per_example(token_nats(model, model.hidden(batch), batch), batch)
        return mean, mean.detach()
    with torch.no_grad(), model.using(start):
        states_0 = model.hidden(batch)
    tokens = token_statistics(model, model.hidden(batch), states_0, batch, start)
    means = [_per_example(values, batch) for values in tokens]
    drawn = torch.tensor(list(xi), dtype=means[0].dtype, device=means[0].device)
    return combine(objective, means, drawn), means[0].detach()


def _per_example(values: Tensor, batch: Batch) -> Tensor:
    counts = torch.tensor(batch.counts, device=values.device)
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch.row.to(values.device), values) / counts


def combine(objective: Objective, values: Sequence[Tensor], xi: Tensor) -> Tensor:
    """Value of a perturbed objective for each example (R,), from its :func:`statistics` or their means."""
    nats, margin, shift, nats_0, margin_0 = values
    signed = objective.rho * (2 * xi - 1)
    if objective.kind == "influence":
        return objective.gamma * (nats - nats_0) - (1 + signed) * shift
    return objective.gamma * (margin - margin_0) ** 2 - signed * shift


def example_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of each example (B,)."""
    # For few classes this takes a third of the time of torch's cross_entropy, forward and backward.
    return logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y - log(1 - p_y) of each example (B,)."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(1)


def statistics(loss: ExampleLoss, z: Tensor, labels: Tensor, z_0: Tensor) -> tuple[Tensor, ...]:
    """Loss and margin at z (B, classes); <g, z - z_0> with g the loss's gradient at z_0; loss and margin at z_0."""
    z_0 = z_0.detach().requires_grad_()
    with torch.enable_grad():
        value_0 = loss(z_0, labels)
        (g,) = torch.autograd.grad(value_0.sum(), z_0)
    z_0 = z_0.detach()
    return loss(z, labels), margin(z, labels), (g * (z - z_0)).sum(1), value_0.detach(), margin(z_0, labels)
