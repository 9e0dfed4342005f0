"""What becomes of a job when its process, or the server's own code, fails: no model is needed for that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daunce_api.server import ServerSettings
from daunce_api.server.channel import STORAGE_FULL, WorkerDiedError, WorkerFaultError
from daunce_api.server.scheduler import Scheduler
from daunce_api.server.state import State

DONE = {"losses": [1.0, 0.5], "trained_tokens": 10, "digest": "d"}


class Worker:
    """Answers each call with the next of a list; exceptions are raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls = 0

    async def call(self, message: dict[str, Any], listener: Any) -> Any:
        self.calls += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = State(tmp_path)
    yield opened
    opened.close()


async def finish(state: State, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run one queued job to its end and return its row."""
    monkeypatch.setattr("daunce_api.server.scheduler.STORAGE_WAIT_SECONDS", 0.0)
    base = SimpleNamespace(id="base")
    service: Any = SimpleNamespace(state=state, base=base, settings=ServerSettings(), injector=None)
    scheduler = Scheduler(service, {})
    state.insert(
        "jobs",
        id="ftjob-1",
        created_at=1,
        status="queued",
        model="base",
        training_file="file-1",
        n_epochs=1,
        batch_size=1,
        learning_rate_multiplier=1.0,
        seed=1,
    )
    scheduler._queue.put_nowait("ftjob-1")
    task = asyncio.create_task(scheduler._work(worker))  # type: ignore[arg-type]
    for _ in range(200):
        await asyncio.sleep(0)
        row = state.one("jobs", "ftjob-1")
        if row is not None and row["finished_at"] is not None:
            break
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return state.one("jobs", "ftjob-1")


async def test_one_death_is_made_good(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    row = await finish(state, Worker(WorkerDiedError(), DONE), monkeypatch)
    assert (row["status"], row["trained_tokens"], row["error"]) == ("succeeded", 10, None)
    model = state.one("models", row["fine_tuned_model"])
    assert model is not None
    assert model["train_loss"] == 0.5
    assert state.file_path(row["result_file"]).read_text().splitlines()[1:] == ["1,1.0,,,", "2,0.5,,,"]


async def test_a_second_death_fails_the_job(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(WorkerDiedError(), WorkerDiedError(), DONE)
    row = await finish(state, worker, monkeypatch)
    assert (row["status"], worker.calls) == ("failed", 2)
    assert json.loads(row["error"])["code"] == "server_error"


async def test_a_full_disk_is_waited_for(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [WorkerFaultError("No space left on device", STORAGE_FULL, None) for _ in range(5)]
    worker = Worker(*full, DONE)
    assert (await finish(state, worker, monkeypatch))["status"] == "succeeded"
    assert worker.calls == 6


async def test_an_unforeseen_failure_ends_the_job_and_says_nothing_of_it(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = await finish(state, Worker(ZeroDivisionError("training text")), monkeypatch)
    assert row["status"] == "failed"
    assert "training text" not in row["error"]


async def test_a_worker_s_fault_is_the_job_s_error(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = WorkerFaultError("training diverged", "training_diverged", "hyperparameters")
    row = await finish(state, Worker(fault), monkeypatch)
    assert json.loads(row["error"]) == {
        "code": "training_diverged",
        "message": "training diverged",
        "param": "hyperparameters",
    }
    [event] = state.rows("SELECT * FROM events WHERE level='error'")
    assert event["message"] == "training diverged"
