"""Polling a provider until something that takes time there is done: a file is read, a model is loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .._util.clock import Clock, SystemClock
from ..errors import ProviderError, RejectedError, TransientError

Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Poll:
    """At most ``polls`` looks, ``seconds`` apart."""

    seconds: float
    polls: int
    clock: Clock = field(default_factory=SystemClock)

    async def until(
        self,
        ready: Callable[[Answer], bool],
        answer: Answer,
        look: Callable[[], Awaitable[Answer]],
        what: str,
        *,
        late: type[ProviderError] = RejectedError,
    ) -> None:
        """Look until the latest answer says that ``what`` is ready.

        A look that fails in passing is no answer: the work at the provider goes on. Raises ``late`` where it takes too
        long, and what ``ready`` raises.
        """
        for _ in range(self.polls):
            if ready(answer):
                return
            await self.clock.sleep(self.seconds)
            with suppress(TransientError):
                answer = await look()
        if not ready(answer):
            raise late(f"{what} was not ready after {self.polls * self.seconds / 60:.0f} minutes.")


@asynccontextmanager
async def file_in_time(is_being_read: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
    """Around the submit of a job: a refusal (400) while the provider still reads the job's file is a matter of time.

    Raises TransientError in its place.
    """
    try:
        yield
    except RejectedError as error:
        if error.status == 400 and await is_being_read():
            raise TransientError(f"{error} The provider is still reading its training file.") from error
        raise
