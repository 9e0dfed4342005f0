"""The life of a job: validating_files, queued, running, then succeeded, failed or cancelled.

Jobs run in the order of their creation, ``workers`` at a time, each in a process of its own. What a server was doing
when it ended is done again from its start by the next one: training is deterministic, so nothing changes by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import io
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DaunceError
from .channel import STORAGE_FULL, Message, Worker, WorkerDiedError, WorkerFaultError
from .service import Service
from .settings import BASE_LEARNING_RATE
from .state import Row, new_id, now
from .training_data import TrainingFileError, read_training_file

log = logging.getLogger("daunce_api.server")

KEPT_CHECKPOINTS = 3
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
        row = self._job(job)
        async with self._validating:
            try:
                path = self._state.file_path(row["training_file"])
                base = self._service.base
                await asyncio.to_thread(read_training_file, path, self._service.tokenizer, base.max_context)
            except TrainingFileError as error:
                self._fail(row, error.code, error.message, "training_file")
                return
            except Exception as error:
                log.error("validating a file: %s", type(error).__name__)
                self._fail(row, "invalid_training_file", "The training file cannot be read.", "training_file")
                return
        if self._state.update_job(job, status="queued"):
            if row["status"] == "validating_files":
                self._state.event(job, "Files validated, moving job to queued state")
            self._queue.put_nowait(job)

    async def _work(self, worker: Worker) -> None:
        while True:
            row = self._job(await self._queue.get())
            if row["status"] != "queued":
                continue
            try:
                await self._run(worker, row)
            except (sqlite3.OperationalError, OSError) as error:
                # A full disk: the job waits in the queue until the state can be written again.
                log.error("job %s: the state folder cannot be written: %s", row["id"], error)
                await asyncio.sleep(STORAGE_WAIT_SECONDS)
                self._queue.put_nowait(row["id"])
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
        training = _Training(self._service, row)
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
                    self._state.update_job(job, status="queued", estimated_finish=None)
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

    def _succeed(self, row: Row, training: _Training, answer: Message) -> None:
        job, state = row["id"], self._state
        model = training.model_name()
        result = _result_csv(answer["losses"])
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


class _Training:
    """One run of one job in a worker: what is asked for, and what its progress writes."""

    def __init__(self, service: Service, row: Row) -> None:
        self._service, self._state, self._row = service, service.state, row
        self.job = str(row["id"])
        self.adapter = f"{self.job}/final"
        self._started = time.monotonic()
        self._step = 0
        self._loss = 0.0

    def request(self, start_from: Path | None) -> dict[str, Any]:
        """The message to the worker. What an earlier start left is removed first."""
        self._state.delete_models(self._state.models_of_job(self.job))
        self.discard()
        self._started = time.monotonic()
        row = self._row
        return {
            "op": "train",
            "job": self.job,
            "file": str(self._state.file_path(row["training_file"])),
            "settings": {
                "n_epochs": row["n_epochs"],
                "batch_size": row["batch_size"],
                "learning_rate": BASE_LEARNING_RATE * row["learning_rate_multiplier"],
            },
            "seed": row["seed"],
            "out": str(self._state.adapters_dir / self.adapter),
            "start_from": None if start_from is None else str(start_from),
        }

    def discard(self) -> None:
        shutil.rmtree(self._state.adapters_dir / self.job, ignore_errors=True)

    def model_name(self, step: int | None = None) -> str:
        """``ft:BASE:daunce:SUFFIX:ID``; a checkpoint's ends in ``:ckpt-step-N``."""
        name = f"ft:{self._service.base.id}:daunce:{self._row['suffix'] or ''}:{self.job.removeprefix('ftjob-')[:12]}"
        return name if step is None else f"{name}:ckpt-step-{step}"

    def progress(self, message: Message) -> None:
        """A ``step`` or ``checkpoint`` message of the worker."""
        try:
            with self._state.transaction():
                if message["event"] == "step":
                    self._on_step(message)
                else:
                    self._on_checkpoint(message)
        except sqlite3.OperationalError as error:
            # Progress is worth less than the job: it goes on, and its end is written or the job done again.
            log.error("job %s: progress cannot be written: %s", self.job, error)

    def _on_step(self, message: Message) -> None:
        self._step, self._loss, total = message["step"], message["loss"], message["total"]
        remaining = (time.monotonic() - self._started) / self._step * (total - self._step)
        self._state.update_job(self.job, estimated_finish=now() + round(remaining))
        self._state.event(
            self.job,
            f"Step {self._step}/{total}: training loss={self._loss:.2f}",
            type="metrics",
            data={"step": self._step, "total_steps": total, "train_loss": self._loss},
        )

    def _on_checkpoint(self, message: Message) -> None:
        path = Path(message["path"])
        self._state.insert(
            "models",
            id=self.model_name(self._step),
            checkpoint_id=new_id("ftckpt"),
            job=self.job,
            base=self._service.base.id,
            created_at=now(),
            adapter=f"{self.job}/{path.name}",
            fingerprint=message["digest"],
            step=self._step,
            train_loss=self._loss,
        )
        self._state.event(self.job, f"Checkpoint created at step {self._step}")
        checkpoints = [m for m in self._state.models_of_job(self.job) if m["step"] is not None]
        self._state.delete_models(checkpoints[:-KEPT_CHECKPOINTS])


async def _start_quietly(worker: Worker) -> None:
    with contextlib.suppress(DaunceError, OSError):
        await worker.start()


def _result_csv(losses: list[float]) -> bytes:
    """OpenAI's columns; those that this server does not measure are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    writer.writerows([step, loss, "", "", ""] for step, loss in enumerate(losses, start=1))
    return text.getvalue().encode()
