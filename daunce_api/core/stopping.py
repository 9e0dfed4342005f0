"""When to stop paying for members: conditions that compose.

A condition looks at a run's history of `self_lds` over member counts and says whether it is met. Conditions combine
with ``|`` (either) and ``&`` (both), like pyDVL's stopping criteria:

    (Reached(0.6) | Plateau(0.01)) & AtLeast(20)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import ConfigurationError
from .quality import SelfLDS

History: TypeAlias = Sequence[SelfLDS]


class Condition(ABC):
    """Whether a run has enough members, judged by `self_lds` at growing member counts."""

    @abstractmethod
    def met(self, history: History) -> str | None:
        """The reason for stopping, in words, or None to go on. ``history`` is ordered by member count; it may be
        empty."""

    def __or__(self, other: Condition) -> Condition:
        return _Either(self, other)

    def __and__(self, other: Condition) -> Condition:
        return _Both(self, other)


@dataclass(frozen=True)
class Reached(Condition):
    """The estimated LDS has reached a value.

    Args:
        value: in (0, 1).
        surely: ask for the lower end of the 95 % interval instead of the estimate itself.

    Raises:
        ConfigurationError: value outside (0, 1).
    """

    value: float
    surely: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.value < 1:
            raise ConfigurationError(f"self_lds lies between 0 and 1, so {self.value} cannot be a target.")

    def met(self, history: History) -> str | None:
        """See `Condition.met`."""
        if not history:
            return None
        last = history[-1]
        reached = last.low if self.surely else last.value
        if reached < self.value:
            return None
        return f"self_lds is {last.value:.3f} [{last.low:.3f}, {last.high:.3f}] with {last.members} members"


@dataclass(frozen=True)
class Plateau(Condition):
    """More members no longer help: half as many again would gain less than ``gain``.

    The gain is read from the curve through the last estimate (`SelfLDS.expected`) and, since a curve can mislead,
    confirmed by what was gained between the last two looks.

    Args:
        gain: LDS, in (0, 1).

    Raises:
        ConfigurationError: gain outside (0, 1).
    """

    gain: float

    def __post_init__(self) -> None:
        if not 0 < self.gain < 1:
            raise ConfigurationError(f"A gain in self_lds lies between 0 and 1, so {self.gain} cannot be a limit.")

    def met(self, history: History) -> str | None:
        """See `Condition.met`."""
        if len(history) < 2 or history[-1].curve is None:
            return None
        last, before = history[-1], history[-2]
        now, then = last.expected([last.members, 1.5 * last.members])
        if then - now >= self.gain or last.value - before.value >= self.gain:
            return None
        return f"{last.members // 2} more members would add about {then - now:.3f} to a self_lds of {last.value:.3f}"


@dataclass(frozen=True)
class AtLeast(Condition):
    """There are so many members; combine it with ``&`` to look no earlier."""

    members: int

    def met(self, history: History) -> str | None:
        """See `Condition.met`."""
        if not history or history[-1].members < self.members:
            return None
        return f"{history[-1].members} members"


@dataclass(frozen=True)
class _Either(Condition):
    one: Condition
    other: Condition

    def met(self, history: History) -> str | None:
        return self.one.met(history) or self.other.met(history)


@dataclass(frozen=True)
class _Both(Condition):
    one: Condition
    other: Condition

    def met(self, history: History) -> str | None:
        first, second = self.one.met(history), self.other.met(history)
        return None if first is None or second is None else f"{first}; {second}"
