"""Time that can be replaced: a replay and a test wait for nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What waits and tells the time."""

    def now(self) -> float:
        """Seconds since some fixed moment, never going back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let other tasks run for so long."""
        ...


class SystemClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class InstantClock:
    """Simulated time: who sleeps wakes in the order of the deadlines, and nobody really waits.

    Sleeps of different tasks overlap as they do in real time. Work that really takes time (a request to a real
    server) takes none here, so this clock is for replays and scripted providers.
    """

    _QUIET_TURNS = 20
    """Turns of the event loop in which nobody with an earlier deadline may turn up before the time moves on: tasks
    between two sleeps need a few to pass a lock or an answer on."""

    def __init__(self) -> None:
        self._now = 0.0
        self._sleepers: list[tuple[float, int]] = []
        self._count = 0

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        mine = (self._now + max(seconds, 0.0), self._count)
        self._sleepers.append(mine)
        try:
            quiet = 0
            while quiet < (self._QUIET_TURNS if mine[0] > self._now else 1):
                await asyncio.sleep(0)
                quiet = quiet + 1 if min(self._sleepers) == mine else 0
            self._now = max(self._now, mine[0])
        finally:
            self._sleepers.remove(mine)
