"""How much the scoring client costs beside a bare loop over the SDK, and what the store costs.

    pytest -o addopts= tests/benchmarks/scoring_client.py

Both sides send the same requests (token-id prompts, echo) to a server in this process that answers at once, with the
same number of requests at a time. The bare loop is ``AsyncOpenAI`` with a semaphore; the scoring client also checks
every answer and writes every batch to the store with a full sync. Figures go to ``benchmark.extra_info``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire.client import WireClient
from daunce_api.providers.openai_wire.echo import EchoOptions, EchoScorer
from daunce_api.score.client import ScoringClient, batches
from daunce_api.store import RunStore
from tests.store_rows import put

EXAMPLES, TOKENS, COMPLETION, CONCURRENCY, ROUNDS = 1024, 48, 24, 8, 5


def examples() -> list[EncodedExample]:
    draw = random.Random(0)
    made = []
    for i in range(EXAMPLES):
        ids = tuple(draw.randrange(4096) for _ in range(TOKENS))
        targets = tuple(range(TOKENS - COMPLETION, TOKENS))
        made.append(EncodedExample(Example(str(i), prompt="p", completion="c"), ids, targets))
    return made


class InstantServer(httpx2.AsyncBaseTransport):
    """Answers completions without a pause; the answer of each batch size is made beforehand."""

    def __init__(self) -> None:
        self.requests = 0
        self._answers: dict[int, bytes] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests += 1
        prompts = request.content.count(b"],[") + 1
        if prompts not in self._answers:
            self._answers[prompts] = json.dumps(_answer(prompts)).encode()
        return httpx2.Response(200, content=self._answers[prompts], headers={"content-type": "application/json"})


def _answer(prompts: int) -> dict[str, Any]:
    draw = random.Random(prompts)
    choices = []
    for index in range(prompts):
        values = [-draw.random() * 8 for _ in range(TOKENS)]
        logprobs = {
            "tokens": ["token"] * TOKENS,
            "token_logprobs": values,
            "top_logprobs": [{"top": value / 2} for value in values],
            "text_offset": [0] * TOKENS,
        }
        choices.append({"index": index, "text": "", "finish_reason": "length", "logprobs": logprobs})
    return {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "ft", "choices": choices}


async def bare_loop(items: list[EncodedExample], prompts: int) -> int:
    server = InstantServer()
    slots = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(
        api_key="k", base_url="http://server.test/v1", http_client=httpx2.AsyncClient(transport=server)
    ) as sdk:

        async def send(chunk: list[list[int]]) -> None:
            async with slots:
                await sdk.completions.create(
                    model="ft", prompt=chunk, echo=True, logprobs=1, max_tokens=0, temperature=0
                )

        ids = [[list(e.ids) for _, e in batch] for batch in batches([("", e) for e in items], prompts, None)]
        await asyncio.gather(*(send(chunk) for chunk in ids))
    return server.requests


async def scoring_client(items: list[EncodedExample], prompts: int, run_dir: Path) -> int:
    server = InstantServer()
    options = EchoOptions(prompts_per_request=prompts, tokens_per_request=10**9)
    wire = WireClient.open(Endpoint("http://server.test/v1"), http_client=httpx2.AsyncClient(transport=server))
    with RunStore.create_or_open(run_dir, {"config": {}}) as store:
        async with EchoScorer(wire, options.capabilities("instant"), options) as scorer:
            await ScoringClient(scorer, store, concurrency=CONCURRENCY).score_member(1, "ft", items)
    return server.requests


def _seconds(run: Callable[[], Awaitable[int]]) -> tuple[float, int]:
    start = time.perf_counter()
    requests = asyncio.run(run())  # type: ignore[arg-type]
    return time.perf_counter() - start, requests


@pytest.mark.parametrize("prompts", [1, 16])
def test_requests_per_second_beside_a_bare_loop(prompts: int, tmp_path: Path, benchmark: Any) -> None:
    items = examples()[: 256 if prompts == 1 else EXAMPLES]
    folders = itertools.count()
    bare, ours = [], []
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        seconds, requests = _seconds(lambda: bare_loop(items, prompts))
        bare.append(requests / seconds)
        seconds, requests = _seconds(lambda: scoring_client(items, prompts, tmp_path / str(next(folders))))
        ours.append(requests / seconds)
    benchmark.extra_info["bare_requests_per_second"] = statistics.median(bare)
    benchmark.extra_info["client_requests_per_second"] = statistics.median(ours)
    benchmark.extra_info["ratio"] = statistics.median(ours) / statistics.median(bare)
    benchmark.pedantic(lambda: asyncio.run(scoring_client(items, prompts, tmp_path / str(next(folders)))), rounds=3)
    print(f"\n{prompts} prompts a request: {benchmark.extra_info}")


def test_store_overhead_per_thousand_examples(tmp_path: Path, benchmark: Any) -> None:
    from daunce_api.providers.base import TokenScores

    items = examples()[:1000]
    keyed = [(e.key, TokenScores(tuple(-0.1 * t for t in e.targets))) for e in items]
    folders = itertools.count()

    def save() -> None:
        with RunStore.create_or_open(tmp_path / str(next(folders)), {"config": {}}) as store:
            for start in range(0, len(keyed), 16):
                put(store, 0, 0, "f", dict(keyed[start : start + 16]))

    benchmark.pedantic(save, rounds=ROUNDS)
    benchmark.extra_info["milliseconds_per_1000_examples"] = benchmark.stats["median"] * 1000
    print(f"\nstore, batches of 16: {benchmark.extra_info}")
