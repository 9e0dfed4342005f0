"""Fine-tuning jobs on this machine or on a Ray cluster, behind the interface of every trainer.

Jobs are trained in groups of a fixed size, cut in the order in which they were submitted. The size follows from the
config and the number of workers, never from what happens to wait, so that the same run gives the same groups. Small
groups also bring their results early, and lose little where a process dies.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ...config import RunConfig
from ...errors import ConfigurationError, DaunceError, RejectedError, StopError, TransientError
from ..base import Job, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..registry import Context
from .backend import LocalRun, open_scorer, open_tokenizer, run_of, scorer_capabilities
from .engines import WorkerLostError
from .options import FullSettings, LocalOptions, hyperparameters_of, settings_of
from .store import JobRecord, MemberTask, remove_folder

if TYPE_CHECKING:
    from .worker import TrainTask

__all__ = [
    "LocalTrainer",
    "open_scorer",
    "open_tokenizer",
    "open_trainer",
    "scorer_capabilities",
    "trainer_capabilities",
]

_JOBS_AT_ONCE = 64
_QUEUED_AT_MOST = 2048
_GATHER_SECONDS = 0.2
_REFILL_SECONDS = 75.0
"""A client looks at a job once in 60 to 72 seconds at the latest."""
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


class LocalTrainer:
    """Fine-tuning jobs on this machine. Jobs that agree in all but subset and seed are trained in groups of a fixed
    size, one a worker at a time."""

    def __init__(self, run: LocalRun) -> None:
        self._run = run
        self._folder = run.folder
        self._jobs: dict[str, JobRecord] = {}
        self._lost: Counter[str] = Counter()
        self._killed: Counter[str] = Counter()
        self._batches: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._last_submit = 0.0
        self._failure: DaunceError | None = None

    @cached_property
    def capabilities(self) -> TrainerCapabilities:
        return trainer_capabilities(self._run.config)

    async def __aenter__(self) -> Self:
        self._run.enter()
        self._jobs = self._folder.read()
        self._last_submit = asyncio.get_running_loop().time()
        self._dispatcher = asyncio.create_task(self._dispatch())
        self._dispatcher.add_done_callback(self._ended)
        self._wake.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [t for t in (self._dispatcher, *self._batches) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._run.leave)

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
        known = self._jobs.get(self._folder.job_id(request.key))
        if known is not None:
            return known.public
        self._run.adapter(request.model)
        settings_of(request.hyperparameters, self._run.settings)
        if self._folder.file(request.file_id) is None:
            raise RejectedError(f"training file {request.file_id!r} does not exist")
        number = 1 + max((r.number for r in self._jobs.values()), default=0)
        record = self._folder.create(request, number)
        self._jobs[record.id] = record
        self._last_submit = asyncio.get_running_loop().time()
        self._wake.set()
        return record.public

    async def find_job(self, key: str) -> Job | None:
        record = self._jobs.get(self._folder.job_id(key))
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
        """A queued job never starts; a running one's result is thrown away (its batch goes on for the others)."""
        record = self._record(job_id)
        if not JobStatus(record.status).final:
            record = self._update(record, JobStatus.CANCELLED)
        return record.public

    async def delete_file(self, file_id: str) -> bool:
        path = self._folder.file(file_id)
        if path is not None:
            path.unlink()
        return True

    async def delete_model(self, model: str) -> bool:
        folder = self._folder.adapter(model)
        if folder is not None:
            await asyncio.to_thread(remove_folder, folder)
        return True

    def _record(self, job_id: str) -> JobRecord:
        if job_id not in self._jobs:
            raise RejectedError(f"job {job_id!r} does not exist in {self._folder.root}")
        return self._jobs[job_id]

    def _update(self, record: JobRecord, status: JobStatus, **changes: Any) -> JobRecord:
        changed = replace(record, status=status.value, **changes)
        self._jobs[record.id] = changed
        self._folder.write(changed)
        return changed

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not any(r.status == JobStatus.QUEUED for r in self._jobs.values()):
                continue
            engine = await asyncio.to_thread(lambda: self._run.engine)
            quiet = loop.time() - self._last_submit
            wait = _REFILL_SECONDS if self._more_will_come() else _GATHER_SECONDS
            groups = self._groups(engine.workers, partial=quiet >= wait)
            for group in itertools.islice(groups, max(0, engine.workers - len(self._batches))):
                names = tuple(r.id for r in group)
                for record in group:
                    if record.status == JobStatus.QUEUED:
                        self._update(record, JobStatus.RUNNING, group=names)
                task = asyncio.create_task(self._train(names))
                self._batches.add(task)
                task.add_done_callback(self._batch_done)
            if quiet < wait:
                loop.call_later(wait - quiet, self._wake.set)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A dispatcher or a batch that ended with an error of its own has left jobs that would never be final."""
        error = None if task.cancelled() else task.exception()
        if error is not None and self._failure is None:
            if not isinstance(error, DaunceError):
                error = StopError(
                    f"jobs cannot go on here: {type(error).__name__}: {error}. What is finished is kept; fix the cause "
                    "and run the same command again."
                )
            self._failure = error

    def _batch_done(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._ended(task)
        self._wake.set()

    def _more_will_come(self) -> bool:
        """Whether the client submits further members only when others are finished, and looks for that now and then."""
        members = self._run.config.ensemble.members
        return self.capabilities.max_concurrent_jobs < members and len(self._jobs) < members

    def _groups(self, workers: int, *, partial: bool) -> list[list[JobRecord]]:
        run, at_once = self._run, self.capabilities.max_concurrent_jobs
        size = group_size(run.config, run.options, run.members_at_a_time, workers=workers, jobs_at_once=at_once)
        from_target = run.config.ensemble.start_from == "target"
        # A list: jobs change while the groups are started.
        return [*groups_of(self._jobs, size, base=run.model, target_is_trained=from_target, partial=partial)]

    async def _train(self, names: Sequence[str]) -> None:
        from .worker import run_train

        records = [self._jobs[name] for name in names if name in self._jobs]
        try:
            results = await self._run.work(run_train, await self._task(records))
        except Exception as error:  # a worker may fail in any way; the members may be lost, the run is not
            for record in records:
                self._failed(record, error)
            return
        for record, result in zip(records, results, strict=True):
            if result.error is not None:
                self._finish(record, JobStatus.FAILED, error=result.error)
            elif self._jobs[record.id].status == JobStatus.RUNNING:
                for epoch, files in result.earlier.items():
                    await asyncio.to_thread(self._folder.keep_model, record.id, files, epoch)
                await asyncio.to_thread(self._folder.keep_model, record.id, result.files)
                self._finish(record, JobStatus.SUCCEEDED, trained_tokens=result.trained_tokens)
            else:
                await asyncio.to_thread(self._folder.discard_part, record.id)

    async def _task(self, records: Sequence[JobRecord]) -> TrainTask:
        """What a worker is given of a group."""
        first = records[0]
        start = await self._run.tuned(first.model)
        # A full fine-tune is as large as the model.
        into_folders = self._run.engine.shares_files and self._run.settings is FullSettings
        members = []
        for record in records:
            file = self._folder.file(record.file_id)
            content = b"" if file is None else file.read_bytes()
            out = self._folder.part(record.id) if into_folders else None
            members.append(MemberTask(record.key, content, record.seed, start, out))
        cuts = max(self._killed[record.id] for record in records)
        return self._run.train_task(first.hyperparameters, members, cuts)

    def _failed(self, record: JobRecord, error: Exception) -> None:
        """Members of a killed worker come back in smaller pieces, until the worker itself refuses; those of one that
        was lost otherwise come back a few times."""
        if isinstance(error, TransientError):
            killed = isinstance(error, WorkerLostError) and error.killed
            (self._killed if killed else self._lost)[record.id] += 1
            if killed or self._lost[record.id] <= _LOST_WORKERS:
                self._finish(record, JobStatus.QUEUED)
                return
        text = str(error) if isinstance(error, DaunceError) else f"{type(error).__name__}: {error}"
        self._finish(record, JobStatus.FAILED, error=text)

    def _finish(self, record: JobRecord, status: JobStatus, **changes: Any) -> None:
        """Members of a repeated batch that were final before stay as they are, and all stay in their group."""
        now = self._jobs[record.id]
        if now.status == JobStatus.RUNNING:
            self._update(now, status, **changes)


def open_trainer(context: Context) -> LocalTrainer:
    """The trainer of a run; its files, jobs and adapters are kept in ``RUN/local``."""
    return LocalTrainer(run_of(context))


def group_size(config: RunConfig, options: LocalOptions, usual: int, *, workers: int, jobs_at_once: int) -> int:
    """Members of a group: ``members_at_a_time``, or ``usual`` and fewer where that leaves workers without any; never
    more than the ``jobs_at_once`` that can wait together."""
    even = -(-min(config.ensemble.members, jobs_at_once) // max(1, workers))
    return min(options.members_at_a_time or min(usual, even), jobs_at_once)


def groups_of(
    jobs: Mapping[str, JobRecord], size: int, *, base: str, target_is_trained: bool, partial: bool
) -> Iterator[list[JobRecord]]:
    """Queued jobs in groups: first the groups that were interrupted, whole, so that members stay together; then
    full groups of jobs that agree in all but subset and seed, in the order of their submission; then, with
    ``partial``, what is left. Where members start from a target, it is a group of its own."""
    queued = sorted((r for r in jobs.values() if r.status == JobStatus.QUEUED), key=lambda r: (r.number, r.id))
    again = dict.fromkeys(r.group for r in queued if r.group)
    for group in again:
        yield [jobs[name] for name in group if name in jobs]
    alike: dict[str, list[JobRecord]] = {}
    for record in (r for r in queued if not r.group):
        kind = json.dumps([record.model, dict(record.hyperparameters)], sort_keys=True)
        alike.setdefault(kind, []).append(record)
    full: list[list[JobRecord]] = []
    rest: list[list[JobRecord]] = []
    for records in alike.values():
        own = 1 if target_is_trained and records[0].model == base else size
        for part in (records[first : first + own] for first in range(0, len(records), own)):
            (full if len(part) == own else rest).append(part)
    yield from sorted(full, key=lambda part: part[0].number)
    if partial:
        yield from rest
