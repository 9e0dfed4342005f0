"""Many clients for a long time: flat memory on both sides, and every answer belongs to its question.

``DAUNCE_LOAD_SECONDS`` sets how long (default 1; the long form is 600), and every client asks a few times at least.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from itertools import count
from typing import Any

import psutil
import pytest

from daunce_api.server import EmbeddedServer

from .conftest import MODEL, connect_async

CONNECTIONS = 64
TURNS = 4
SECONDS = float(os.environ.get("DAUNCE_LOAD_SECONDS", "1"))
ALLOWED_GROWTH = 30 * 2**20


def _memory(server: EmbeddedServer) -> tuple[int, int]:
    """Resident bytes of the server with its processes, and of this one."""
    gc.collect()
    process = psutil.Process(server.pid)
    family = [process, *process.children(recursive=True)]
    return sum(p.memory_info().rss for p in family), psutil.Process().memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
async def test_memory_is_flat_and_answers_are_not_crossed(server: EmbeddedServer, fine_tune: Any) -> None:
    client = connect_async(server, timeout=300)
    models = [MODEL, fine_tune.fine_tuned_model]
    known: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    asked = 0
    begin = time.monotonic()
    baseline: list[tuple[int, int]] = []

    async def one(worker: int) -> None:
        nonlocal asked
        draw = random.Random(worker)
        for turn in count():
            if turn >= TURNS and time.monotonic() > begin + SECONDS:
                return
            model = draw.choice(models)
            prompts = [[draw.randrange(5, 200), *([worker + 300] * draw.randrange(3))] for _ in range(2)]
            answer = await client.completions.create(
                model=model,
                prompt=prompts,
                echo=True,
                logprobs=1,
                max_tokens=0,
                extra_body={"return_token_ids": True},
            )
            assert answer.model == model
            for prompt, choice in zip(prompts, answer.choices, strict=True):
                values = choice.logprobs.token_logprobs if choice.logprobs else None
                assert choice.to_dict()["prompt_token_ids"] == prompt
                assert known.setdefault((model, tuple(prompt)), list(values or ())) == values
            asked += 1
            if not baseline and asked > CONNECTIONS and time.monotonic() > begin + SECONDS / 4:
                baseline.append(_memory(server))

    await asyncio.gather(*(one(w) for w in range(CONNECTIONS)))
    after = _memory(server)
    await client.close()
    elapsed = time.monotonic() - begin
    print(f"{asked} requests in {elapsed:.0f} s; resident MiB server, client: ", end="")
    print([[b >> 20 for b in pair] for pair in (baseline[0], after)])
    assert after[0] - baseline[0][0] < ALLOWED_GROWTH
    assert after[1] - baseline[0][1] < ALLOWED_GROWTH
