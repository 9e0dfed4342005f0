"""When a run has enough members: ``ensemble.stop``, looked at as members are completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import StopConfig
from ..core import MINIMUM_MEMBERS, SelfLDS
from ..errors import ConfigurationError

QualityOf = Callable[[Sequence[int]], SelfLDS | None]
"""self_lds of some complete members."""


class Stopping:
    """Remembers self_lds at the member counts that were looked at."""

    def __init__(self, stop: StopConfig | None) -> None:
        """Raises ConfigurationError where ``ensemble.stop`` names no condition."""
        if stop is not None and stop.self_lds is None and stop.plateau is None:
            raise ConfigurationError("ensemble.stop needs self_lds or plateau, each between 0 and 1.")
        self._stop = stop
        self._history: dict[int, SelfLDS] = {}
        self._order: list[int] = []

    def reason(self, members: Sequence[int], quality_of: QualityOf) -> str | None:
        """Why no further member is needed, in words; None to go on. Looks at every ``check_every``-th complete member,
        in the order of completion, so that each look holds the members of the looks before it."""
        if self._stop is None:
            return None
        self._order += [k for k in members if k not in self._order]
        every = self._stop.check_every
        latest = len(members) // every * every
        for count in (latest - every, latest):
            if count >= MINIMUM_MEMBERS and count not in self._history:
                quality = quality_of(self._order[:count])
                if quality is not None:
                    self._history[count] = quality
        return enough(self._stop, [self._history[count] for count in sorted(self._history)])


def enough(stop: StopConfig, history: Sequence[SelfLDS]) -> str | None:
    """Why more members are no longer worth their price, or None; ``history`` holds estimates of nested sets of members,
    ascending.

    A plateau: half as many members again would gain less than ``plateau``, by the curve, and the members between the
    last two looks gained less too.
    """
    if not history or history[-1].members < stop.min_members:
        return None
    last = history[-1]
    if stop.self_lds is not None and (last.low if stop.surely else last.value) >= stop.self_lds:
        return f"self_lds is {last.value:.3f} [{last.low:.3f}, {last.high:.3f}] with {last.members} members"
    if stop.plateau is None or len(history) < 2 or last.curve is None:
        return None
    gain = float(last.expected(1.5 * last.members) - last.expected(last.members))
    if gain >= stop.plateau or last.value - history[-2].value >= stop.plateau:
        return None
    return f"{last.members // 2} more members would add about {gain:.3f} to a self_lds of {last.value:.3f}"
