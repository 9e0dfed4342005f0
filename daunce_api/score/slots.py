"""How many requests are at work at once: fewer when the provider says so, more again when it does not."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from anyio import CapacityLimiter

from .._util.clock import Clock, SystemClock

_PARTS = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ONE_CUT_SECONDS = 1.0
_DEFAULT_RESET = 1.0
"""Seconds that a remainder holds where the provider does not say when it is reset."""


class AdaptiveSlots:
    """A bound on concurrency between 1 and ``ceiling``; first come, first served.

    A rate limit halves it (once for requests that fail together), every answered request raises it by 1/bound; and
    while the provider's headers say that fewer requests remain until a reset, no more than these are sent at once.
    """

    def __init__(self, ceiling: int, clock: Clock | None = None) -> None:
        self._ceiling = ceiling
        self._clock = clock or SystemClock()
        self._bound = float(ceiling)
        self._remaining = math.inf
        self._reset_at = -math.inf
        self._cut_at = -math.inf
        self._limiter = CapacityLimiter(ceiling)

    @property
    def allowed(self) -> int:
        """Requests that may be on their way now."""
        bound = self._bound
        if self._remaining < bound and self._clock.now() < self._reset_at:
            bound = self._remaining
        return max(1, int(bound))

    def succeeded(self) -> None:
        """A request was answered."""
        self._bound = min(float(self._ceiling), self._bound + 1.0 / self._bound)

    def limited(self) -> None:
        """A request was refused by a rate limit."""
        now = self._clock.now()
        if now - self._cut_at >= _ONE_CUT_SECONDS:
            self._bound = max(1.0, self._bound / 2.0)
            self._cut_at = now

    def observe(self, headers: Mapping[str, str]) -> None:
        """Take in an answer's ``x-ratelimit-*`` headers; without them nothing changes."""
        left = [
            (float(value), seconds_of(reset) if (reset := headers.get(f"x-ratelimit-reset-{what}")) else _DEFAULT_RESET)
            for what in ("requests", "tokens")
            if (value := _share(headers, what)) is not None
        ]
        if left:
            self._remaining, seconds = min(left)
            self._reset_at = self._clock.now() + seconds

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One request is on its way inside the block."""
        holder = object()
        self._limiter.total_tokens = self.allowed
        await self._limiter.acquire_on_behalf_of(holder)
        try:
            yield
        finally:
            self._limiter.release_on_behalf_of(holder)
            self._limiter.total_tokens = self.allowed


def _share(headers: Mapping[str, str], what: str) -> float | None:
    """Requests that remain; None where the headers do not say. How many requests the remaining tokens are enough for
    is not known, so of tokens only an empty remainder counts."""
    try:
        remaining = float(headers[f"x-ratelimit-remaining-{what}"])
    except (KeyError, ValueError):
        return None
    if not math.isfinite(remaining) or remaining < 0:
        return None
    if what == "requests":
        return remaining
    return 1.0 if remaining == 0 else None


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as ``1s``, ``6m0s``, ``20ms`` or a bare number; 0 for anything else."""
    text = duration.strip()
    try:
        bare = float(text)
    except ValueError:
        if not text or _PARTS.sub("", text):
            return 0.0
        return sum(float(number) * _UNITS[unit] for number, unit in _PARTS.findall(text))
    return bare if math.isfinite(bare) and bare >= 0 else 0.0
