"""Fine-tuning jobs on this machine or on a Ray cluster, behind the interface of every trainer.

An idle worker takes the job that has waited longest, and with it as many of those that are trained like it as a group
holds. Small groups bring their results early, and lose little where a process dies.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from ...config import RunConfig
from ...errors import ConfigurationError, DaunceError, RejectedError, StopError, TransientError
from ..base import Closing, Job, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..objective import Objective
from ..registry import Context
from .backend import LocalRun, open_tokenizer, run_of
from .engines import WorkerLostError
from .options import hyperparameters_of, settings_of
from .store import JobRecord, MemberTask, job_id, remove_folder

__all__ = ["LocalTrainer", "open_tokenizer", "open_trainer", "trainer_capabilities"]

_JOBS_AT_ONCE = 64
_QUEUED_AT_MOST = 2048
_GATHER_SECONDS = 0.2
"""How long a group that is not full waits for further jobs."""
_LOST_WORKERS = 2
_CHECKPOINTS = 100
"""As many as a config may ask for: every epoch's, if need be."""


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """All jobs at once, because members that wait together are trained together; fewer where a rule may end the run."""
    run = LocalRun(config)
    options = run.options
    whole = 0 if config.ensemble.stop else min(config.ensemble.members, _QUEUED_AT_MOST)
    return TrainerCapabilities(
        provider="this machine" if options.engine != "ray" else "the Ray cluster",
        max_concurrent_jobs=config.backend.max_concurrent_jobs or max(_JOBS_AT_ONCE, whole),
        hyperparameters=frozenset(hyperparameters_of(run.settings)),
        grace_seconds=0.0,
        listing_lag_seconds=0.0,
        max_context_tokens=run.context_tokens,
        checkpoints=_CHECKPOINTS,
        own_queue=True,
        workers=None if options.engine == "ray" else options.worker_count,
        epochs=run.settings().n_epochs,
        notes=() if options.objective == "subset" else (f"objective: {options.objective}",),
    )


