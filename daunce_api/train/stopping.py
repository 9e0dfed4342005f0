"""When a run has enough members: ``ensemble.stop``, looked at as members are completed."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_

from ..config import StopConfig
from ..core import SelfLDS
from ..core.quality import MINIMUM_MEMBERS
from ..core.stopping import AtLeast, Condition, Plateau, Reached
from ..errors import ConfigurationError

QualityOf = Callable[[int], SelfLDS | None]
"""self_lds of the first so many complete members."""


class StopRule:
    """Remembers self_lds at the member counts that were looked at."""

    def __init__(self, stop: StopConfig | None) -> None:
        """Raises ConfigurationError where ``ensemble.stop`` names no condition."""
        self._stop = stop
        self._condition = None if stop is None else stop_condition(stop)
        self._history: dict[int, SelfLDS] = {}

    def reason(self, members: int, quality_of: QualityOf) -> str | None:
        """Why no further member is needed, in words; None to go on. Looks at every ``check_every``-th member."""
        if self._stop is None or self._condition is None:
            return None
        latest = members // self._stop.check_every * self._stop.check_every
        for count in (latest - self._stop.check_every, latest):
            if count >= MINIMUM_MEMBERS and count not in self._history and (quality := quality_of(count)) is not None:
                self._history[count] = quality
        return self._condition.met([self._history[count] for count in sorted(self._history)])


def stop_condition(stop: StopConfig) -> Condition:
    """The condition that ``ensemble.stop`` describes. Raises ConfigurationError where it names none."""
    conditions: list[Condition] = []
    if stop.self_lds is not None:
        conditions.append(Reached(stop.self_lds, surely=stop.surely))
    if stop.plateau is not None:
        conditions.append(Plateau(stop.plateau))
    if not conditions:
        raise ConfigurationError("ensemble.stop needs self_lds, plateau, or both.")
    return reduce(or_, conditions) & AtLeast(stop.min_members)
