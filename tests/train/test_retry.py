"""The retry policy: bounded by attempts and by time whatever the server says, with a pause that is never zero."""

from __future__ import annotations

import doctest
import math
import random
from itertools import count

import pytest

from daunce_api._util import exhausted, retry
from daunce_api._util.clock import InstantClock
from daunce_api._util.retry import Retrier, Retry, RetryPolicy
from daunce_api._util.text import duration
from daunce_api.errors import AmbiguousSubmitError, DailyLimitError, RejectedError, TransientError

POLICY = RetryPolicy(first=1.0, longest=60.0, attempts=100, total=3600.0)


class Outage:
    """A request that fails ``times`` times (default: always), each time with this Retry-After."""

    def __init__(self, retry_after: float | None, times: float = math.inf) -> None:
        self.retry_after = retry_after
        self.times = times
        self.tries = 0

    async def __call__(self) -> str:
        self.tries += 1
        if self.tries > self.times:
            return "answer"
        error = TransientError("busy.", self.retry_after)
        error.status = 503
        raise error


def retrier(policy: RetryPolicy = POLICY, seed: int = 0) -> tuple[Retrier, InstantClock, list[Retry]]:
    clock, seen = InstantClock(), list[Retry]()
    return Retrier(policy, clock, rng=random.Random(seed), on_retry=seen.append), clock, seen


@pytest.mark.parametrize("retry_after", [None, 0.0, -30.0, 0.001, 1.0, 30.0, 600.0, 3600.0, math.inf, -math.inf, 1e308])
async def test_an_outage_without_end_is_given_up_whatever_retry_after_says(retry_after: float | None) -> None:
    retry_, clock, seen = retrier()
    outage = Outage(retry_after)
    with pytest.raises(TransientError, match=r"busy\. Given up after \d+ tr.*run the same command again") as raised:
        await retry_(outage, "ask")
    assert raised.value.status == 503
    assert 1 <= outage.tries <= POLICY.attempts
    assert clock.now() <= POLICY.total
    assert all(s.pause >= 0.5 * min(60.0, 2.0 ** (s.attempt - 1)) for s in seen)
    if retry_after in (0.0, -30.0, None, math.inf, 1e308):  # the policy's own waits, to their end
        assert clock.now() > 0.9 * POLICY.total


async def test_attempts_bound_a_clock_that_stands_still() -> None:
    class Still(InstantClock):
        async def sleep(self, seconds: float) -> None:
            return None

    outage = Outage(0.0)
    with pytest.raises(TransientError, match="Given up"):
        await Retrier(POLICY, Still())(outage, "ask")
    assert outage.tries <= POLICY.attempts


@pytest.mark.parametrize("retry_after", [20_000.0, 30 * 86_400.0])
async def test_a_pause_beyond_the_limit_parks_at_once_and_reads_well(retry_after: float) -> None:
    retry_, clock, _ = retrier()
    outage = Outage(retry_after)
    with pytest.raises(DailyLimitError, match=rf"no further request for {duration(retry_after)}\.") as raised:
        await retry_(outage, "ask")
    assert (outage.tries, clock.now()) == (1, 0.0)
    assert len(str(raised.value)) < 250


async def test_the_pause_is_the_larger_of_the_header_and_the_doubling_wait() -> None:
    retry_, _, seen = retrier()
    assert await retry_(Outage(10.0, times=8), "ask") == "answer"
    assert [s.attempt for s in seen] == list(range(1, 9))
    assert all(10.0 <= s.pause <= 11.0 for s in seen[:4])
    assert all(s.pause >= 16.0 for s in seen[5:])  # 32 s and more, spread over the upper half


async def test_pauses_are_spread_and_what_waits_is_said() -> None:
    first = {retrier(seed=seed)[0].policy.pause(3, None, spread=random.Random(seed).random()) for seed in range(20)}
    assert len(first) == 20
    assert all(2.0 <= pause <= 4.0 for pause in first)
    retry_, _, seen = retrier()
    await retry_(Outage(None, times=1), "upload a file")
    assert (seen[0].what, str(seen[0].error)) == ("upload a file", "busy.")


async def test_only_named_errors_are_repeated() -> None:
    retry_, _, seen = retrier()
    tries = count()

    async def ambiguous() -> int:
        if next(tries) == 0:
            raise AmbiguousSubmitError("no answer")
        return 1

    with pytest.raises(AmbiguousSubmitError):
        await retry_(ambiguous, "submit")
    assert not seen
    tries = count()
    assert await retry_(ambiguous, "submit", on=(TransientError, AmbiguousSubmitError)) == 1

    async def refused() -> None:
        raise RejectedError("no")

    with pytest.raises(RejectedError, match=r"^no$"):
        await retry_(refused, "submit")


def test_the_examples_of_its_docstrings() -> None:
    assert doctest.testmod(retry).failed == 0
    assert doctest.testmod(exhausted).failed == 0
