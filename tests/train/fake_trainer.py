"""A scripted provider and a ``Trainer`` for it: a real implementation of the protocol, kept in memory.

``FakeProvider`` is what outlives a client: files, jobs, models, limits. ``FakeTrainer`` is one client's view; every
call of it asks a script for a fault first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

from daunce_api._util.clock import Clock, InstantClock
from daunce_api.errors import (
    AmbiguousSubmitError,
    DailyLimitError,
    RejectedError,
    StopError,
    TransientError,
)
from daunce_api.providers.base import Job, JobEcho, JobRequest, JobStatus, ModelInfo, TrainerCapabilities

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = (
    JobStatus.QUEUED,
    JobStatus.RUNNING,
    JobStatus.SUCCEEDED,
    JobStatus.FAILED,
    JobStatus.CANCELLED,
)
HAPPY = (QUEUED, RUNNING, SUCCEEDED)


class Crash(BaseException):
    """The process dies here: nothing of the client runs after it."""


class Fault(StrEnum):
    """What happens to one call. ``after``: the provider acted, and the answer is lost."""

    RATE_LIMIT = "rate_limit"
    LOST_BEFORE = "lost_before"
    LOST_AFTER = "lost_after"
    CRASH_BEFORE = "crash_before"
    CRASH_AFTER = "crash_after"
    DAILY = "daily"
    STOP = "stop"
    REJECTED = "rejected"


@dataclass
class FakeJob:
    id: str
    request: JobRequest
    states: tuple[JobStatus, ...]
    created: float
    looks: int = 0
    shown: bool = False
    withheld: bool = False
    gone: bool = False
    stubborn: bool = False
    refused: bool = False

    @property
    def status(self) -> JobStatus:
        return self.states[min(self.looks, len(self.states) - 1)]

    @property
    def live(self) -> bool:
        return not self.status.final and not self.gone


@dataclass
class FakeProvider:
    """``states``: the successive states of each look at a job; ``listing_lag`` seconds until lists show new things;
    ``earlier``: how many models a job leaves beside its final one."""

    clock: Clock = field(default_factory=InstantClock)
    states: Callable[[JobRequest], tuple[JobStatus, ...]] = lambda request: HAPPY
    refuses: Callable[[JobRequest], bool] = lambda request: False
    listing_lag: float = 0.0
    grace: float = 300.0
    invisible: float = 0.0
    """Seconds for which what was just made is 404: jobs by id, files at job creation, models."""
    own_queue: bool = False
    max_concurrent: int = 3
    upload_seconds: float = 0.0
    trained_tokens: int | None = 100
    earlier: Callable[[JobRequest], int] = lambda request: 0
    files: dict[str, tuple[str, bytes, float]] = field(default_factory=dict)
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    models: set[str] = field(default_factory=lambda: {"base"})
    uploads: list[str] = field(default_factory=list)
    most_live: int = 0
    keeps: set[str] = field(default_factory=set)

    def create(self, request: JobRequest) -> FakeJob:
        if request.model not in self.models:
            raise RejectedError(f"model {request.model} does not exist")
        if request.file_id not in self.files:
            raise RejectedError(f"training_file {request.file_id} does not exist")
        job = FakeJob(f"job-{len(self.jobs)}", request, self.states(request), self.clock.now())
        if self.refuses(request):
            job.states, job.refused = (QUEUED, FAILED), True
        self.jobs[job.id] = job
        self.most_live = max(self.most_live, sum(j.live for j in self.jobs.values()))
        return job

    def view(self, job: FakeJob) -> Job:
        status = job.status
        model = None
        if status is SUCCEEDED and not job.withheld:
            model = f"ft-{job.request.key}"
            if not job.shown:
                job.shown = True
                self.models |= {model, *self.earlier_models(job)}
        tokens = self.trained_tokens if status is SUCCEEDED else None
        error = "bad luck" if status is FAILED else None
        return Job(
            job.id, status, model, error, tokens, refused=job.refused and status is FAILED, echo=echo_of(job.request)
        )

    def earlier_models(self, job: FakeJob) -> list[str]:
        return [f"ft-{job.request.key}:step-{i + 1}" for i in range(self.earlier(job.request))]

    def of_member(self, member: int) -> list[FakeJob]:
        return [j for j in self.jobs.values() if f"-m{member}-a" in j.request.key]


def echo_of(request: JobRequest) -> JobEcho:
    return JobEcho(request.key, request.file_id, request.model, request.seed, request.hyperparameters)


class FakeTrainer:
    """``script(call)`` gives the fault of a call, named by method (``submit``, ``get``, ...)."""

    def __init__(self, provider: FakeProvider, script: Callable[[str], Fault | None] = lambda call: None) -> None:
        self.provider = provider
        self.script = script
        self.calls: list[str] = []
        self.retry_after: float | None = None

    @property
    def capabilities(self) -> TrainerCapabilities:
        return TrainerCapabilities(
            provider="fake",
            max_concurrent_jobs=self.provider.max_concurrent,
            grace_seconds=self.provider.grace,
            listing_lag_seconds=self.provider.listing_lag,
            echoes=frozenset(("key", "file_id", "model", "seed", "hyperparameters")),
            own_queue=self.provider.own_queue,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def _enter(self, call: str, submit: bool = False) -> Callable[[], None]:
        """Raise what happens before the provider acts; return what happens after."""
        self.calls.append(call)
        await self.provider.clock.sleep(0)
        fault = self.script(call)

        def lost() -> None:
            if submit:
                raise AmbiguousSubmitError("no answer to the submit")
            raise TransientError("connection lost")

        if fault is Fault.RATE_LIMIT:
            error = TransientError("slow down", self.retry_after)
            error.status = 429
            raise error
        if fault is Fault.LOST_BEFORE:
            lost()
        if fault is Fault.CRASH_BEFORE:
            raise Crash
        if fault is Fault.DAILY:
            raise DailyLimitError("daily limit of jobs reached.")
        if fault is Fault.STOP:
            raise StopError("the key was revoked")
        if fault is Fault.REJECTED:
            raise RejectedError(f"{call} refused")

        def after() -> None:
            if fault is Fault.LOST_AFTER:
                lost()
            if fault is Fault.CRASH_AFTER:
                raise Crash

        return after

    async def model_info(self, model: str) -> ModelInfo:
        after = await self._enter("model_info")
        if model not in self.provider.models:
            raise RejectedError(f"model {model} does not exist")
        after()
        return ModelInfo(model)

    async def upload(self, name: str, content: bytes) -> str:
        after = await self._enter("upload")
        await self.provider.clock.sleep(self.provider.upload_seconds)
        file_id = f"file-{len(self.provider.uploads)}"
        assert hashlib.sha256(content).hexdigest()[:12] in name
        self.provider.files[file_id] = (name, content, self.provider.clock.now())
        self.provider.uploads.append(name)
        after()
        return file_id

    async def find_file(self, name: str, size: int) -> str | None:
        after = await self._enter("find_file")
        after()
        shown = self.provider.clock.now() - self.provider.listing_lag
        for file_id, (known, content, created) in self.provider.files.items():
            if known == name and len(content) == size and created <= shown:
                return file_id
        return None

    async def submit(self, request: JobRequest) -> Job:
        after = await self._enter("submit", submit=True)
        job = self.provider.create(request)
        after()
        return Job(job.id, QUEUED, echo=echo_of(request))

    async def find_job(self, key: str) -> Job | None:
        after = await self._enter("find_job")
        after()
        shown = self.provider.clock.now() - self.provider.listing_lag
        for job in self.provider.jobs.values():
            if job.request.key == key and not job.gone and job.created <= shown:
                return self.provider.view(job)
        return None

    async def jobs_of(self, run_key: str) -> list[Job]:
        after = await self._enter("jobs_of")
        after()
        shown = self.provider.clock.now() - self.provider.listing_lag
        return [
            self.provider.view(job)
            for job in self.provider.jobs.values()
            if job.request.key.startswith(f"{run_key}-") and not job.gone and job.created <= shown
        ]

    def _job(self, job_id: str) -> FakeJob:
        job = self.provider.jobs.get(job_id)
        if job is None or job.gone or self.provider.clock.now() < job.created + self.provider.invisible:
            raise RejectedError(f"no job {job_id}")
        return job

    async def get(self, job_id: str) -> Job:
        after = await self._enter("get")
        job = self._job(job_id)
        job.looks += 1
        after()
        return self.provider.view(job)

    async def cancel(self, job_id: str) -> Job:
        after = await self._enter("cancel")
        job = self._job(job_id)
        if not job.status.final and not job.stubborn:
            job.states, job.looks = (CANCELLED,), 0
        after()
        return self.provider.view(job)

    async def checkpoints(self, job_id: str) -> list[str]:
        after = await self._enter("checkpoints")
        job = self._job(job_id)
        after()
        return [model for model in self.provider.earlier_models(job) if model in self.provider.models]

    async def delete_file(self, file_id: str) -> bool:
        after = await self._enter("delete_file")
        if file_id in self.provider.keeps:
            return False
        self.provider.files.pop(file_id, None)
        after()
        return True

    async def delete_model(self, model: str) -> bool:
        after = await self._enter("delete_model")
        if model in self.provider.keeps:
            return False
        self.provider.models.discard(model)
        after()
        return True
