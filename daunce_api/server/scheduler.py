"""The life of a job: validating_files, queued, running, then succeeded, failed or cancelled.

Validated jobs run in the order of their creation, each in a process of its own. Work that a server had in progress when
it ended is done again by the next one: training is deterministic, so nothing changes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any

from ..data.tokenizers import Tokenizer
from ..errors import DaunceError, RejectedError, TrainingCancelledError
from ..providers.local.engines import WorkerLostError
from ..providers.local.options import LoraSettings
from ..providers.server_settings import BASE_LEARNING_RATE
from .state import UNFINISHED, Row, State, new_id, now
from .training_data import JobError, read_training_file
from .worker import BaseModelFacts, Checkpoint, Step, Trained, Worker, train

log = logging.getLogger("daunce_api.server")

STORAGE_WAIT_SECONDS = 1.0
VALIDATED_AT_ONCE = 4
"""Files read at once, so that one that takes long holds up no other job."""
KEPT_CHECKPOINTS = 3


class Scheduler:
    """Validates and trains in the background of the event loop, one job at a time for each worker."""

    def __init__(
        self,
        state: State,
        base: BaseModelFacts,
        tokenizer: Tokenizer,
        workers: Sequence[Worker],
        born: Callable[[str], None],
    ) -> None:
        """``born`` is called with the name of each model that a job makes."""
        self._state, self._base, self._tokenizer, self._born = state, base, tokenizer, born
        self._queue: asyncio.PriorityQueue[tuple[int, str]] = asyncio.PriorityQueue()
        self._validating = asyncio.Semaphore(VALIDATED_AT_ONCE)
        self._workers = workers
        self._lanes: list[asyncio.Task[None]] = []
        self._running: dict[str, Worker] = {}
        self._validations: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Resume the jobs that an earlier server left, then wait for new ones."""
        for job in self._state.unfinished_jobs():
            if job["status"] == "running":
                if job["fault"] == "job_stuck":
                    continue
                self._state.update_job(job["id"], status="queued", estimated_finish=None)
                self._state.event(job["id"], "The server was restarted; the job starts again")
            self.add(job["id"])
        self._lanes = [asyncio.create_task(self._work(worker)) for worker in self._workers]

    async def close(self) -> None:
        tasks = [*self._lanes, *self._validations.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(w.close() for w in self._workers))

    def add(self, job: str) -> None:
        """Validate a job's file, then queue the job."""
        task = self._validations[job] = asyncio.create_task(self._validate(job))
        task.add_done_callback(lambda _: self._validations.pop(job, None))

    @property
    def lanes(self) -> int:
        """Lanes that take jobs; fewer than there are workers means that one has ended, which is a bug."""
        return sum(not lane.done() for lane in self._lanes)

    def cancel(self, row: Row) -> None:
        """Mark a job cancelled and have its process stop at its next step."""
        job = row["id"]
        if not self._finish(job, "cancelled"):
            return
        self._state.event(job, "The job was cancelled")
        self._state.drop_unused_bytes(row["training_file"])
        if (validation := self._validations.get(job)) is not None:
            validation.cancel()
        if (worker := self._running.get(job)) is not None:
            worker.stop()

    async def _validate(self, job: str) -> None:
        async with self._validating:
            await once_stored(f"job {job}", partial(self._read_file, job))

    async def _read_file(self, job: str) -> None:
        row = self._state.job(job)
        path = self._state.file_path(row["training_file"])
        try:
            await in_thread(read_training_file, path, self._tokenizer, self._base.max_context)
        except Exception as error:
            self._fail(row, error)
            return
        if self._state.update_job(job, status="queued"):
            if row["status"] == "validating_files":
                self._state.event(job, "Files validated, moving job to queued state")
            self._queue.put_nowait((row["seq"], job))

    async def _work(self, worker: Worker) -> None:
        while True:
            _, job = await self._queue.get()
            try:
                await once_stored(f"job {job}", partial(self._run, worker, job))
            except Exception as error:  # a lane that ended would leave every later job queued forever
                log.error("job %s: %s", job, type(error).__name__)

    async def _run(self, worker: Worker, job: str) -> None:
        """One job, to its end."""
        state, row = self._state, self._state.job(job)
        if row["status"] not in UNFINISHED:
            return
        state.update_job(job, status="running")
        if row["fault"] == "job_stuck":
            return
        state.event(job, "Fine-tuning job started")
        self._running[job] = worker
        try:
            if row["fault"] == "job_failure":
                raise JobError("The job failed due to an internal error.")
            if row["model"] != self._base.id and state.one("models", row["model"]) is None:
                message = f"The model {row['model']} was deleted before the job ran."
                raise JobError(message, "model_not_found", "model")
            try:
                trained = await self._train(worker, row)
            except WorkerLostError:
                trained = await self._train(worker, row)
            self._succeed(row, trained)
        except TrainingCancelledError:
            pass
        except (sqlite3.Error, OSError):
            raise
        except Exception as error:
            self._fail(row, error)
        finally:
            del self._running[job]
            if state.job(job)["status"] == "cancelled":
                state.delete_models_of_job(job)

    async def _train(self, worker: Worker, row: Row) -> Trained:
        state, job, started_at = self._state, row["id"], time.monotonic()
        state.delete_models_of_job(job)  # what an earlier start left
        rate = BASE_LEARNING_RATE * row["learning_rate_multiplier"]
        settings = LoraSettings(n_epochs=row["n_epochs"], batch_size=row["batch_size"], learning_rate=rate)
        base = state.one("models", row["model"])
        file, out = state.file_path(row["training_file"]), state.adapters_dir / job / "final"
        start = None if base is None else state.adapter_path(base)
        progress = partial(self._progress, worker, row, started_at)
        trained: Trained = await worker.call(train, file, settings, row["seed"], out, start, on_report=progress)
        return trained

    def _progress(self, worker: Worker, row: Row, started_at: float, report: Step | Checkpoint) -> None:
        """What the process reports. A cancellation before it had started is heard at its first step."""
        job = row["id"]
        try:
            if self._state.job(job)["status"] == "cancelled":
                worker.stop()
                return
            with self._state.transaction():
                if isinstance(report, Step):
                    self._on_step(job, started_at, report)
                else:
                    self._on_checkpoint(row, report)
        except sqlite3.Error as error:
            # Progress is worth less than the job: it goes on, and its end is written or the job done again.
            log.error("job %s: progress cannot be written: %s", job, error)

    def _on_step(self, job: str, started_at: float, report: Step) -> None:
        remaining = (time.monotonic() - started_at) / report.step * (report.total_steps - report.step)
        self._state.update_job(job, estimated_finish=now() + round(remaining))
        message = f"Step {report.step}/{report.total_steps}: training loss={report.train_loss:.2f}"
        self._state.event(job, message, type="metrics", data=asdict(report))

    def _on_checkpoint(self, row: Row, report: Checkpoint) -> None:
        step, job = report.step, row["id"]
        name = f"{self._model_name(row)}:ckpt-step-{step.step}"
        self._add_model(row, name, report, step.train_loss, checkpoint_id=new_id("ftckpt"), step=step.step)
        self._state.event(job, f"Checkpoint created at step {step.step}")
        checkpoints = [m for m in self._state.models_of_job(job) if m["step"] is not None]
        self._state.delete_models(checkpoints[:-KEPT_CHECKPOINTS])

    def _model_name(self, row: Row) -> str:
        return f"ft:{self._base.id}:daunce:{row['suffix'] or ''}:{row['id'].removeprefix('ftjob-')[:12]}"

    def _add_model(self, row: Row, name: str, made: Checkpoint | Trained, loss: float, **values: Any) -> None:
        self._state.insert(
            "models",
            id=name,
            created_at=now(),
            job=row["id"],
            base=self._base.id,
            adapter=f"{row['id']}/{made.folder.name}",
            fingerprint=made.digest,
            train_loss=loss,
            **values,
        )

    def _finish(self, job: str, status: str, **values: Any) -> bool:
        return self._state.update_job(job, status=status, finished_at=now(), estimated_finish=None, **values)

    def _fail(self, row: Row, error: Exception) -> None:
        """An error that is not ours is only named in the log: its text may quote the training data."""
        if isinstance(error, JobError):
            failure = error
        elif isinstance(error, RejectedError):
            failure = JobError(str(error), "training_diverged", "hyperparameters")
        elif isinstance(error, DaunceError):
            failure = JobError(str(error))
        else:
            log.error("job %s: %s", row["id"], type(error).__name__)
            failure = JobError("The job failed due to an internal error.")
        with self._state.transaction():
            if self._finish(
                row["id"],
                "failed",
                error=json.dumps({"code": failure.code, "message": failure.message, "param": failure.param}),
            ):
                self._state.event(row["id"], failure.message, level="error")
        self._state.drop_unused_bytes(row["training_file"])
        self._state.delete_models_of_job(row["id"])

    def _succeed(self, row: Row, trained: Trained) -> None:
        job, state, model = row["id"], self._state, self._model_name(row)
        if state.job(job)["status"] == "cancelled":
            return
        # OpenAI's columns; those that this server does not measure are empty.
        lines = ["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"]
        lines += [f"{step},{loss},,," for step, loss in enumerate(trained.losses, start=1)]
        file = job.replace("ftjob", "file")  # the same one where the disk is full and the job is done again
        state.file_path(file).write_text("\n".join(lines) + "\n")
        with state.transaction():
            state.add_file(file, "step_metrics.csv", "fine-tune-results")
            tokens = trained.trained_tokens
            self._finish(job, "succeeded", fine_tuned_model=model, trained_tokens=tokens, result_file=file)
            self._add_model(row, model, trained, trained.losses[-1])
            state.event(job, f"New fine-tuned model created: {model}")
            state.event(job, "The job has successfully completed")
        self._born(model)
        state.drop_unused_bytes(row["training_file"])


async def in_thread(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that may take minutes, in a thread that the end of the server does not wait for."""
    outcome: Future[None] = Future()

    def call() -> None:
        outcome.set_running_or_notify_cancel()
        try:
            function(*arguments)
            outcome.set_result(None)
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    await asyncio.wrap_future(outcome)


async def once_stored(work: str, attempt: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Attempt some work, again from its start for as long as the state folder cannot be read or written: a full disk
    delays it and loses nothing."""
    while True:
        try:
            return await attempt()
        except (sqlite3.Error, OSError) as error:
            log.error("%s: the state folder cannot be read or written: %s", work, error)
            await asyncio.sleep(STORAGE_WAIT_SECONDS)
