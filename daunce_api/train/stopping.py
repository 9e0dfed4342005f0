"""When a run has enough members: ``ensemble.stop``, looked at as members are completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import StopConfig
from ..core import MINIMUM_MEMBERS, SelfLDS, StopRule

QualityOf = Callable[[Sequence[int]], SelfLDS | None]
"""self_lds of some complete members."""


class Stopping:
    """Remembers self_lds at the member counts that were looked at."""

    def __init__(self, stop: StopConfig | None) -> None:
        """Raises ConfigurationError where ``ensemble.stop`` names no condition."""
        self._every = 0 if stop is None else stop.check_every
        self._rule = None
        if stop is not None:
            self._rule = StopRule(stop.self_lds, stop.surely, stop.plateau, stop.min_members)
        self._history: dict[int, SelfLDS] = {}
        self._order: list[int] = []

    def reason(self, members: Sequence[int], quality_of: QualityOf) -> str | None:
        """Why no further member is needed, in words; None to go on. Looks at every ``check_every``-th complete member,
        in the order of completion, so that each look holds the members of the looks before it."""
        if self._rule is None:
            return None
        self._order += [k for k in members if k not in self._order]
        latest = len(members) // self._every * self._every
        for count in (latest - self._every, latest):
            if count >= MINIMUM_MEMBERS and count not in self._history:
                quality = quality_of(self._order[:count])
                if quality is not None:
                    self._history[count] = quality
        return self._rule.reason([self._history[count] for count in sorted(self._history)])
