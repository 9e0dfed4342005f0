"""How long to wait for what, and the one way in which a failed request is repeated."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from .._util.clock import Clock
from ..errors import AmbiguousSubmitError, DailyLimitError, TransientError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """All waiting times, in seconds.

    A job is looked at after ``poll``, then whenever a tenth of its age has passed, at most ``poll_max`` apart. A
    request is repeated after ``retry``, doubling up to ``retry_max``, until ``give_up`` has passed; a provider's
    ``retry-after`` is honoured up to ``park``, and above that the run is parked. ``job_timeout``: a job that takes
    longer is cancelled and its attempt counts as failed; time in a queue counts, unless the queue is for the user's own
    machines. ``withheld``: how long a finished job may take to show its model. Every wait is spread by up to a fifth.
    """

    poll: float = 0.5
    poll_max: float = 60.0
    retry: float = 1.0
    retry_max: float = 60.0
    give_up: float = 1800.0
    park: float = 3600.0
    job_timeout: float = 86_400.0
    withheld: float = 600.0


class Waiter:
    """Waits and repeats by one set of rules, on one clock."""

    def __init__(self, clock: Clock, patience: Patience, rng: random.Random) -> None:
        self.clock = clock
        self.patience = patience
        self._rng = rng

    async def pause(self, seconds: float) -> None:
        """Wait for ``seconds``, or up to a fifth longer."""
        await self.clock.sleep(seconds * self._rng.uniform(1.0, 1.2))

    async def repeat(self, action: Callable[[], Awaitable[T]], on_wait: Callable[[float, BaseException], None]) -> T:
        """Run ``action`` until it gives an answer.

        Repeats after TransientError and AmbiguousSubmitError; whoever passes an action that must not run twice makes
        it look first. Other errors pass through. Raises the last error when patience is at its end, and
        DailyLimitError where the provider asks for a wait longer than ``park``.
        """
        started = self.clock.now()

        async def act() -> T:  # tenacity awaits coroutine functions only, not what a lambda returns
            return await action()

        def wait(state: RetryCallState) -> float:
            told = _told(state)
            if told is None:
                told = min(self.patience.retry * 2.0 ** (state.attempt_number - 1), self.patience.retry_max)
            return told * self._rng.uniform(1.0, 1.2)

        def stop(state: RetryCallState) -> bool:
            told = _told(state)
            if told is not None:
                return told > self.patience.park
            return self.clock.now() - started >= self.patience.give_up

        def before_sleep(state: RetryCallState) -> None:
            if state.outcome is not None and state.next_action is not None:
                error = state.outcome.exception()
                if error is not None:
                    on_wait(state.next_action.sleep, error)

        retrying = AsyncRetrying(
            sleep=self.clock.sleep,
            wait=wait,
            stop=stop,
            retry=retry_if_exception_type((TransientError, AmbiguousSubmitError)),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            return await retrying(act)
        except TransientError as error:
            if error.retry_after is not None and error.retry_after > self.patience.park:
                raise DailyLimitError(
                    f"the provider asks to wait for {error.retry_after / 3600:.1f} hours: {error}"
                ) from error
            raise TransientError(
                f"{error} (repeated for {(self.clock.now() - started) / 60:.0f} minutes). Everything done so far is "
                "kept; run the same command again when the provider answers.",
                error.retry_after,
            ) from error


def _told(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.retry_after if isinstance(error, TransientError) else None
