"""What becomes of a job when its process, or the server's own code, fails: no model is needed for that."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daunce_api.errors import RejectedError, TrainingCancelledError
from daunce_api.providers.local.engines import WorkerLostError
from daunce_api.server.scheduler import VALIDATED_AT_ONCE, Scheduler
from daunce_api.server.state import State
from daunce_api.server.worker import Step, Trained

DONE = Trained(losses=(1.0, 0.5), trained_tokens=10, folder=Path("final"), digest="d")


class Worker:
    """Answers each job with the next of a list; exceptions are raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls = self.stops = 0

    def stop(self) -> None:
        self.stops += 1

    async def call(self, function: Any, *arguments: Any, on_report: Any = None) -> Any:
        self.calls += 1
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(on_report)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = State(tmp_path)
    yield opened
    opened.close()


def scheduler_of(state: State, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A scheduler without processes, and one queued job."""
    monkeypatch.setattr("daunce_api.server.scheduler.STORAGE_WAIT_SECONDS", 0.0)
    base = SimpleNamespace(id="base", max_context=64)
    scheduler = Scheduler(state, base, None, [], lambda identity: None)  # type: ignore[arg-type]
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
    scheduler._queue.put_nowait((1, "ftjob-1"))
    return scheduler


async def finish(state: State, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run one queued job to its end and return its row."""
    scheduler = scheduler_of(state, monkeypatch)
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
    row = await finish(state, Worker(WorkerLostError("lost"), DONE), monkeypatch)
    assert (row["status"], row["trained_tokens"], row["error"]) == ("succeeded", 10, None)
    model = state.one("models", row["fine_tuned_model"])
    assert model is not None
    assert model["train_loss"] == 0.5
    assert state.file_path(row["result_file"]).read_text().splitlines()[1:] == ["1,1.0,,,", "2,0.5,,,"]


async def test_a_second_death_fails_the_job(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(WorkerLostError("lost"), WorkerLostError("lost"), DONE)
    row = await finish(state, worker, monkeypatch)
    assert (row["status"], worker.calls) == ("failed", 2)
    assert json.loads(row["error"])["code"] == "server_error"


async def test_a_full_disk_is_waited_for(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [OSError(errno.ENOSPC, "No space left on device") for _ in range(5)]
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
    row = await finish(state, Worker(RejectedError("training diverged")), monkeypatch)
    assert json.loads(row["error"]) == {
        "code": "training_diverged",
        "message": "training diverged",
        "param": "hyperparameters",
    }
    [event] = state.rows("SELECT * FROM events WHERE level='error'")
    assert event["message"] == "training diverged"


async def test_a_lane_outlives_errors_around_a_job(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a database error while the job is read nor a failure to write its end leaves the queue without a lane."""
    one, failures = state.one, [sqlite3.OperationalError("disk I/O error"), sqlite3.DatabaseError("malformed")]

    def failing(table: Any, identity: str) -> Any:
        if table == "jobs" and failures:
            raise failures.pop()
        return one(table, identity)

    monkeypatch.setattr(state, "one", failing)
    scheduler = scheduler_of(state, monkeypatch)
    lane = asyncio.create_task(scheduler._work(Worker(DONE)))  # type: ignore[arg-type]
    scheduler._lanes.append(lane)
    for _ in range(200):
        await asyncio.sleep(0)
    assert one("jobs", "ftjob-1")["status"] == "succeeded"  # type: ignore[index]
    assert scheduler.lanes == 1
    lane.cancel()
    await asyncio.gather(lane, return_exceptions=True)
    assert scheduler.lanes == 0


async def test_a_job_cancelled_while_it_trains_is_stopped(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """However early the cancellation arrives, before the process had started too: a step of a job that is over stops it
    again."""

    def cancelled(on_report: Any) -> Exception:
        scheduler.cancel(state.job("ftjob-1"))
        on_report(Step(1, 2, 0.5))
        return TrainingCancelledError("stopped")

    worker, scheduler = Worker(cancelled), scheduler_of(state, monkeypatch)
    task = asyncio.create_task(scheduler._work(worker))  # type: ignore[arg-type]
    for _ in range(50):
        await asyncio.sleep(0)
    task.cancel()
    assert (state.job("ftjob-1")["status"], worker.calls, worker.stops) == ("cancelled", 1, 2)
    assert not [e for e in state.rows("SELECT * FROM events") if e["type"] == "metrics"]


async def test_cancelling_ends_a_validation_that_takes_long(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = threading.Event()
    monkeypatch.setattr("daunce_api.server.scheduler.read_training_file", lambda *_: reading.wait(20))
    scheduler = scheduler_of(state, monkeypatch)
    state.update_job("ftjob-1", status="validating_files")
    scheduler.add("ftjob-1")
    await asyncio.sleep(0.01)
    scheduler.cancel(state.job("ftjob-1"))
    await asyncio.sleep(0.01)
    assert not scheduler._validations
    assert scheduler._validating._value == VALIDATED_AT_ONCE
    reading.set()


def test_the_end_of_the_server_waits_for_no_validation(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    over, read_to_the_end = threading.Event(), threading.Event()

    def read(*_: Any) -> None:
        loop.call_soon_threadsafe(reading.set)
        over.wait(30)
        read_to_the_end.set()

    async def serve() -> None:
        scheduler = scheduler_of(state, monkeypatch)
        scheduler.add("ftjob-1")
        await reading.wait()
        await scheduler.close()

    monkeypatch.setattr("daunce_api.server.scheduler.read_training_file", read)
    reading = asyncio.Event()
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        runner.run(serve())
    assert not read_to_the_end.is_set()
    over.set()
