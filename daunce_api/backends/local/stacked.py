"""Plain networks of many members at once: a batched product a layer, without what ``vmap`` costs on top.

For small networks ``vmap`` takes as long as the products themselves, and its gradients of linear layers come
transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Layer = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(stacked weights by name, (K, B, ...)) -> (K, B, ...)."""

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def stacked_layers(module: nn.Module, names: frozenset[str], prefix: str = "") -> Sequence[Layer] | None:
    """What ``module`` does, for stacked weights; None where it holds anything but linear and elementwise layers and
    whole flattening in sequence, or weights outside ``names`` (those that are trained, each under one name)."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        parts = [stacked_layers(child, names, f"{prefix}{name}.") for name, child in module.named_children()]
        if len(parts) != len(module) or any(part is None for part in parts):  # a layer used twice has one name
            return None
        return [layer for part in parts if part is not None for layer in part]
    if type(module) is nn.Linear:
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        if {weight, bias} <= names:
            return [lambda weights, x: _product(x, weights[weight], weights[bias])]
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return [lambda _, x: x.flatten(2)]
    if type(module) in ELEMENTWISE:
        return [lambda _, x: module(x)]
    return None


def run_layers(layers: Sequence[Layer], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Logits (K, B, classes) of inputs (K, B, ...)."""
    for layer in layers:
        x = layer(weights, x)
    return x


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Inputs (K, B, ..., n) through the linear layers of K members."""
    out: Tensor = _Linear.apply(x.flatten(1, -2), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[1])


class _Linear(torch.autograd.Function):
    """The gradient of the weights lies as the weights do, so that nothing is copied when it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return of_x, torch.bmm(grad.transpose(1, 2), x), grad.sum(1)
