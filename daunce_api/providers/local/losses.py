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

from ...errors import CapabilityError
from ..objective import Objective
from .lora import Active, AdaptedModel, Batch

CPU_LOGITS = 1 << 22
"""Logits held at once (tokens x vocabulary): 16 MiB in float32."""
GPU_LOGITS = 1 << 26

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), labels (B,)) -> losses (B,), in nats; each one of its own example's logits alone."""


class Head:
    """Logits of last hidden states (n, width) in float32 (float64 if they are), by the model's own output head.

    Knows what some families do to logits after it: a constant factor or divisor, or a soft cap.
    """

    def __init__(self, model: AdaptedModel) -> None:
        """Raises CapabilityError where that does not give the model's own logits: the family does something else."""
        self.model = model
        config = model.config
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0)
        self._factor /= float(getattr(config, "logits_scaling", None) or 1.0)
        ids = list(range(min(5, int(config.vocab_size))))
        with model.using(None), torch.no_grad():
            batch = Batch.of([(ids, range(1, len(ids)))], model.device)
            own = model.logits(batch.ids).float()
            found = self.logits(model.hidden(batch), None)
        self.vocabulary = found.shape[1]
        if found.shape != own.shape or not torch.allclose(found.float(), own, rtol=0.05, atol=0.05):
            raise CapabilityError(
                f"{model.model.config.model_type} changes its logits in a way that is not known here; "
                "kind: vllm scores such a model."
            )

    def at_once(self, device: torch.device) -> int:
        """Tokens that go through the head together."""
        return max(1, (CPU_LOGITS if device.type == "cpu" else GPU_LOGITS) // self.vocabulary)

    def logits(self, hidden: Tensor, members: Sequence[int] | None) -> Tensor:
        """(n, vocabulary), each of its own member (see ``AdaptedModel.owners``)."""
        raw = self.model.raw_logits(hidden, members)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        if self._factor != 1.0:
            raw = raw * self._factor
        return raw if self._cap is None else torch.tanh(raw / self._cap) * self._cap


class _Nats(torch.autograd.Function):
    """-log p_y where the head is frozen.

    The gradient with respect to a hidden state is one number a token away from what backward returns, so that it is
    computed while the logits are there: they are neither kept nor computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, nats_of: Callable[[Tensor, slice], Tensor], n: int, size: int) -> Tensor:
        nats, pulls = [], []
        for part in _parts(n, size):
            with torch.enable_grad():
                states = hidden[part].detach().requires_grad_()
                values = nats_of(states, part)
                pulls.append(torch.autograd.grad(values.sum(), states)[0])
            nats.append(values.detach())
        ctx.save_for_backward(torch.cat(pulls))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (pull,) = ctx.saved_tensors
        return (pull * gradient[:, None]).to(pull.dtype), None, None, None


def token_nats(head: Head, hidden: Tensor, target: Tensor, members: Sequence[int] | None) -> Tensor:
    """-log p_y of each token (n,), from last hidden states (n, width); differentiable in them and in what is trained of
    the head."""
    target = target.to(hidden.device)

    def nats_of(states: Tensor, part: slice) -> Tensor:
        logits = head.logits(states, None if members is None else members[part])
        values: Tensor = cross_entropy(logits, target[part], reduction="none")
        return values

    size = head.at_once(hidden.device)
    if hidden.requires_grad and not head.model.trains_head:
        nats: Tensor = _Nats.apply(hidden, nats_of, len(target), size)  # type: ignore[no-untyped-call]
        return nats
    return torch.cat(_in_parts(nats_of, (hidden,), len(target), size))


def token_statistics(
    head: Head,
    hidden: Tensor,
    hidden_0: Tensor,
    target: Tensor,
    members: Sequence[int] | None,
    start: Active | None,
) -> tuple[Tensor, ...]:
    """Per token (n,): nats -log p_y and margin log p_y - log(1 - p_y); <g, z - z_0>, g = softmax(z_0) - onehot(y);
    and nats and margin at theta_0, which ``start`` is (None: the base model). ``hidden`` and ``hidden_0`` (n, width)
    are the last hidden states at theta and at theta_0."""

    def of(states: Tensor, states_0: Tensor, part: slice) -> Tensor:
        with torch.no_grad(), head.model.using(start):
            z_0 = head.logits(states_0, None)
        z = head.logits(states, None if members is None else members[part])
        return torch.stack(_statistics(partial(cross_entropy, reduction="none"), z, target[part], z_0))

    target, hidden_0 = target.to(hidden.device), hidden_0.to(hidden.device)
    parts = _in_parts(of, (hidden, hidden_0), len(target), head.at_once(hidden.device))
    return torch.cat(parts, dim=1).unbind()


def _parts(n: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, n, size)]


def _in_parts(of: Callable[..., Tensor], states: tuple[Tensor, ...], n: int, size: int) -> list[Tensor]:
    """``of`` slices of ``states``; the logits of more than one slice are computed again in backward, not kept."""
    if n <= size or not torch.is_grad_enabled():
        return [of(*(s[part] for s in states), part) for part in _parts(n, size)]
    return [checkpoint(of, *(s[part] for s in states), part, use_reentrant=False) for part in _parts(n, size)]


def row_values(
    head: Head, objective: Objective, batch: Batch, xi: Sequence[float], start: Active | None
) -> tuple[Tensor, Tensor]:
    """Objective and mean nats per completion token of each example of a batch (R,), under the weights that are in
    force. ``xi`` and ``start`` (theta_0; None: the base model) are those of the perturbed objectives."""
    model = head.model
    members = model.owners(batch)
    if not objective.perturbed:
        mean = _per_example(token_nats(head, model.hidden(batch), batch.target, members), batch)
        return mean, mean.detach()
    with torch.no_grad(), model.using(start):
        hidden_0 = model.hidden(batch)
    tokens = token_statistics(head, model.hidden(batch), hidden_0, batch.target, members, start)
    statistics = [_per_example(values, batch) for values in tokens]
    drawn = torch.tensor(list(xi), dtype=statistics[0].dtype, device=statistics[0].device)
    return combine(objective, statistics, drawn), statistics[0].detach()


def _per_example(values: Tensor, batch: Batch) -> Tensor:
    counts = torch.tensor(batch.counts, device=values.device)
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch.row.to(values.device), values) / counts


def combine(objective: Objective, statistics: Sequence[Tensor], xi: Tensor) -> Tensor:
    """Value of the objective for each example (R,), from its mean nats and margin, <g, z - z_0>, and nats and margin at
    theta_0."""
    nats, margin, shift, nats_0, margin_0 = statistics
    if objective.kind == "subset":
        return nats
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


def perturbed_loss(
    objective: Objective, loss: ExampleLoss, logits: Tensor, labels: Tensor, logits_0: Tensor, xi: Tensor
) -> Tensor:
    """Value of a perturbed objective for each example (B,), with ``loss`` as its L and g = dL/dz at ``logits_0``."""
    return combine(objective, _statistics(loss, logits, labels, logits_0), xi)


def _statistics(loss: ExampleLoss, z: Tensor, labels: Tensor, z_0: Tensor) -> tuple[Tensor, ...]:
    """Loss and margin at z (B, classes); <g, z - z_0> with g the loss's gradient at z_0; loss and margin at z_0."""
    z_0 = z_0.detach().requires_grad_()
    with torch.enable_grad():
        value_0 = loss(z_0, labels)
        (g,) = torch.autograd.grad(value_0.sum(), z_0)
    z_0 = z_0.detach()
    return loss(z, labels), margin(z, labels), (g * (z - z_0)).sum(1), value_0.detach(), margin(z_0, labels)
