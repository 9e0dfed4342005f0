"""Members take turns on a server that holds only a few of them: whole members, not requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from provider_support import encoded
from test_provider_hosting import FakeHost, Inner

from daunce_api.providers.hosting import HostedScorer
from daunce_api.score.client import ScoringClient
from daunce_api.score.slots import ModelLeases
from daunce_api.store import RunStore

EXAMPLES = [encoded([1, 2, 3 + i], [2], f"e{i}") for i in range(6)]


async def test_every_member_is_loaded_once_however_many_are_ready(tmp_path: Path) -> None:
    for limit in (1, 2):
        host = FakeHost(limit)
        scorer = HostedScorer(Inner(host), host)
        assert scorer.capabilities.max_models == limit
        with RunStore.create_or_open(tmp_path / str(limit), {"config": {}}) as store:
            async with scorer:
                client = ScoringClient(scorer, store, concurrency=4)

                async def member(number: int, client: ScoringClient = client) -> None:
                    await client.score_member(number, f"m{number}", EXAMPLES, twice=EXAMPLES[:2])

                await asyncio.gather(*(member(i) for i in range(5)))
        assert sorted(host.loads) == [f"m{i}" for i in range(5)]


@given(
    limit=st.integers(1, 3),
    asked=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=20),
)
def test_the_limit_holds_and_everybody_gets_a_turn(limit: int, asked: list[tuple[str, bool]]) -> None:
    async def run() -> None:
        leases = ModelLeases(limit)
        working: list[str] = []

        async def use(model: str) -> None:
            for _ in range(2):
                async with leases.lease(model):
                    working.append(model)
                    assert len(set(working)) <= limit
                    try:
                        await asyncio.sleep(0)
                    finally:
                        working.remove(model)

        tasks = [asyncio.create_task(use(model)) for model, _ in asked]
        await asyncio.sleep(0)
        for task, (_, cancelled) in zip(tasks, asked, strict=True):
            if cancelled:
                task.cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in done)
        assert not working

    asyncio.run(run())


async def test_without_a_limit_nobody_waits() -> None:
    leases = ModelLeases(None)
    async with leases.lease("a"), leases.lease("b"), leases.lease("a"):
        pass
