"""Requests that are repeated, and things that are looked for again: who waits says so."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .._util.clock import Clock
from .._util.log import logger
from .._util.retry import Retrier, Retry, RetryPolicy, duration
from .._util.text import terminal_text
from ..errors import AmbiguousSubmitError, TransientError
from .events import Event, EventKind, OnEvent
from .grace import Grace

T = TypeVar("T")


class Patient:
    """A clock, one retry policy, and the grace periods of a provider's new things. ``rng`` spreads waiting times."""

    def __init__(
        self, grace_seconds: float, clock: Clock, retries: RetryPolicy, rng: random.Random, on_event: OnEvent | None
    ) -> None:
        self.clock = clock
        self.grace_seconds = grace_seconds
        self._retries = retries
        self._rng = rng
        self._on_event = on_event
        self._grace = Grace(grace_seconds, clock, lambda text: self.emit(Event(EventKind.NOT_YET, text)))

    def emit(self, event: Event) -> None:
        """Report an event, and log it."""
        logger.info("%s", terminal_text(event.message))
        if self._on_event is not None:
            self._on_event(event)

    async def wait_for(self, subject: str, why: object) -> bool:
        """Wait before another look at something new that is not visible yet; False once its grace period is over."""
        return await self._grace.wait(subject, why, sleep=self.pause)

    def visible(self, subject: str) -> None:
        """Something that was waited for is there."""
        self._grace.visible(subject)

    async def repeat(self, action: Callable[[], Awaitable[T]], what: str, policy: RetryPolicy | None = None) -> T:
        """A request by the retry policy; whoever passes one that must not run twice makes it look first."""
        retry = Retrier(policy or self._retries, self.clock, rng=self._rng, on_retry=self._waiting)
        return await retry(action, what, on=(TransientError, AmbiguousSubmitError))

    async def pause(self, seconds: float) -> None:
        """Wait for ``seconds``, or up to a fifth longer."""
        await self.clock.sleep(seconds * self._rng.uniform(1.0, 1.2))

    async def search(self, look: Callable[[], Awaitable[T | None]], what: str, seconds: float) -> T | None:
        """What ``look`` finds, at once or before ``seconds`` have passed; pauses double from half a second up."""
        waited, step = 0.0, 0.5
        while True:
            found = await self.repeat(look, what)
            if found is not None or waited >= seconds:
                return found
            step = min(step, seconds - waited)
            await self.pause(step)
            waited, step = waited + step, min(step * 2, 30.0)

    def _waiting(self, retry: Retry) -> None:
        self.emit(Event(EventKind.WAITING, f"{retry.what}: {retry.error} Next try in {duration(retry.pause)}."))
