"""Requests that are repeated, and things that are looked for again: who waits says so.

A job, file or model that was just made may be invisible for minutes, and that is no failure.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from .._util.clock import Clock
from .._util.log import logger
from .._util.retry import Retrier, Retry, RetryPolicy
from .._util.text import duration, terminal_text
from ..errors import AmbiguousSubmitError, RejectedError, TransientError
from .events import Event, EventKind, OnEvent

T = TypeVar("T")

JOB_RETRIES = RetryPolicy(first=1.0, longest=60.0, attempts=100, total=3600.0)
"""Requests about jobs, files and models: an outage of an hour is waited for; a longer Retry-After parks the run."""

REACH_RETRIES = RetryPolicy(first=1.0, longest=20.0, attempts=8, total=120.0)
"""The first request to the jobs route: a route that never works is distinguished from an outage within two minutes."""


@dataclass(frozen=True, slots=True)
class PollPolicy:
    """How a submitted job is watched, in seconds.

    It is read after ``first``, then whenever a tenth of its age has passed, at most ``longest`` apart; each pause is
    spread by up to a fifth. ``job_timeout``: a job that takes longer is cancelled and its attempt counts as failed;
    time in a queue counts, unless the queue is for the user's own machines. ``withheld``: how long a finished job may
    take to show its model.
    """

    first: float = 0.5
    longest: float = 60.0
    job_timeout: float = 86_400.0
    withheld: float = 600.0


_LONGEST_PAUSE = 30.0
_MISSING = re.compile(
    r"not (?:yet )?(?:be )?(?:found|exist|ready|available|processed|visible|known)|no such|does ?n[o'’]t exist"
    r"|unknown|invalid|still (?:being )?process",
    re.IGNORECASE,
)
_FILE = re.compile(r"\b(?:training[_ ]?)?files?\b", re.IGNORECASE)


class Patient:
    """A clock, one retry policy, and the grace periods of a provider's new things. ``rng`` spreads waiting times.

    A grace period begins when a thing is first not found, and not when it was made, so that a run that was interrupted
    in between waits as well.
    """

    def __init__(
        self, grace_seconds: float, clock: Clock, retries: RetryPolicy, rng: random.Random, on_event: OnEvent | None
    ) -> None:
        self.clock = clock
        self.grace_seconds = grace_seconds
        self._retries = retries
        self._rng = rng
        self._on_event = on_event
        self._missing_since: dict[str, float] = {}

    def emit(self, event: Event) -> None:
        """Report an event, and log it."""
        logger.info("%s", terminal_text(event.message))
        if self._on_event is not None:
            self._on_event(event)

    async def wait_for(self, subject: str, why: object) -> bool:
        """Wait before another look at something new that is not visible yet; False once its grace period is over."""
        now, seconds = self.clock.now(), self.grace_seconds
        waited = now - self._missing_since.get(subject, now)
        if waited >= seconds:
            return False
        if subject not in self._missing_since:
            self._missing_since[subject] = now
            text = (
                f"{subject} is not visible yet ({why}). The provider may need minutes; it is looked for again for "
                f"{duration(seconds)} before it counts as lost."
            )
            self.emit(Event(EventKind.NOT_YET, text))
        await self.pause(min(max(1.0, waited / 2), _LONGEST_PAUSE, seconds - waited))
        return True

    def visible(self, subject: str) -> None:
        """Something that was waited for is there."""
        if self._missing_since.pop(subject, None) is not None:
            self.emit(Event(EventKind.NOT_YET, f"{subject} is visible now."))

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


def names_missing(error: RejectedError, *ids: str) -> bool:
    """Whether a refused job creation says that its training file, or one of ``ids``, is not there."""
    text = str(error)
    if error.status not in (None, 400, 404, 409, 422) or _MISSING.search(text) is None:
        return False
    return any(name in text for name in ids) or _FILE.search(text) is not None
