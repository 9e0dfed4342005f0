"""Members take turns on a server that holds only a few of them: whole members, not requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

from provider_support import encoded
from test_provider_hosting import FakeHost, Inner

from daunce_api.providers.hosting import HostedScorer
from daunce_api.score.client import ScoringClient
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
