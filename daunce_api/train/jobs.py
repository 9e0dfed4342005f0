"""Requests to a provider that may be interrupted anywhere: intent first, look before any repeat, answer at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeVar

from .._util.clock import Clock
from .._util.retry import Retrier, Retry, RetryPolicy, duration
from ..errors import AmbiguousSubmitError, RejectedError, TransientError
from ..providers.base import Checkpointing, Job, JobRequest, JobStatus, ModelInfo, Trainer
from ..store import INTENT, JobRow, RunStore
from .events import Event, EventKind
from .policy import PollPolicy

LOST = "lost track of the job: "
"""Begins the error of a job that was given up although the provider may still hold it."""

CANCELLED = "cancelled on request"
"""The error of a job that :meth:`Orchestrator.cancel` stopped; such an attempt does not count."""

_LOOKS = 3

T = TypeVar("T")


class Desk:
    """The orchestrator's dealings with one provider, recorded in one store."""

    def __init__(
        self,
        trainer: Trainer,
        store: RunStore,
        emit: Callable[[Event], None],
        *,
        clock: Clock,
        retries: RetryPolicy,
        polls: PollPolicy,
        rng: random.Random,
    ) -> None:
        self.trainer = trainer
        self.store = store
        self._emit = emit
        self._clock = clock
        self._polls = polls
        self._rng = rng
        self._retry = Retrier(retries, clock, rng=rng, on_retry=self._waiting)
        self._uploads: dict[str, asyncio.Lock] = {}

    @property
    def _lag(self) -> float:
        return self.trainer.capabilities.listing_lag_seconds

    def release_unsent(self) -> None:
        """Free money that was reserved for jobs of which not even an intent was recorded: they were never sent."""
        known = {row.key for row in self.store.jobs.rows()}
        for subject in self.store.ledger.unsettled():
            if subject.startswith(f"{self.store.run_key}-m") and subject not in known:
                self.store.ledger.settle(subject, 0.0)

    async def file(self, content: bytes, *, verify: bool = False) -> str:
        """Id of the uploaded file with this content; uploaded once, however many members share it.

        ``verify`` asks the provider whether a file that was uploaded before is still there.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"daunce-{self.store.run_key}-{sha256[:12]}.jsonl"
        async with self._uploads.setdefault(sha256, asyncio.Lock()):
            row = self.store.jobs.file(sha256)
            if row is not None and row.state == "uploaded" and row.file_id is not None:
                if not verify or await self.find_file(name, len(content)) is not None:
                    return row.file_id
                self.store.jobs.file_deleted(sha256)
            # An intent without an answer: an upload was under way when the run ended, and may have arrived.
            look = self._lag if row is not None and row.state == INTENT else None
            self.store.jobs.file_intent(sha256, name, len(content))

            async def upload() -> str:
                nonlocal look
                found = None if look is None else await self.find_file(name, len(content), lag=look)
                if found is not None:
                    return found
                look = None
                try:
                    return await self.trainer.upload(name, content)
                except TransientError as error:
                    if error.status != 429:  # anything else may have been acted on
                        look = self._lag
                    raise

            file_id = await self._repeat(upload, f"upload {name}")
            self.store.jobs.file_uploaded(sha256, file_id)
            self._emit(Event(EventKind.UPLOADED, f"{name} ({len(content):,} bytes) is {file_id}"))
            return file_id

    async def find_file(self, name: str, size: int, *, lag: float | None = None) -> str | None:
        """Id of an uploaded file of this name and size; looked for as in :meth:`find_job`."""
        for pause in _pauses(self._lag if lag is None else lag):
            if pause:
                await self._pause(pause)
            found = await self._repeat(lambda: self.trainer.find_file(name, size), f"look for {name}")
            if found is not None:
                return found
        return None

    async def find_job(self, key: str, *, lag: float | None = None) -> Job | None:
        """The job of this key, looked for until ``lag`` seconds have passed (default: as long as the provider's
        lists may be behind)."""
        for pause in _pauses(self._lag if lag is None else lag):
            if pause:
                await self._pause(pause)
            found = await self._repeat(lambda: self.trainer.find_job(key), f"look for job {key}")
            if found is not None:
                return found
        return None

    async def submit(self, request: JobRequest, member: int, attempt: int) -> Job:
        """Record the intent, submit, record the answer. Raises what the trainer raises."""
        self.store.jobs.intent(request.key, member, attempt, json.dumps(asdict(request)))
        return await self._send(request, member, attempt, look=None)

    async def resubmit(self, row: JobRow) -> Job:
        """Go on from an intent without an answer: look for the job, and submit it only where there is none."""
        request = JobRequest(**json.loads(row.request_json))
        return await self._send(request, row.member, row.attempt, look=self._lag)

    async def _send(self, request: JobRequest, member: int, attempt: int, *, look: float | None) -> Job:
        found = False

        async def send() -> Job:
            nonlocal look, found
            if look is not None:
                job = await self.find_job(request.key, lag=look)
                if job is not None:
                    found = True
                    return job
            look = None
            try:
                return await self.trainer.submit(request)
            except AmbiguousSubmitError:
                look = self._lag
                raise

        # No await between answer and record.
        job = await self._repeat(send, f"submit {request.key}")
        self.store.jobs.submitted(request.key, job.id)
        kind = EventKind.FOUND if found else EventKind.SUBMITTED
        self._emit(Event(kind, f"{request.key} is job {job.id}", member, attempt, job))
        return job

    async def watch(self, row: JobRow) -> Job:
        """Poll a submitted job until it is final, record what changes, return its last state.

        A succeeded job has a model here: one that shows none in time counts as failed. A job that the provider no
        longer knows, and one that takes too long (it is cancelled first), count as failed too.
        """
        polls, clock = self._polls, self._clock
        job_id = row.job_id or ""
        own_queue = self.trainer.capabilities.own_queue
        started = begun = clock.now()
        finished: float | None = None
        last: JobStatus | None = None
        while True:
            job = await self._get(row, job_id)
            if job.status is JobStatus.SUCCEEDED and job.model is None:
                finished = clock.now() if finished is None else finished
                if clock.now() - finished >= polls.withheld:
                    job = _failed(job, "the job succeeded, but its model is withheld (a provider's safety check?)")
            age = clock.now() - started
            if job.status is JobStatus.QUEUED and own_queue:
                begun = clock.now()
            if not job.status.final and clock.now() - begun >= polls.job_timeout:
                job = await self._give_up(row, job, clock.now() - begun)
            if job.status is not last:
                last = job.status
                self._emit(Event(EventKind.STATE, f"{row.key} is {job.status}", row.member, row.attempt, job))
            if job.status.final and not (job.status is JobStatus.SUCCEEDED and job.model is None):
                self.store.jobs.state(row.key, job.status, job.model, job.error, job.trained_tokens)
                return job
            if not job.status.final:
                self.store.jobs.state(row.key, job.status)
            await self._pause(min(max(polls.first, age / 10), polls.longest))

    async def _get(self, row: JobRow, job_id: str) -> Job:
        try:
            return await self._repeat(lambda: self.trainer.get(job_id), f"look at {row.key}")
        except RejectedError as error:
            found = await self.find_job(row.key, lag=0.0)
            if found is not None and found.id == job_id:
                return found
            return Job(job_id, JobStatus.FAILED, error=f"{LOST}the provider no longer knows it ({error})")

    async def _give_up(self, row: JobRow, job: Job, age: float) -> Job:
        try:
            job = await self.cancel(row.key, job.id)
        except RejectedError as error:
            return _failed(job, f"{LOST}still {job.status} after {age / 3600:.1f} hours, and not cancelled ({error})")
        if job.status is JobStatus.CANCELLED:
            return _failed(job, f"cancelled after {age / 3600:.1f} hours without an end")
        if job.status.final:
            return job
        return _failed(job, f"{LOST}still {job.status} after {age / 3600:.1f} hours, and cancelling did not end it")

    async def cancel(self, key: str, job_id: str) -> Job:
        """Ask for cancellation and wait up to a minute for it to take hold."""
        job = await self._repeat(lambda: self.trainer.cancel(job_id), f"cancel {key}")
        waited = 0.0
        while not job.status.final and waited < 60.0:
            step = max(self._polls.first, waited / 2)
            await self._pause(step)
            waited += step
            job = await self._repeat(lambda: self.trainer.get(job_id), f"look at {key}")
        return job

    async def model_info(self, model: str) -> ModelInfo:
        """What the provider says of a model. Raises RejectedError where it has none of this name."""
        return await self._repeat(lambda: self.trainer.model_info(model), f"look for {model}")

    async def model_exists(self, model: str) -> bool:
        """Whether the provider still serves a model."""
        try:
            await self.model_info(model)
        except RejectedError:
            return False
        return True

    async def checkpoints(self, row: JobRow) -> tuple[str | None, ...]:
        """Models of a succeeded job from before its end, ascending by step, None in place of one that is gone. The
        provider is asked once; a job that it no longer knows has none."""
        found = self.store.jobs.checkpoints(row.key)
        trainer, job_id = self.trainer, row.job_id
        if found is None and job_id is not None and isinstance(trainer, Checkpointing):
            listing = trainer.checkpoints
            try:
                found = tuple(await self._repeat(lambda: listing(job_id), f"look for checkpoints of {row.key}"))
            except RejectedError:
                found = ()
            self.store.jobs.checkpoints_found(row.key, found)
        return found or ()

    async def delete_model(self, model: str) -> bool:
        """True where the model is gone now."""
        return await self._repeat(lambda: self.trainer.delete_model(model), f"delete {model}")

    async def delete_file(self, file_id: str) -> bool:
        """True where the file is gone now."""
        return await self._repeat(lambda: self.trainer.delete_file(file_id), f"delete {file_id}")

    async def look_at(self, row: JobRow) -> Job | None:
        """The provider's present view of a job whose fate the store does not know; None where there is none."""
        if row.status == INTENT or row.job_id is None:
            return await self.find_job(row.key)
        job = await self._get(row, row.job_id)
        return None if (job.error or "").startswith(LOST) else job

    async def _repeat(self, action: Callable[[], Awaitable[T]], what: str) -> T:
        return await self._retry(action, what, on=(TransientError, AmbiguousSubmitError))

    async def _pause(self, seconds: float) -> None:
        await self._clock.sleep(seconds * self._rng.uniform(1.0, 1.2))

    def _waiting(self, retry: Retry) -> None:
        text = f"{retry.what}: {retry.error} Next try in {duration(retry.pause)}."
        self._emit(Event(EventKind.WAITING, text))


def _failed(job: Job, error: str) -> Job:
    return Job(job.id, JobStatus.FAILED, None, error, job.trained_tokens)


def _pauses(lag: float) -> list[float]:
    """Waits before each look: none before the first, then ``lag`` spread over the others."""
    return [0.0] if lag <= 0 else [0.0, *(lag * 2.0**i / (2.0 ** (_LOOKS - 1) - 1) for i in range(_LOOKS - 1))]
