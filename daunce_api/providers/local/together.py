"""How many members of a classifier are trained at once: what memory allows, and what is faster."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .memory import ACTIVATION_FACTOR, default_limit
from .recipes import ClassifierSettings

CPU_BYTES = 64 << 20
"""Parameters, optimiser state and activations of the members trained at once on a CPU: more leaves its caches."""
WIDE = 128
"""Channels of the widest convolution from which on a CPU trains members one at a time. Eight ResNet-9 members together
were 1.82, 1.52, 1.10, 1.06 and 1.02 times as fast as one at a time with 32, 64, 96, 128 and 192 channels, and take the
memory of eight (RESULTS-local.md)."""


def members_at_once(
    module: nn.Module, sample: Tensor, settings: ClassifierSettings, device: torch.device, limit: int | None
) -> int:
    """Members that ``limit`` bytes allow on batches like ``sample``, at least one; default: what a CPU's caches gain
    from, or half of a GPU's free memory."""
    limit = limit or (CPU_BYTES if device.type == "cpu" else default_limit(device, 1))
    return max(1, limit // bytes_per_member(module, sample, settings))


def bytes_per_member(module: nn.Module, sample: Tensor, settings: ClassifierSettings) -> int:
    """Estimate of what one member takes in training on a batch like ``sample``: weights, gradient, optimiser state,
    activations (counted), and what lives only during a pass. Growth measured for MLPs and ResNet-9 of several sizes,
    optimisers and batches was .65 to 1.2 times that."""
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
    return (2 + states) * weights + int(ACTIVATION_FACTOR * (sum(saved.values()) + logits.nbytes)) + sample.nbytes


def one_at_a_time(module: nn.Module, device: torch.device) -> bool:
    """Whether members of ``module`` are trained faster alone: on a CPU, where a convolution is wide (``WIDE``)."""
    widest = max((m.out_channels // m.groups for m in module.modules() if isinstance(m, _ConvNd)), default=0)
    return device.type == "cpu" and widest >= WIDE
