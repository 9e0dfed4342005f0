"""Models that hold a weight under several names: a layer used twice, an output layer that is the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.func import functional_call

Value = TypeVar("Value")


class TiedNames:
    """The names of a module's parameters and buffers, of which each tensor keeps the first."""

    def __init__(self, module: nn.Module) -> None:
        first: dict[int, str] = {}
        everything = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        names = {name: first.setdefault(id(tensor), name) for name, tensor in everything}
        self._module = module
        self.others = {name: held for name, held in names.items() if name != held}
        """The other names, each with the first one."""
        # A layer that is used twice has one place for its weight, which must not be filled twice.
        self._places = {n: held for n, held in self.others.items() if _place(module, n) != _place(module, held)}

    def once(self, state: Mapping[str, Value]) -> dict[str, Value]:
        """``state`` with each tensor under its first name alone."""
        return {name: value for name, value in state.items() if name not in self.others}

    def call(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the module gives for ``x`` with the weights and buffers of ``state``, each under its first name."""
        placed = {name: state[held] for name, held in self._places.items()}
        # Tied by functional_call itself, a layer that is used twice would keep these weights afterwards.
        out: Tensor = functional_call(self._module, {**state, **placed}, (x,), tie_weights=False)
        return out


def _place(module: nn.Module, name: str) -> tuple[int, str]:
    owner, _, attribute = name.rpartition(".")
    return id(module.get_submodule(owner)), attribute
