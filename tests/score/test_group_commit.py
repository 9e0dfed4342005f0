"""Batches that arrive while one is being written share the next transaction; each writer learns how its own fared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_scorer import ScriptedScorer, example

from daunce_api._util.clock import InstantClock
from daunce_api.errors import StoreCorruptError, StoreError
from daunce_api.providers.base import TokenScores
from daunce_api.score.client import ScoringClient
from daunce_api.score.sending import GroupCommit
from daunce_api.store import RunStore, ScoreBatch
from tests.store_rows import by_key

ONE = TokenScores((-1.0,))


def batch(member: int) -> ScoreBatch:
    return ScoreBatch(member, 0, 0, np.zeros(1, np.int32), [ONE])


class SlowStore:
    """Holds every write until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.groups: list[int] = []
        self.error: Exception | None = None

    @property
    def scores(self) -> SlowStore:
        return self

    def save(self, fingerprint: str, batches: Sequence[Any]) -> None:
        self.started.release()
        self.go.acquire()
        self.groups.append(len(batches))
        if self.error is not None:
            raise self.error


async def test_what_waits_is_written_together() -> None:
    store: Any = SlowStore()
    writer = GroupCommit(store, "f")
    saves = [asyncio.create_task(writer.save(batch(k))) for k in range(5)]
    await asyncio.to_thread(store.started.acquire)
    late = [asyncio.create_task(writer.save(batch(k))) for k in range(3)]
    store.go.release()
    await asyncio.gather(*saves)
    assert not any(task.done() for task in late)
    store.go.release()
    await asyncio.gather(*late)
    assert store.groups == [5, 3]


async def test_everybody_of_a_failed_transaction_is_told_and_the_next_one_goes_on() -> None:
    store: Any = SlowStore()
    store.error = StoreError("disk full")
    writer = GroupCommit(store, "f")
    store.go.release(2)
    results = await asyncio.gather(*(writer.save(batch(k)) for k in range(3)), return_exceptions=True)
    assert [type(r) for r in results] == [StoreError] * 3
    store.error = None
    await writer.save(batch(0))


async def test_a_cancelled_batch_is_written_all_the_same(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        store.scores.register({"key": 1})
        writer = GroupCommit(store, "f")
        tasks = [asyncio.create_task(writer.save(batch(k))) for k in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [len(by_key(store, k)) for k in range(3)] == [1, 1, 1]


async def test_no_more_batches_than_the_concurrency_are_unwritten(tmp_path: Path) -> None:
    """A kill costs at most so many answers."""
    held = SlowStore()
    scorer = ScriptedScorer(prompts=1)
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        scoring = ScoringClient(scorer, store, concurrency=3, clock=InstantClock())
        scoring.sender.writer._store = held  # type: ignore[assignment]
        task = asyncio.create_task(scoring.score_member(1, "ft", [example(str(i), [i, i]) for i in range(10)]))
        await asyncio.to_thread(held.started.acquire)
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(scorer.sent) == 3
        held.go.release(10)
        with pytest.raises(StoreCorruptError):  # nothing was really kept
            await task
    assert len(scorer.sent) == 10
