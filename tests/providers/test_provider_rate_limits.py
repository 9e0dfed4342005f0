"""Concurrency follows the provider: headers, refusals, recovery."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider_support import LONG, Server, run_config
from test_provider_prompt_logprobs import completions

from daunce_api._util.clock import InstantClock
from daunce_api.errors import TransientError
from daunce_api.providers import vllm
from daunce_api.providers.base import Metered
from daunce_api.score.slots import AdaptiveSlots, seconds_of


def remaining(requests: str, reset: str = "10s") -> dict[str, str]:
    return {"x-ratelimit-remaining-requests": requests, "x-ratelimit-reset-requests": reset}


async def test_headers_lower_the_bound_until_the_reset() -> None:
    clock = InstantClock()
    slots = AdaptiveSlots(8, clock)
    assert slots.allowed == 8
    slots.observe(remaining("3"))
    assert slots.allowed == 3
    slots.observe(remaining("0"))
    assert slots.allowed == 1
    await clock.sleep(10)
    assert slots.allowed == 8
    slots.observe(remaining("500"))
    assert slots.allowed == 8
    slots.observe({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"})
    assert slots.allowed == 1
    slots.observe({"x-ratelimit-remaining-tokens": "90", "x-ratelimit-reset-tokens": "6m0s"})
    assert slots.allowed == 1


async def test_answers_without_usable_headers_change_nothing() -> None:
    slots = AdaptiveSlots(8, InstantClock())
    for headers in ({}, remaining("many"), remaining("nan"), remaining("-3"), {"x-ratelimit-limit-requests": "1"}):
        slots.observe(headers)
        assert slots.allowed == 8


async def test_a_refusal_halves_once_a_burst_and_answers_bring_it_back() -> None:
    clock = InstantClock()
    slots = AdaptiveSlots(8, clock)
    slots.limited()
    slots.limited()
    assert slots.allowed == 4
    await clock.sleep(1)
    slots.limited()
    assert slots.allowed == 2
    answers = 0
    while slots.allowed < 8:
        slots.succeeded()
        answers += 1
    assert 20 < answers < 40
    for _ in range(100):
        await clock.sleep(1)
        slots.limited()
    assert slots.allowed == 1


async def test_a_remainder_without_a_reset_holds_for_a_moment() -> None:
    clock = InstantClock()
    slots = AdaptiveSlots(8, clock)
    slots.observe({"x-ratelimit-remaining-requests": "2"})
    assert slots.allowed == 2
    await clock.sleep(1)
    assert slots.allowed == 8


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("1h2m3s", 3723.0),
        ("1d", 86400.0),
        ("2.5", 2.5),
        ("", 0.0),
        ("soon", 0.0),
        ("1s!", 0.0),
        ("-4", 0.0),
        ("inf", 0.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == pytest.approx(seconds)


@given(
    ceiling=st.integers(1, 6),
    steps=st.lists(st.sampled_from(["ok", "429", "few", "none", "cancel"]), max_size=40),
)
def test_the_bound_holds_and_nobody_waits_for_ever(ceiling: int, steps: list[str]) -> None:
    async def run() -> None:
        clock = InstantClock()
        slots = AdaptiveSlots(ceiling, clock)
        busy = 0

        async def use(step: str) -> None:
            nonlocal busy
            async with slots.slot():
                busy += 1
                try:
                    assert busy <= ceiling
                    await asyncio.sleep(0)
                finally:
                    busy -= 1
                if step == "ok":
                    slots.succeeded()
                elif step == "429":
                    slots.limited()
                else:
                    slots.observe(remaining("1" if step == "few" else "0", "1s"))

        tasks = [asyncio.create_task(use(step)) for step in steps]
        await asyncio.sleep(0)
        for step, task in zip(steps, tasks, strict=True):
            if step == "cancel":
                task.cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30.0)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in done)

    asyncio.run(run())


async def test_whoever_waits_is_served_before_who_comes_back() -> None:
    slots = AdaptiveSlots(1, InstantClock())
    served: list[str] = []

    async def greedy() -> None:
        for _ in range(50):
            async with slots.slot():
                served.append("greedy")
                await asyncio.sleep(0)

    async def victim() -> None:
        async with slots.slot():
            served.append("victim")

    await asyncio.gather(greedy(), victim())
    assert served.index("victim") == 1


async def test_headers_of_answers_and_of_refusals_reach_the_observer() -> None:
    seen: list[Any] = []

    def handler(request: httpx2.Request) -> Any:
        if not seen:
            return httpx2.Response(429, json={"error": {"message": "slow"}}, headers=remaining("0"))
        answer = completions()(request)
        answer.headers.update(remaining("7"))
        return answer

    server = Server(handler)
    scorer = vllm.open_scorer(server.context(run_config(scorer="prompt_logprobs")))
    assert isinstance(scorer, Metered)
    scorer.watch(lambda headers: seen.append(headers["x-ratelimit-remaining-requests"]))
    with pytest.raises(TransientError) as info:
        await scorer.score("ft", [LONG])
    assert info.value.status == 429
    await scorer.score("ft", [LONG])
    assert seen == ["0", "7"]
