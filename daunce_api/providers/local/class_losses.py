"""Losses of a classifier's examples: the usual one, the margin, and the perturbed objectives around any loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objective import Objective
from .objectives import combine

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), labels (B,)) -> losses (B,), in nats; each one of its own example's logits alone."""


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
    z_0 = logits_0.detach().requires_grad_()
    value_0 = loss(z_0, labels)
    (g,) = torch.autograd.grad(value_0.sum(), z_0)
    shift = (g * (logits - logits_0)).sum(1)
    value, margins = loss(logits, labels), (margin(logits, labels), margin(logits_0, labels))
    return combine(objective, value, margins[0], shift, value_0.detach(), margins[1], xi)


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """What is minimised on n examples, by their logits alone; ``logits_0`` and ``xi`` where the objective is
    perturbed."""

    loss: ExampleLoss
    labels: Tensor
    objective: Objective
    logits_0: Tensor | None = None
    xi: Tensor | None = None

    def values(self, logits: Tensor) -> Tensor:
        """Of each example (n,), from logits (n, classes)."""
        if self.logits_0 is None or self.xi is None:
            return self.loss(logits, self.labels)
        return perturbed_loss(self.objective, self.loss, logits, self.labels, self.logits_0, self.xi)

    def gradient(self, logits: Tensor) -> Tensor:
        """Of the sum of all values by the logits (n, classes), which it may overwrite."""
        if self.loss is example_cross_entropy and self.logits_0 is None:
            # p - 1[y]. torch.softmax takes five times as long for few classes.
            p = logits.sub_(logits.amax(1, keepdim=True)).exp_()
            p.div_(p.sum(1, keepdim=True))
            return p.scatter_add_(1, self.labels[:, None], p.new_full((len(p), 1), -1.0))
        with torch.enable_grad():
            live = logits.detach().requires_grad_()
            return torch.autograd.grad(self.values(live).sum(), live)[0]
