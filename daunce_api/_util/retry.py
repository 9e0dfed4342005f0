"""The one retry policy: how often a failed request is repeated, how far apart, and when it is given up.

Jobs, scoring, hosting and doctor differ in the numbers of their :class:`RetryPolicy` and in nothing else. Every policy
is bounded by attempts and by time, whatever a server says in ``Retry-After``, and no pause is ever zero.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from ..errors import DailyLimitError, TransientError
from .clock import Clock, SystemClock
from .text import duration

LONGEST_RETRY_AFTER = 31 * 86_400.0
"""Seconds; no server means to be asked again later than that, so a larger ``Retry-After`` is taken for nonsense."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed request is repeated. All times are in seconds.

    The pause before the n-th repeat is ``first * 2**(n - 1)``, at most ``longest``, spread at random over its upper
    half so that requests that failed together do not return together. Where the server sends a sane
    ``Retry-After``, the pause is the larger of the two. The request is given up after ``attempts`` tries, and before
    a pause that would take it beyond ``total`` since the first try.

    Example:
        >>> policy = RetryPolicy(first=1.0, longest=60.0, attempts=5, total=600.0)
        >>> [policy.pause(n, None, spread=1.0) for n in (1, 2, 3)]
        [1.0, 2.0, 4.0]
        >>> policy.pause(1, 30.0, spread=1.0), policy.pause(1, -5.0, spread=1.0)
        (33.0, 1.0)
    """

    first: float
    longest: float
    attempts: int
    total: float

    def pause(self, attempt: int, retry_after: float | None, *, spread: float) -> float:
        """Seconds to wait after ``attempt`` tries (>= 1); ``spread`` is a random number in [0, 1)."""
        own = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60)) * (0.5 + 0.5 * spread)
        return max(own, (sane(retry_after) or 0.0) * (1.0 + 0.1 * spread))


@dataclass(frozen=True, slots=True)
class Retry:
    """One repeat that is about to be waited for. ``attempt`` tries have failed so far, the last one with ``error``."""

    what: str
    attempt: int
    pause: float
    error: BaseException


OnRetry = Callable[[Retry], None]


@dataclass(frozen=True)
class Retrier:
    """Repeats requests by one policy, on one clock. ``rng`` spreads the pauses; ``on_retry`` is called before each.

    Example:
        >>> import asyncio
        >>> from daunce_api._util.clock import InstantClock
        >>> from daunce_api.errors import TransientError
        >>> answers = [TransientError("busy", retry_after=20.0), "done"]
        >>> async def ask():
        ...     answer = answers.pop(0)
        ...     if isinstance(answer, Exception):
        ...         raise answer
        ...     return answer
        >>> retrier = Retrier(RetryPolicy(1.0, 60.0, attempts=5, total=600.0), InstantClock())
        >>> asyncio.run(retrier(ask, "ask"))
        'done'
    """

    policy: RetryPolicy
    clock: Clock = field(default_factory=SystemClock)
    rng: random.Random = field(default_factory=random.Random)
    on_retry: OnRetry | None = None

    async def __call__(
        self,
        action: Callable[[], Awaitable[T]],
        what: str,
        *,
        on: type[BaseException] | tuple[type[BaseException], ...] = TransientError,
    ) -> T:
        """The answer of ``action``, repeated after errors of the classes ``on``; ``what`` names it in messages.

        Whoever passes an action that must not run twice makes it look first whether it has been done. Other errors
        pass through. Raises the last error when the policy gives up (a TransientError says how long that took), and
        DailyLimitError where the server wants to be left alone for longer than the policy waits in all.
        """
        policy, started = self.policy, self.clock.now()

        async def act() -> T:  # tenacity awaits coroutine functions only, not what a lambda returns
            return await action()

        def wait(state: RetryCallState) -> float:
            return policy.pause(state.attempt_number, _retry_after(state), spread=self.rng.random())

        def stop(state: RetryCallState) -> bool:
            # A clock that stands still (a test, a suspended machine) must not unbind the loop.
            elapsed = max(self.clock.now() - started, state.idle_for)
            return state.attempt_number >= policy.attempts or elapsed + state.upcoming_sleep > policy.total

        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome is not None else None
            if self.on_retry is not None and error is not None:
                self.on_retry(Retry(what, state.attempt_number, state.upcoming_sleep, error))

        retrying = AsyncRetrying(
            sleep=self.clock.sleep,
            wait=wait,
            stop=stop,
            retry=retry_if_exception_type(on),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            return await retrying(act)
        except TransientError as error:
            if not isinstance(error, on):
                raise
            retry_after = sane(error.retry_after)
            if retry_after is not None and retry_after > policy.total:
                raise DailyLimitError(
                    f"{error} The server wants no further request for {duration(retry_after)}. Everything done so far "
                    "is kept; run the same command again after that."
                ) from error
            tries = int(retrying.statistics["attempt_number"])
            given_up = type(error)(
                f"{error} Given up after {tries} {'try' if tries == 1 else 'tries'} in "
                f"{duration(max(self.clock.now() - started, retrying.statistics['idle_for']))}. Everything done so far "
                "is kept; run the same command again when the server answers.",
                error.retry_after,
            )
            given_up.status = error.status
            raise given_up from error


def sane(retry_after: float | None) -> float | None:
    """The seconds of a ``Retry-After`` that can be meant; None for zero, negative, past and absurd ones.

    Example:
        >>> sane(2.5), sane(0.0), sane(-1.0), sane(float("inf")), sane(1e300)
        (2.5, None, None, None, None)
    """
    if retry_after is None or not math.isfinite(retry_after) or not 0 < retry_after <= LONGEST_RETRY_AFTER:
        return None
    return retry_after


def _retry_after(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.retry_after if isinstance(error, TransientError) else None
