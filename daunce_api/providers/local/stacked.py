"""Plain networks of many members at once: batched products and formulas of the gradients, without autograd.

For small networks ``vmap`` takes as long as the products themselves, and autograd with an optimiser as long again: the
gradient of the weights is added to them within the product that computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NARROW = 10
"""Outputs of a layer up to which the transposed product is faster on a CPU: 1.1 to 1.7 times, for all shapes tried."""

Weights = Mapping[str, Tensor]
"""Stacked along a first axis, by name."""


class Update(Protocol):
    """Takes the gradients of stacked weights, and may change the weights at once."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """The gradient of ``name`` is the batched product of ``left`` and ``right``."""

    def value(self, name: str, gradient: Tensor) -> None: ...


class _Layer(Protocol):
    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """Of inputs (K, B, ...)."""

    def backward(self, weights: Weights, x: Tensor, out: Tensor, grad: Tensor) -> Tensor:
        """The gradient of ``x`` from that of ``out``."""


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: str
    bias: str

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        weight, bias, rows = weights[self.weight], weights[self.bias], x.flatten(1, -2)
        if weight.shape[1] <= NARROW and x.device.type == "cpu":
            out = torch.baddbmm(bias[:, :, None], weight, rows.transpose(1, 2)).transpose(1, 2).contiguous()
        else:
            out = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
        return out.view(*x.shape[:-1], out.shape[-1])

    def backward(self, weights: Weights, x: Tensor, out: Tensor, grad: Tensor) -> Tensor:
        return torch.bmm(grad.flatten(1, -2), weights[self.weight]).view(x.shape)

    def update(self, x: Tensor, grad: Tensor, update: Update) -> None:
        rows = grad.flatten(1, -2)
        update.product(self.weight, rows.transpose(1, 2), x.flatten(1, -2))
        update.value(self.bias, rows.sum(1))


@dataclass(frozen=True, slots=True)
class _Elementwise:
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Of x, by the gradient of what comes out, x, and what comes out."""
    in_place: Callable[[Tensor], Tensor] | None = None
    """``function`` that overwrites x, where its gradient does not need x."""

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        return self.function(x)

    def backward(self, weights: Weights, x: Tensor, out: Tensor, grad: Tensor) -> Tensor:
        return self.gradient(grad, x, out)


class _Flatten:
    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        return x.flatten(2)

    def backward(self, weights: Weights, x: Tensor, out: Tensor, grad: Tensor) -> Tensor:
        return grad.reshape(x.shape)


class PlainNetwork:
    """Linear and elementwise layers and whole flattening, in sequence."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers = layers
        self._first = next((i for i, layer in enumerate(layers) if isinstance(layer, _Linear)), len(layers))

    @classmethod
    def of(cls, module: nn.Module) -> PlainNetwork | None:
        """What ``module`` does; None where it holds anything else, a layer used twice, or several kinds of numbers."""
        names = {name: parameter.dtype for name, parameter in module.named_parameters()}
        layers = _layers(module, names.keys(), "")
        return None if layers is None or len(set(names.values())) != 1 else cls(_in_place(layers))

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """(K, B, classes) of inputs (K, B, ...)."""
        for layer in self._layers:
            x = layer.forward(weights, x)
        return x

    def step(self, weights: Weights, x: Tensor, gradient: Callable[[Tensor], Tensor], update: Update) -> None:
        """Give ``update`` the gradients on inputs (K, B, ...), with ``gradient`` that of the logits (K, B, classes),
        which it may overwrite. A layer's weights are updated when nothing needs them any more."""
        passed = [x]
        for layer in self._layers:
            passed.append(layer.forward(weights, passed[-1]))
        grad = gradient(passed[-1])
        for i in reversed(range(self._first, len(self._layers))):
            layer, out, x = self._layers[i], passed.pop(), passed[-1]
            of_x = layer.backward(weights, x, out, grad) if i > self._first else grad
            if isinstance(layer, _Linear):
                layer.update(x, grad, update)
            grad = of_x


def _layers(module: nn.Module, names: Set[str], prefix: str) -> list[_Layer] | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        parts = [_layers(child, names, f"{prefix}{name}.") for name, child in module.named_children()]
        if len(parts) != len(module) or any(part is None for part in parts):  # a layer used twice has one name
            return None
        return [layer for part in parts if part is not None for layer in part]
    if type(module) is nn.Linear:
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        if {weight, bias} <= names:
            return [_Linear(weight, bias)]
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return [_Flatten()]
    if type(module) is nn.Identity:
        return []
    return [_ELEMENTWISE[type(module)](module)] if type(module) in _ELEMENTWISE else None


def _in_place(layers: Sequence[_Layer]) -> list[_Layer]:
    """Functions overwrite what comes from a linear layer, whose gradient does not need it either."""
    after = [None, *layers]
    return [
        replace(layer, function=layer.in_place)
        if isinstance(layer, _Elementwise) and layer.in_place and isinstance(before, _Linear)
        else layer
        for before, layer in zip(after, layers, strict=False)
    ]


_functional, _aten = nn.functional, torch.ops.aten
_ELEMENTWISE: Mapping[type[nn.Module], Callable[[Any], _Elementwise]] = {
    nn.ReLU: lambda _: _Elementwise(
        torch.relu, lambda grad, x, out: _aten.threshold_backward(grad, out, 0), torch.relu_
    ),
    nn.Tanh: lambda _: _Elementwise(torch.tanh, lambda grad, x, out: _aten.tanh_backward(grad, out), torch.tanh_),
    nn.Sigmoid: lambda _: _Elementwise(
        torch.sigmoid, lambda grad, x, out: _aten.sigmoid_backward(grad, out), torch.sigmoid_
    ),
    nn.SiLU: lambda _: _Elementwise(_functional.silu, lambda grad, x, out: _aten.silu_backward(grad, x)),
    nn.GELU: lambda m: _Elementwise(
        lambda x: _functional.gelu(x, approximate=m.approximate),
        lambda grad, x, out: _aten.gelu_backward(grad, x, approximate=m.approximate),
    ),
    nn.LeakyReLU: lambda m: _Elementwise(
        lambda x: _functional.leaky_relu(x, m.negative_slope),
        lambda grad, x, out: _aten.leaky_relu_backward(grad, x, m.negative_slope, False),
    ),
    nn.ELU: lambda m: _Elementwise(
        lambda x: _functional.elu(x, m.alpha),
        lambda grad, x, out: _aten.elu_backward(grad, m.alpha, 1, 1, False, x),
    ),
}
