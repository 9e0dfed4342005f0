"""The life of a job: validating_files, queued, running, then succeeded, failed or cancelled.

Jobs run in the order of their creation, ``workers`` at a time, each in a process of its own. What a server was doing
when it ended is done again from its start by the next one: training is deterministic, so nothing changes by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import shutil
import sqlite3
from collections.abc import Mapping
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
MAX_STARTS = 2
"""A job whose process dies is started once more, then it fails."""


class Scheduler:
    """Validates and trains in the background of the event loop."""

    def __init__(self, service: Service, hello: Mapping[str, Any]) -> None:
        self._service = service
        self._state = service.state
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._validating = asyncio.Semaphore(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers = [Worker(hello) for _ in range(service.settings.workers)]
        self._running: dict[str, Worker] = {}

    def start(self) -> None:
        """Take up the jobs that an earlier server left, then wait for new ones."""
        for job in self._state.unfinished_jobs():
            if job["status"] == "running":
                if job["fault"] == "job_stuck":
                    continue
                self._state.update_job(job["id"], status="queued", estimated_finish=None)
                self._state.event(job["id"], "The server was restarted; the job starts again")
            self.add(job["id"])
        for worker in self._workers:
            self._spawn(self._work(worker))

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
        self._spawn(self._validate(job))

    async def cancel(self, job: str) -> None:
        """Mark a job cancelled and have its process stop at its next step."""
        row = self._state.one("jobs", job)
        if row is None or not self._finish(job, "cancelled"):
            return
        self._state.event(job, "The job was cancelled")
        self._state.drop_unused_bytes(row["training_file"])
        worker = self._running.get(job)
        if worker is not None:
            await worker.tell({"op": "stop", "id": 0, "job": job})

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _validate(self, job: str) -> None:
        async with self._validating:
            row = self._job(job)
            while True:
                try:
                    if await self._is_valid(row) and self._state.update_job(job, status="queued"):
                        if row["status"] == "validating_files":
                            self._state.event(job, "Files validated, moving job to queued state")
                        self._queue.put_nowait(job)
                    return
                except (sqlite3.OperationalError, OSError) as error:
                    log.error("job %s: the state folder cannot be written: %s", job, error)
                    await asyncio.sleep(STORAGE_WAIT_SECONDS)

    async def _is_valid(self, row: Row) -> bool:
        path, base = self._state.file_path(row["training_file"]), self._service.base
        try:
            await asyncio.to_thread(read_training_file, path, self._service.tokenizer, base.max_context)
        except TrainingFileError as error:
            self._fail(row, error.code, error.message, "training_file")
            return False
        except (sqlite3.OperationalError, OSError):
            raise
        except Exception as error:
            log.error("job %s: validating the file: %s", row["id"], type(error).__name__)
            self._fail(row, "invalid_training_file", "The training file cannot be read.", "training_file")
            return False
        return True

    async def _work(self, worker: Worker) -> None:
        while True:
            row = self._job(await self._queue.get())
            if row["status"] not in ("queued", "running"):
                continue
            try:
                await self._run(worker, row)
            except (sqlite3.OperationalError, OSError) as error:
                # A full disk: the job, queued or running, is started again until there is room.
                log.error("job %s: the state folder cannot be written: %s", row["id"], error)
                await asyncio.sleep(STORAGE_WAIT_SECONDS)
                self._queue.put_nowait(row["id"])
            except Exception as error:
                log.error("job %s: %s", row["id"], type(error).__name__)
                self._fail(row, "server_error", "The job failed due to an internal error.", None)
            finally:
                self._running.pop(row["id"], None)

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
        if not done:
            state.file_path(result_file).unlink(missing_ok=True)
        state.drop_unused_bytes(row["training_file"])


async def _start_quietly(worker: Worker) -> None:
    with contextlib.suppress(DaunceError, OSError):
        await worker.start()
