"""Initial weights of many members: the draws of one module's construction, repeated under every member's seed.

Constructing a small module takes several times as long as its random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .members import State


class FreshWeights:
    """What ``factory()`` holds under a seed of torch's generator.

    The first module of many is constructed under a :class:`_Recorder`. Where all that was random in it are draws into
    its own tensors in place, as in the initialisation of torch's layers and most of ``nn.init``, these draws are
    repeated for the others, once they have given the bits of two modules of different seeds. Any other module is
    constructed for each member.
    """

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        self._factory = factory
        self._draws: _Draws | None = None
        self._decided = False

    def of(self, seeds: Sequence[int]) -> State:
        """State of every seed's module, stacked along a first axis; torch's generators are left as they were."""
        with torch.random.fork_rng(devices=[]):
            if not self._decided and len(set(seeds)) > 1:
                self._decide(*list(dict.fromkeys(seeds))[:2])
            if self._draws is not None:
                return self._draws.repeated(seeds)
            states = [self._constructed(seed) for seed in seeds]
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def _constructed(self, seed: int) -> State:
        _seed(seed)
        return dict(self._factory().state_dict())

    def _decide(self, first: int, second: int) -> None:
        self._decided = True
        with _Recorder() as recorder:
            state = self._constructed(first)
        draws = recorder.draws(state)
        if draws is None:
            return
        repeated = draws.repeated([first, second])
        for k, expected in enumerate((state, self._constructed(second))):
            if expected.keys() != repeated.keys() or any(not _same(repeated[n][k], expected[n]) for n in expected):
                return
        self._draws = draws


@dataclass(frozen=True, slots=True)
class _Draw:
    """An operation in place on ``storage``, or a part of it, with ``values`` beside it."""

    operation: Callable[..., Any]
    target: Tensor
    values: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Draws:
    """``state`` of one module, and what was drawn in it, in order, with the name of the tensor drawn into."""

    state: State
    draws: Sequence[tuple[str, _Draw]]

    def repeated(self, seeds: Sequence[int]) -> State:
        stacked = {n: torch.stack([t.detach()] * len(seeds)) for n, t in self.state.items()}
        steps = [
            (draw.operation, self._targets(stacked[name], draw.target), draw.values, draw.named)
            for name, draw in self.draws
        ]
        for k, seed in enumerate(seeds):
            _seed(seed)
            for operation, targets, values, named in steps:
                operation(targets[k], *values, **named)
        return stacked

    @staticmethod
    def _targets(stacked: Tensor, target: Tensor) -> Sequence[Tensor]:
        if target.shape == stacked.shape[1:] and target.is_contiguous():
            return stacked.unbind(0)
        shape, strides, offset = target.shape, target.stride(), target.storage_offset()
        return [t.as_strided(shape, strides, t.storage_offset() + offset) for t in stacked.unbind(0)]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes random draws, and whatever else happens to what was drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws: list[_Draw] = []
        self._drawn: set[int] = set()
        self._beyond = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        given = [t for t in tree_leaves((args, named)) if isinstance(t, Tensor)]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random or any(_storage(t) in self._drawn for t in given):
            in_place = func._schema.is_mutable and len(given) == 1 and args and args[0] is given[0]
            if in_place and named.get("generator") is None:
                self._draws.append(_Draw(func, given[0], tuple(args[1:]), named))
                self._drawn.add(_storage(given[0]))
            elif random or not func.is_view:  # what is drawn goes into something else, or decides about it
                self._beyond = True
        return func(*args, **named)

    def draws(self, state: State) -> _Draws | None:
        """None where more than draws into the tensors of ``state``, in place, made it what it is."""
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names.setdefault(_storage(tensor), []).append(name)
        if self._beyond or any(not _is_whole(state, names.get(storage, [])) for storage in self._drawn):
            return None
        return _Draws(state, [(names[_storage(draw.target)][0], draw) for draw in self._draws])


def _is_whole(state: State, names: Sequence[str]) -> bool:
    """Whether these names of one memory are one tensor that fills it."""
    tensor = state[names[0]] if len(names) == 1 else None
    return tensor is not None and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits agree; NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a small model's weights