class LocalTrainer(Closing):
    """Fine-tuning jobs on this machine. Jobs that agree in all but subset and seed are trained in groups, one a worker
    at a time."""

    def __init__(self, run: LocalRun) -> None:
        self._run = run
        self.capabilities = trainer_capabilities(run.config)
        self._folder = run.folder
        self._jobs: dict[str, JobRecord] = {}
        self._lost, self._cuts = Counter[str](), Counter[str]()
        self._wake = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._last_submit = 0.0
        self._failure: DaunceError | None = None

    async def __aenter__(self) -> Self:
        self._run.enter()
        self._jobs = self._folder.read()
        if self._waiting():
            self._submitted()
        return self

    async def close(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            await asyncio.gather(self._dispatcher, return_exceptions=True)
        await self._run.leave()

    async def model_info(self, model: str) -> ModelInfo:
        """Raises RejectedError where there is no such model."""
        self._run.adapter(model)
        try:
            await self._run.check_base()
        except ConfigurationError as error:
            raise RejectedError(str(error)) from error
        return ModelInfo(model)

    async def upload(self, name: str, content: bytes) -> str:
        """The same name and size give the same id, so that a repeated upload changes nothing."""
        return self._folder.write_file(name, content)

    async def find_file(self, name: str, size: int) -> str | None:
        file_id = self._folder.file_id(name, size)
        return file_id if self._folder.file(file_id) else None

    async def submit(self, request: JobRequest) -> Job:
        """Queue a job; a second submit with the same key returns the first one's job."""
        key, model, file_id = request.key, request.model, request.file_id
        if (known := await self.find_job(key)) is not None:
            return known
        self._run.adapter(model)
        settings_of(request.hyperparameters, self._run.settings)
        if self._folder.file(file_id) is None:
            raise RejectedError(f"training file {file_id!r} does not exist")
        number = 1 + max((r.number for r in self._jobs.values()), default=0)
        hyperparameters = dict(request.hyperparameters)
        record = self._keep(JobRecord(job_id(key), key, model, file_id, request.seed, hyperparameters, number=number))
        self._submitted()
        return record.public

    def _submitted(self) -> None:
        """Have the workers, started at the first job, look for a group now and when no further jobs have come."""
        loop = asyncio.get_running_loop()
        self._last_submit = loop.time()
        self._dispatcher = self._dispatcher or asyncio.create_task(self._dispatch())
        self._wake.set()
        loop.call_later(1.01 * _GATHER_SECONDS, self._wake.set)

    async def find_job(self, key: str) -> Job | None:
        record = self._jobs.get(job_id(key))
        return None if record is None else record.public

    async def get(self, job_id: str) -> Job:
        """Raises why jobs cannot be trained here (ConfigurationError where the workers cannot start) instead of showing
        a job that would never be final; it stays queued for the next run."""
        job = self._record(job_id).public
        if self._failure is not None and not job.status.final:
            raise self._failure
        return job

    async def checkpoints(self, job_id: str) -> list[str]:
        """Models of the job after the epochs before its last one, as many as the config's ``ensemble.checkpoints`` asks
        for, ascending. Raises RejectedError where the job is not known."""
        return self._folder.checkpoints(self._record(job_id).id)

    async def cancel(self, job_id: str) -> Job:
        """A queued job never starts; a running one's result is thrown away (its group goes on for the others)."""
        record = self._record(job_id)
        if not record.status.final:
            record = self._keep(replace(record, status=JobStatus.CANCELLED))
        return record.public

    async def delete_file(self, file_id: str) -> bool:
        if (path := self._folder.file(file_id)) is not None:
            path.unlink()
        return True

    async def delete_model(self, model: str) -> bool:
        if (folder := self._folder.adapter(model)) is not None:
            await asyncio.to_thread(remove_folder, folder)
        return True

    def _record(self, job_id: str) -> JobRecord:
        if job_id not in self._jobs:
            raise RejectedError(f"job {job_id!r} does not exist in {self._folder.root}")
        return self._jobs[job_id]

    def _keep(self, record: JobRecord) -> JobRecord:
        self._jobs[record.id] = record
        self._folder.write(record)
        return record

    async def _dispatch(self) -> None:
        """Train jobs as long as this is open. An error of its own would leave jobs that are never final: it is kept for
        those who ask for one."""
        try:
            workers = (await self._run.engine()).workers
            async with asyncio.TaskGroup() as lanes:
                for _ in range(workers):
                    lanes.create_task(self._lane(workers))
        except Exception as error:
            cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            if not isinstance(cause, DaunceError):
                cause = StopError(
                    f"jobs cannot go on here: {type(cause).__name__}: {cause}. What is finished is kept; fix the cause "
                    "and run the same command again."
                )
            self._failure = cause

    async def _lane(self, workers: int) -> None:
        """One group after another, for one worker."""
        while True:
            if group := self._next_group(workers):
                await self._train([self._keep(replace(r, status=JobStatus.RUNNING)) for r in group])
            else:
                self._wake.clear()
                await self._wake.wait()

    def _waiting(self) -> list[JobRecord]:
        return sorted((r for r in self._jobs.values() if r.status == JobStatus.QUEUED), key=lambda r: (r.number, r.id))

    def _next_group(self, workers: int) -> list[JobRecord]:
        """The jobs that have waited longest and agree in all but subset and seed; none while a group may still be
        filled. Where members start from a target, it is a group of its own."""
        config = self._run.config
        full = group_size(self._run, workers=workers, jobs_at_once=self.capabilities.max_concurrent_jobs)
        alike: dict[str, list[JobRecord]] = {}
        for record in self._waiting():
            kind = json.dumps([record.model, dict(record.hyperparameters)], sort_keys=True)
            group = alike.setdefault(kind, [])
            group.append(record)
            is_target = config.ensemble.start_from == "target" and record.model == self._run.model
            if is_target or len(group) == full:
                return group
        quiet = asyncio.get_running_loop().time() - self._last_submit >= _GATHER_SECONDS
        return next(iter(alike.values()), []) if quiet else []

    async def _train(self, records: Sequence[JobRecord]) -> None:
        from .worker import run_train

        try:
            results = await self._run.work(run_train, self._task(records))
        except Exception as error:  # a worker may fail in any way; the members may be lost, the run is not
            for record in records:
                self._failed(record, error)
            return
        for record, result in zip(records, results, strict=True):
            if result.error is not None:
                self._finish(record, JobStatus.FAILED, error=result.error)
            elif self._jobs[record.id].status != JobStatus.RUNNING:
                await asyncio.to_thread(self._folder.discard_models, record.id)
            elif not (made := self._folder.model_path(record.id)).is_dir():
                raise ConfigurationError(
                    f"the fine-tune that a worker wrote to {made} is not there: with engine: ray run_dir has to lie on "
                    "storage that all machines of the cluster share."
                )
            else:
                self._finish(record, JobStatus.SUCCEEDED, trained_tokens=result.trained_tokens)

    def _task(self, records: Sequence[JobRecord]) -> Any:
        """What a worker is given of a group. A job that starts from the base model makes the target, by a plain
        fine-tune; epochs of the target are not scored, so that none before its last is kept."""
        from .worker import TrainTask

        run, first, options = self._run, records[0], self._run.options
        start = run.adapter(first.model)
        members = []
        for record in records:
            file = self._folder.file(record.file_id)
            content = b"" if file is None else file.read_bytes()
            members.append(MemberTask(record.key, content, record.seed, self._folder.model_path(record.id)))
        is_target = start is None and run.config.ensemble.start_from == "target"
        return TrainTask(
            run.spec,
            settings_of(first.hyperparameters, run.settings),
            Objective() if start is None else Objective.of_options(options.model_dump()),
            tuple(members),
            start,
            checkpoints=0 if is_target else run.config.ensemble.checkpoints - 1,
            cuts=max(self._cuts[record.id] for record in records),
        )

    def _failed(self, record: JobRecord, error: Exception) -> None:
        """Where memory ran out members come back in smaller pieces, until the worker itself refuses; where a worker was
        lost otherwise they come back a few times."""
        if isinstance(error, TransientError):
            too_large = isinstance(error, WorkerLostError) and error.out_of_memory
            (self._cuts if too_large else self._lost)[record.id] += 1
            if too_large or self._lost[record.id] <= _LOST_WORKERS:
                self._finish(record, JobStatus.QUEUED)
                return
        text = str(error) if isinstance(error, DaunceError) else f"{type(error).__name__}: {error}"
        self._finish(record, JobStatus.FAILED, error=text)

    def _finish(self, record: JobRecord, status: JobStatus, **changes: Any) -> None:
        """One that was cancelled meanwhile stays so."""
        if self._jobs[record.id].status == JobStatus.RUNNING:
            self._keep(replace(record, status=status, **changes))


def open_trainer(context: Context) -> LocalTrainer:
    """The trainer of a run; its files, jobs and adapters are kept in ``RUN/local``."""
    return LocalTrainer(run_of(context))


def group_size(run: LocalRun, *, workers: int, jobs_at_once: int) -> int:
    """Members of a group: ``members_at_a_time``, or the usual number and fewer where that leaves workers without any;
    never more than the ``jobs_at_once`` that can wait together."""
    even = -(-min(run.config.ensemble.members, jobs_at_once) // max(1, workers))
    return min(run.options.members_at_a_time or min(run.settings.members_at_a_time, even), jobs_at_once)
