"""The scoring client under many connections for a long time: flat memory, and every answer belongs to its question."""

from __future__ import annotations

import asyncio
import gc
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.base import ScorerCapabilities, TokenScores
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire.client import WireClient
from daunce_api.providers.openai_wire.echo import EchoOptions, EchoScorer
from daunce_api.score.client import ScoringClient
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore
from tests.store_rows import by_key

CONNECTIONS = 64
EXAMPLES = 512
MODEL = "daunce-tiny"


@dataclass
class Load:
    """What a load test came to; memory is resident MiB of (server with its processes, client)."""

    answers: int
    requests: int
    rounds: int
    seconds: float
    settled: tuple[int, int]
    end: tuple[int, int]

    @property
    def growth(self) -> tuple[int, int]:
        return self.end[0] - self.settled[0], self.end[1] - self.settled[1]

    def text(self) -> str:
        return (
            f"{self.answers} answers in {self.requests} requests over {CONNECTIONS} connections in {self.seconds:.0f} "
            f"s, none lost or crossed; resident MiB of server and client after a quarter of the time {self.settled}, "
            f"at the end {self.end}"
        )


def load(server: EmbeddedServer, seconds: float) -> Load:
    """Score the same distinct examples again and again, each time in another order and other batches.

    Every round must give every example the bits that it had when it was asked alone. Raises AssertionError.
    """
    return asyncio.run(_load(server, seconds))


async def _load(server: EmbeddedServer, seconds: float) -> Load:
    draw = random.Random(0)
    examples = [_example(i, draw) for i in range(EXAMPLES)]
    options = EchoOptions(return_token_ids=True, concurrency=CONNECTIONS, prompts_per_request=4, logprobs=0)
    capabilities = ScorerCapabilities(
        provider="load", scope="any", max_prompts_per_request=4, max_concurrent_requests=CONNECTIONS
    )
    client = WireClient.open(Endpoint(server.base_url, server.api_key, "the server"), timeout=300, most=CONNECTIONS)
    begin = time.monotonic()
    answers = rounds = requests = 0
    settled: tuple[int, int] | None = None
    async with EchoScorer(client, capabilities, options) as scorer:
        alone = await _alone(scorer, examples[:64])
        known: dict[str, TokenScores] = {}
        with tempfile.TemporaryDirectory() as folder, RunStore.create_or_open(folder, {}) as store:
            while time.monotonic() < begin + seconds or rounds < 3:
                scoring = ScoringClient(scorer, store, concurrency=CONNECTIONS)
                # Member 0 is the one whose endpoint is probed; members here only keep rounds apart.
                shuffled = [_shuffled(e, draw) for e in draw.sample(examples, len(examples))]
                assert await scoring.score_member(1, MODEL, shuffled) == len(examples)
                found = by_key(store, 1)
                assert found.keys() == {e.key for e in examples}
                for key, scores in found.items():
                    assert known.setdefault(key, scores) == scores, "an answer changed from one round to the next"
                store.scores.set_aside([1], "the next round", suspect=False)
                answers += len(found)
                requests += scoring.sender.requests
                rounds += 1
                if settled is None and time.monotonic() > begin + seconds / 4:
                    settled = _memory(server)
        for key, scores in alone.items():
            assert known[key] == scores, "an answer beside others differs from the one alone"
        assert len(set(known.values())) > 0.99 * EXAMPLES, "questions are too alike to tell their answers apart"
    return Load(answers, requests, rounds, time.monotonic() - begin, settled or _memory(server), _memory(server))


async def _alone(scorer: EchoScorer, examples: list[EncodedExample]) -> dict[str, TokenScores]:
    return {example.key: (await scorer.score(MODEL, [example]))[0] for example in examples}


def _example(number: int, draw: random.Random) -> EncodedExample:
    ids = tuple(draw.randrange(5, 900) for _ in range(draw.randrange(4, 24)))
    return EncodedExample(Example(f"e{number}", prompt="p", completion="c"), ids, tuple(range(2, len(ids))))


def _shuffled(example: EncodedExample, draw: random.Random) -> EncodedExample:
    """The same question under another id, so that nothing can be told by names."""
    name = Example(f"x{draw.randrange(10**9)}", prompt="p", completion="c")
    return EncodedExample(name, example.ids, example.targets)


def _memory(server: EmbeddedServer) -> tuple[int, int]:
    gc.collect()
    process = psutil.Process(server.pid)
    family = [process, *process.children(recursive=True)]
    return sum(p.memory_info().rss for p in family) >> 20, psutil.Process().memory_info().rss >> 20


def load_alone(folder: Path, seconds: float) -> Load:
    """:func:`load` against a server of its own."""
    from daunce_api.server import ServerSettings

    with EmbeddedServer(ServerSettings(state_dir=folder, requests_per_minute=10_000_000)) as server:
        return load(server, seconds)
