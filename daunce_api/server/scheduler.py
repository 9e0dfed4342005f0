"""The life of a job: validating_files, queued, running, then succeeded, failed or cancelled.

Validated jobs run in the order of their creation, each in a process of its own. Work that a server had in progress when
it ended is done again by the next one: training is deterministic, so nothing changes.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ..data.tokenizers import Tokenizer
from ..errors import DaunceError, RejectedError, TrainingCancelledError
from ..providers.local.engines import WorkerLostError
from ..providers.local.options import LoraSettings
from ..providers.server_settings import BASE_LEARNING_RATE
from .state import Row, State, new_id, now
from .training_data import TrainingFileError, read_training_file
from .worker import BaseModelFacts, Checkpoint, Step, Trained, Worker, facts, train

log = logging.getLogger("daunce_api.server")

STORAGE_WAIT_SECONDS = 1.0
VALIDATED_AT_ONCE = 4
"""Files read at once, so that one that takes long holds up no other job."""
MAX_STARTS = 2
"""A job whose process dies is started once more, then it fails."""
KEPT_CHECKPOINTS = 3


class Scheduler:
    """Validates and trains in the background of the event loop, a job a worker at a time."""

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
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers = workers
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
        self._spawn(_settled(*(worker.call(facts) for worker in self._workers)))

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

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _validate(self, job: str) -> None:
        async with self._validating:
            while True:
                try:
                    row = self._state.job(job)
                    if await self._is_valid(row) and self._state.update_job(job, status="queued"):
                        if row["status"] == "validating_files":
                            self._state.event(job, "Files validated, moving job to queued state")
                        self._queue.put_nowait((row["seq"], job))
                    return
                except (sqlite3.Error, OSError) as error:
                    await _wait_for_storage(job, error)

    async def _is_valid(self, row: Row) -> bool:
        path = self._state.file_path(row["training_file"])
        try:
            await asyncio.to_thread(read_training_file, path, self._tokenizer, self._base.max_context)
            return True
        except TrainingFileError as error:
            self._fail(row, error.message, error.code, "training_file")
        except (sqlite3.Error, OSError):
            raise
        except Exception as error:
            log.error("job %s: validating the file: %s", row["id"], type(error).__name__)
            self._fail(row, "The training file cannot be read.", "invalid_training_file", "training_file")
        return False

    async def _work(self, worker: Worker) -> None:
        while True:
            place, job = await self._queue.get()
            try:
                row = self._state.job(job)
                if row["status"] in ("queued", "running"):
                    await self._run(worker, row)
            except (sqlite3.Error, OSError) as error:
                # A full disk: the job, queued or running, is started again until there is room.
                await _wait_for_storage(job, error)
                self._queue.put_nowait((place, job))
            except Exception as error:  # a lane that ended would leave every later job queued for ever
                log.error("job %s: %s", job, type(error).__name__)
            finally:
                self._running.pop(job, None)

    async def _run(self, worker: Worker, row: Row) -> None:
        """One job, to its end."""
        job = row["id"]
        if row["model"] != self._base.id and self._state.one("models", row["model"]) is None:
            self._fail(row, f"The model {row['model']} was deleted before the job ran.", "model_not_found", "model")
            return
        self._state.update_job(job, status="running")
        if row["fault"] == "job_stuck":
            return
        self._state.event(job, "Fine-tuning job started")
        if row["fault"] == "job_failure":
            self._fail(row, "The job failed due to an internal error.")
            return
        self._running[job] = worker
        try:
            for start in range(1, MAX_STARTS + 1):
                try:
                    trained = await self._train(worker, row)
                    if trained is not None:
                        self._succeed(row, trained)
                    break
                except TrainingCancelledError:
                    break
                except WorkerLostError:
                    if start == MAX_STARTS:
                        self._fail(row, "The process that trained the job ended unexpectedly.")
        except (sqlite3.Error, OSError):
            raise
        except TrainingFileError as error:
            self._fail(row, error.message, error.code, "training_file")
        except RejectedError as error:
            self._fail(row, str(error), "training_diverged", "hyperparameters")
        except DaunceError as error:
            self._fail(row, str(error))
        except Exception as error:
            log.error("job %s: %s", job, type(error).__name__)
            self._fail(row, "The job failed due to an internal error.")
        if self._state.job(job)["status"] == "cancelled":
            self._discard_adapters(job)

    async def _train(self, worker: Worker, row: Row) -> Trained | None:
        """None where the job was cancelled."""
        state, job, started_at = self._state, row["id"], time.monotonic()
        await worker.call(facts)  # a cancellation reaches the process only once it runs: start it, then look again
        if state.job(job)["status"] == "cancelled":
            return None
        self._discard_adapters(job)  # what an earlier start left
        rate = BASE_LEARNING_RATE * row["learning_rate_multiplier"]
        settings = LoraSettings(n_epochs=row["n_epochs"], batch_size=row["batch_size"], learning_rate=rate)
        base = state.one("models", row["model"])
        file, out = state.file_path(row["training_file"]), state.adapters_dir / job / "final"
        start = None if base is None else state.adapter_path(base)
        progress = partial(self._progress, worker, row, started_at)
        trained: Trained = await worker.call(train, file, settings, row["seed"], out, start, on_report=progress)
        return trained

    def _progress(self, worker: Worker, row: Row, started_at: float, report: Step | Checkpoint) -> None:
        """What the process reports."""
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
        except sqlite3.OperationalError as error:
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

    def _fail(self, row: Row, message: str, code: str = "server_error", param: str | None = None) -> None:
        message = message[:2000]
        error = json.dumps({"code": code, "message": message, "param": param})
        with self._state.transaction():
            if self._finish(row["id"], "failed", error=error):
                self._state.event(row["id"], message, level="error")
        self._state.drop_unused_bytes(row["training_file"])
        self._discard_adapters(row["id"])

    def _discard_adapters(self, job: str) -> None:
        self._state.delete_models(self._state.models_of_job(job))
        shutil.rmtree(self._state.adapters_dir / job, ignore_errors=True)

    def _succeed(self, row: Row, trained: Trained) -> None:
        job, state, model = row["id"], self._state, self._model_name(row)
        content, tokens = _result_csv(trained.losses), trained.trained_tokens
        with state.transaction():
            file = state.keep_file("step_metrics.csv", content, "fine-tune-results")
            done = self._finish(job, "succeeded", fine_tuned_model=model, trained_tokens=tokens, result_file=file)
            if done:
                self._add_model(row, model, trained, trained.losses[-1])
                state.event(job, f"New fine-tuned model created: {model}")
                state.event(job, "The job has successfully completed")
            else:
                state.delete_file(file)
        self._born(model)
        state.drop_unused_bytes(row["training_file"])


async def _settled(*calls: Awaitable[Any]) -> None:
    await asyncio.gather(*calls, return_exceptions=True)


async def _wait_for_storage(job: str, error: Exception) -> None:
    log.error("job %s: the state folder cannot be read or written: %s", job, error)
    await asyncio.sleep(STORAGE_WAIT_SECONDS)


def _result_csv(losses: Sequence[float]) -> bytes:
    """OpenAI's columns; those that this server does not measure are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    writer.writerows([step, loss, "", "", ""] for step, loss in enumerate(losses, start=1))
    return text.getvalue().encode()
