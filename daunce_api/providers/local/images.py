"""Members that see images on a CPU: channels last in memory, and members side by side as channels.

A convolution's result has the layout of its weights, and what follows keeps it. Channels last, pooling and
normalisation take a tenth to a half of the time, and convolutions no more. ``vmap`` would copy stacked images to pool
them, and normalise and scale them in three passes: both are taken for (B, K x channels, ...) instead, by torch's own
functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .members import State

LAST = torch.channels_last


def channels_last_weights(module: nn.Module, sample: Tensor) -> frozenset[str]:
    """The weights of the convolutions of images in ``module`` that are better held channels last; none on other devices
    than a CPU, and none where the module does not run so (``view`` of a feature map, say): tried once on ``sample``."""
    layers = [f"{name}.weight".removeprefix(".") for name, m in module.named_modules() if _is_convolution(m)]
    if sample.device.type != "cpu" or not layers:
        return frozenset()
    try:
        trial = copy.deepcopy(module).requires_grad_()
        for name in layers:
            weight = trial.get_parameter(name)
            weight.data = weight.detach().contiguous(memory_format=LAST)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            for training in (False, True):
                trial.train(training)(sample).sum().backward()
    except (RuntimeError, ValueError, TypeError):
        return frozenset()
    return frozenset(layers)


def channels_last(stacked: State, names: frozenset[str]) -> State:
    """``stacked`` with every member's weight of ``names`` (K, out, in, height, width) channels last in memory."""
    laid = {n: t.detach().flatten(0, 1).contiguous(memory_format=LAST) for n, t in stacked.items() if n in names}
    return stacked | {n: t.view(stacked[n].shape) for n, t in laid.items()}


def _is_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and "weight" in module._parameters


class SideBySide(TorchFunctionMode):
    """Within ``vmap`` over members: batch normalisation and pooling of images (B, C, H, W) are those of
    (B, K x C, H, W). Anything else, and all of other shapes, is left to ``vmap``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            if func is functional.batch_norm:
                return _batch_norm(*args, **named)
            if func in _POOLING:
                return _Pooled.apply(args[0], partial(_call, func, args[1:], named))  # type: ignore[no-untyped-call]
        return func(*args, **named)


_POOLING: frozenset[Callable[..., Tensor]] = frozenset(
    {
        functional.max_pool2d,
        functional.avg_pool2d,
        functional.adaptive_max_pool2d,
        functional.adaptive_avg_pool2d,
    }
)


class _OfMembers(torch.autograd.Function):
    """Only a rule for vmap: it is torch's functions on stacked tensors, which have their own gradients."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        raise RuntimeError("not of a member's own tensors: left to vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError


class _Pooled(_OfMembers):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, pool: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        return _apart(pool(_side_by_side(x, in_dims[0])), info.batch_size), 1


class _Normalised(_OfMembers):
    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, int]:
        def flat(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is not None and dim != 0:
                raise RuntimeError("not of a member's own tensors: left to vmap")
            return None if tensor is None else tensor.view(-1)  # a view: running statistics change in place

        mean, variance, weight, bias = map(flat, (mean, variance, weight, bias), in_dims[1:5])
        x = _side_by_side(x, in_dims[0])
        out = functional.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
        return _apart(out, info.batch_size), 1


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """The signature of ``functional.batch_norm``."""
    return _Normalised.apply(  # type: ignore[no-untyped-call]
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _call(func: Any, args: Any, named: Any, x: Tensor) -> Any:
    return func(x, *args, **named)


def _side_by_side(stacked: Tensor, members: int) -> Tensor:
    """(B, K x C, H, W), without a copy of what a convolution of members gave."""
    return stacked.movedim(members, 1).flatten(1, 2)


def _apart(together: Tensor, members: int) -> Tensor:
    return together.view(len(together), members, -1, *together.shape[2:])
