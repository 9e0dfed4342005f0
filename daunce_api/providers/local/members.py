"""What a classifier's members are while they are trained, and afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Members:
    """K trained models: parameters and buffers, each stacked along a first axis. Weights that a model holds under
    several names are here once, under the first; ``tied`` has the others."""

    parameters: State
    buffers: State
    tied: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def state(self, member: int) -> State:
        """State dict of one member, for ``load_state_dict``."""
        own = self.parameters | self.buffers
        names = {**{n: n for n in own}, **self.tied}
        return {n: own[held][member].detach().clone(memory_format=torch.contiguous_format) for n, held in names.items()}


class EpochView(Protocol):
    """Called after each epoch (from 1) with members ``first``, ``first`` + 1, ... of all."""

    def __call__(self, epoch: int, first: int, members: Members) -> None: ...
