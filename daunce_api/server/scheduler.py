"""The life of a job: validating_files, queued, running, then succeeded, failed or cancelled.

Validated jobs run in the order of their creation, ``workers`` at a time, each in a process of its own. Work that a
server had in progress when it ended is done again by the next one: training is deterministic, so nothing changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import shutil
import sqlite3
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from ..errors import DaunceError
from .channel import STORAGE_FULL, Message, Worker, WorkerDiedError, WorkerFaultError
from .job_run import Training, result_csv
from .service import Service
from .state import Row, new_id, now
from .training_data import TrainingFileError, read_training_file

log = logging.getLogger("daunce_api.server")

STORAGE_WAIT_SECONDS = 1.0
VALIDATED_AT_ONCE = 4
"""Files read at once, so that one that takes long holds up no other job."""
MAX_STARTS = 2
"""A job whose process dies is started once more, then it fails."""


class Scheduler:
    """Validates and trains in the background of the event loop."""

    def __init__(self, service: Service, hello: Mapping[str, Any]) -> None:
        self._service = service
        self._state = service.state
        self._queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self._validating = asyncio.Semaphore(VALIDATED_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers = [Worker(hello) for _ in range(service.settings.workers)]
        self._lanes: list[asyncio.Task[None]] = []
        self._running: dict[str, Worker] = {}
        self._validations: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Take up the jobs that an earlier server left, then wait for new ones."""
        for job in self._state.unfinished_jobs():
            if job["status"] == "running":
                if job["fault"] == "job_stuck":
                    continue
                self._state.update_job(job["id"], status="queued", estimated_finish=None)
                self._state.event(job["id"], "The server was restarted; the job starts again")
            self.add(job["id"])
        self._lanes = [self._spawn(self._work(worker)) for worker in self._workers]

    def warm(self) -> None:
        """Start the processes that will be needed soon; a start that fails is reported by the job that needs it."""
        for worker in self._workers:
            self._spawn(_start_quietly(worker))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(w.close() for w in self._workers))

    def add(self, job: str) -> None:
        """Validate a job's file, then queue the job."""
        task = self._validations[job] = self._spawn(self._validate(job))
        task.add_done_callback(lambda _: self._validations.pop(job, None))

    @property
    def lanes(self) -> int:
        """Lanes that take jobs; fewer than ``settings.workers`` means that one has ended, which is a bug."""
        return sum(not lane.done() for lane in self._lanes)

    async def cancel(self, job: str) -> None:
        """Mark a job cancelled and have its process stop at its next step."""
        row = self._state.one("jobs", job)
        if row is None or not self._finish(job, "cancelled"):
            return
        self._state.event(job, "The job was cancelled")
        self._state.drop_unused_bytes(row["training_file"])
        validation = self._validations.get(job)
        if validation is not None:
            validation.cancel()
        worker = self._running.get(job)
        if worker is not None:
            await worker.tell({"op": "stop", "id": 0, "job": job})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _validate(self, job: str) -> None:
        async with self._validating:
            while True:
                try:
                    row = self._job(job)
                    if await self._is_valid(row) and self._state.update_job(job, status="queued"):
                        if row["status"] == "validating_files":
                            self._state.event(job, "Files validated, moving job to queued state")
                        self._queue.put_nowait((row["seq"], job))
                    return
                except (sqlite3.Error, OSError) as error:
                    await self._wait_for_storage(job, error)

    async def _is_valid(self, row: Row) -> bool:
        path, base = self._state.file_path(row["training_file"]), self._service.base
        try:
            await asyncio.to_thread(read_training_file, path, self._service.tokenizer, base.max_context)
        except TrainingFileError as error:
            self._fail(row, error.code, error.message, "training_file")
            return False
        except (sqlite3.Error, OSError):
            raise
        except Exception as error:
            log.error("job %s: validating the file: %s", row["id"], type(error).__name__)
            self._fail(row, "invalid_training_file", "The training file cannot be read.", "training_file")
            return False
        return True

    async def _work(self, worker: Worker) -> None:
        while True:
            place, job = await self._queue.get()
            try:
                row = self._job(job)
                if row["status"] in ("queued", "running"):
                    await self._run_or_fail(worker, row)
            except (sqlite3.Error, OSError) as error:
                # A full disk: the job, queued or running, is started again until there is room.
                await self._wait_for_storage(job, error)
                self._queue.put_nowait((place, job))
            except Exception as error:  # a lane that ended would leave every later job queued for ever
                log.error("job %s: %s", job, type(error).__name__)
            finally:
                self._running.pop(job, None)

    async def _run_or_fail(self, worker: Worker, row: Row) -> None:
        try:
            await self._run(worker, row)
        except (sqlite3.Error, OSError):
            raise
        except Exception as error:
            log.error("job %s: %s", row["id"], type(error).__name__)
            self._fail(row, "server_error", "The job failed due to an internal error.", None)

    async def _wait_for_storage(self, job: str, error: Exception) -> None:
        log.error("job %s: the state folder cannot be read or written: %s", job, error)
        await asyncio.sleep(STORAGE_WAIT_SECONDS)

    async def _run(self, worker: Worker, row: Row) -> None:
        job = row["id"]
        start_from = self._start_from(row)
        if row["model"] != self._service.base.id and start_from is None:
            self._fail(row, "model_not_found", f"The model {row['model']} was deleted before the job ran.", "model")
            return
        self._state.update_job(job, status="running")
        if row["fault"] == "job_stuck":
            return
        self._state.event(job, "Fine-tuning job started")
        if row["fault"] == "job_failure":
            self._fail(row, "server_error", "The job failed due to an internal error.", None)
            return
        self._running[job] = worker
        training = Training(self._service, row)
        for start in range(1, MAX_STARTS + 1):
            try:
                # A cancellation reaches the process only once it runs: start it, then look again.
                await worker.start()
                if self._job(job)["status"] == "cancelled":
                    return
                answer = await worker.call(training.request(start_from), training.progress)
                break
            except WorkerDiedError:
                if start == MAX_STARTS:
                    self._fail(row, "server_error", "The process that trained the job ended unexpectedly.", None)
                    return
            except WorkerFaultError as fault:
                if fault.code == STORAGE_FULL:
                    raise OSError(errno.ENOSPC, fault.message) from None
                self._fail(row, fault.code, fault.message[:2000], fault.param)
                return
            except DaunceError as error:
                self._fail(row, "server_error", str(error)[:2000], None)
                return
        if not answer.get("stopped"):
            self._succeed(row, training, answer)
        if self._job(job)["status"] == "cancelled":
            self._discard_adapters(job)

    def _job(self, job: str) -> Row:
        row = self._state.one("jobs", job)
        if row is None:
            raise KeyError(job)
        return row

    def _start_from(self, row: Row) -> Path | None:
        model = self._state.one("models", row["model"])
        return None if model is None else self._state.adapter_path(model)

    def _finish(self, job: str, status: str, **values: Any) -> bool:
        return self._state.update_job(job, status=status, finished_at=now(), estimated_finish=None, **values)

    def _fail(self, row: Row, code: str, message: str, param: str | None) -> None:
        error = json.dumps({"code": code, "message": message, "param": param})
        with self._state.transaction():
            if self._finish(row["id"], "failed", error=error):
                self._state.event(row["id"], message, level="error")
        self._state.drop_unused_bytes(row["training_file"])
        self._discard_adapters(row["id"])

    def _discard_adapters(self, job: str) -> None:
        self._state.delete_models(self._state.models_of_job(job))
        shutil.rmtree(self._state.adapters_dir / job, ignore_errors=True)

    def _succeed(self, row: Row, training: Training, answer: Message) -> None:
        job, state = row["id"], self._state
        model = training.model_name()
        result = result_csv(answer["losses"])
        result_file = new_id("file")
        state.file_path(result_file).write_bytes(result)
        with state.transaction():
            done = self._finish(
                job,
                "succeeded",
                fine_tuned_model=model,
                trained_tokens=answer["trained_tokens"],
                result_file=result_file,
            )
            if done:
                state.insert(
                    "models",
                    id=model,
                    job=job,
                    base=self._service.base.id,
                    created_at=now(),
                    adapter=training.adapter,
                    fingerprint=answer["digest"],
                    train_loss=answer["losses"][-1],
                )
                state.insert(
                    "files",
                    id=result_file,
                    filename="step_metrics.csv",
                    bytes=len(result),
                    purpose="fine-tune-results",
                    created_at=now(),
                )
                state.event(job, f"New fine-tuned model created: {model}")
                state.event(job, "The job has successfully completed")
        self._service.born(model)
        if not done:
            state.file_path(result_file).unlink(missing_ok=True)
        state.drop_unused_bytes(row["training_file"])


async def _start_quietly(worker: Worker) -> None:
    with contextlib.suppress(DaunceError, OSError):
        await worker.start()
