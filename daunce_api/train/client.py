"""``JobClient``: exactly one job an attempt, however often the process, the network or the provider fails.

The order is always the same: the intent is stored, the request is sent, the answer is compared with the request and
stored. Before anything that may have been acted on is sent again, the provider is searched for it.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

from .._util.clock import Clock, SystemClock
from .._util.retry import RetryPolicy
from .._util.text import duration
from ..errors import AmbiguousSubmitError, HeldJobError, RejectedError, StopError, TransientError
from ..plan import JobCosts
from ..providers.base import Checkpointing, Job, JobRequest, JobStatus, Listing, ModelInfo, Trainer
from ..providers.identity import contradiction
from ..providers.replay.session import PROTOCOL
from ..store import INTENT, JobRow, Purpose, RunStore, name_of
from .events import Event, EventKind, OnEvent
from .files import TrainingFiles
from .money import JobMoney
from .patient import JOB_RETRIES, REACH_RETRIES, Patient, PollPolicy, names_missing

LOST = "lost track of the job: "
"""Begins the error of a job that was given up although the provider may still hold it."""

CANCELLED = "cancelled on request"
"""The error of a job that `daunce cancel` stopped; such an attempt does not count."""

MOST_SENDS = 5
"""Times that one attempt is sent without any trace of it at the provider."""
_HELD_AFTER = 60.0
"""Shortest time for which an answer has to contradict its request before its job is held."""


class JobClient(Patient):
    """One run's jobs, files and models at one provider, recorded in one store.

    ``costs``, ``cap`` and ``purpose`` are those of :class:`.money.JobMoney`, ``rng`` of :class:`.patient.Patient`.
    ``replayed``: the protocol of the recording that is replayed, where one is: the replay leaves out what it does not
    hold (:mod:`daunce_api.providers.replay.session`).
    """

    def __init__(
        self,
        trainer: Trainer,
        store: RunStore,
        *,
        costs: JobCosts | None = None,
        cap: float | None = None,
        purpose: Purpose = "train",
        on_event: OnEvent | None = None,
        clock: Clock | None = None,
        retries: RetryPolicy = JOB_RETRIES,
        polls: PollPolicy | None = None,
        rng: random.Random | None = None,
        replayed: int | None = None,
    ) -> None:
        self.money = JobMoney(store, costs, cap, purpose)
        self.trainer = trainer
        self.store = store
        self.replaying = replayed is not None
        self.protocol = PROTOCOL if replayed is None else replayed
        self._polls = polls or PollPolicy()
        capabilities = trainer.capabilities
        lag = capabilities.listing_lag_seconds
        self._lag = capabilities.grace_seconds if lag is None else lag
        super().__init__(capabilities.grace_seconds, clock or SystemClock(), retries, rng or random.Random(), on_event)
        self.files = TrainingFiles(self, trainer, store, self._lag)
        self._contradicted: dict[str, float] = {}
        self._reached = False

    def sends(self, key: str) -> int:
        """How often this run folder sent an attempt's job."""
        return int(self.store.get_value(f"sends {key}", 1))

    async def listed(self) -> list[Job] | None:
        """Every job of this run that the provider lists; None where it cannot list them. Raises StopError where the
        first list fails every time, as behind a gateway that passes on everything but fine-tuning."""
        trainer = self.trainer
        if not isinstance(trainer, Listing):
            return None
        retries = None if self._reached else REACH_RETRIES
        try:
            jobs = await self.repeat(lambda: trainer.jobs_of(self.store.run_key), "list this run's jobs", retries)
        except TransientError as error:
            if self._reached or error.status is None or error.status < 500:
                raise
            raise StopError(
                f"the fine-tuning jobs of {trainer.capabilities.provider} cannot be reached: {error} Nothing was "
                "submitted. If this is a gateway, its jobs route may need a license or a pass-through address "
                "(LiteLLM: base_url .../openai); `daunce doctor` shows what this endpoint can do."
            ) from error
        self._reached = True
        return jobs

    # -- one attempt ----------------------------------------------------------------------------------------------

    async def submit(self, request: JobRequest, member: int, attempt: int) -> Job:
        """Reserve the price, record the intent, submit, record the answer. Raises BudgetError, and what the trainer
        raises."""
        self.money.reserve(request.key, member)
        if self.protocol >= 2:
            request = replace(request, sequence=self.store.sequence)
        self.store.jobs.intent(request.key, member, attempt, json.dumps(asdict(request)))
        return await self._send(request, member, attempt, look=None)

    async def resubmit(self, row: JobRow) -> Job:
        """Resume from an intent without an answer: look for the job, and submit it only where there is none."""
        return await self._send(request_of(row), row.member, row.attempt, look=self._lag)

    async def _send(self, request: JobRequest, member: int, attempt: int, *, look: float | None) -> Job:
        found, sends = False, 0

        async def send() -> Job:
            nonlocal look, found, sends
            if look is not None:
                job = await self.find_job(request, lag=look)
                if job is not None:
                    found = True
                    return job
            look = None
            if sends == MOST_SENDS:
                raise StopError(
                    f"job {request.key} was sent {sends} times: none of the answers says whether it was created, and "
                    "the provider's list does not show it. Everything so far is kept. Check with `daunce doctor` "
                    "whether this endpoint creates fine-tuning jobs, then run the same command again."
                )
            try:
                self.store.set_value(f"sends {request.key}", self.store.get_value(f"sends {request.key}", 0) + 1)
                job = await self.trainer.submit(request)
                self._compare(request, job, ambiguous=True)
            except AmbiguousSubmitError:
                look, sends = self._lag, sends + 1
                raise
            return job

        while True:
            try:
                job = await self.repeat(send, f"submit {request.key}")
                break
            except RejectedError as error:
                subject = f"what job {request.key} starts from"
                own = [request.model] if request.model in self.store.jobs.ready_models().values() else []
                if not names_missing(error, request.file_id, *own) or not await self.wait_for(subject, error):
                    raise
        # No await between answer and record.
        self.store.jobs.submitted(request.key, job.id)
        kind = EventKind.FOUND if found else EventKind.SUBMITTED
        self.emit(Event(kind, f"{request.key} is job {job.id}", member, attempt, job))
        return job

    async def find_job(self, request: JobRequest, *, lag: float) -> Job | None:
        """The job of this request, looked for until ``lag`` seconds have passed."""

        async def look() -> Job | None:
            job = await self.trainer.find_job(request.key)
            if job is not None:
                self._compare(request, job)
            return job

        return await self.search(look, f"look for job {request.key}", lag)

    async def watch(self, row: JobRow) -> Job:
        """Poll a submitted job until it is final, record what changes, settle its cost, return its last state.

        A succeeded job has a model here: one that shows none in time counts as failed. A job that the provider does
        not show after the grace period, and one that takes too long (it is cancelled first), count as failed too.
        Raises StopError for a job that is blocked.
        """
        polls, clock = self._polls, self.clock
        own_queue = self.trainer.capabilities.own_queue
        started = begun = clock.now()
        finished: float | None = None
        last: JobStatus | None = None
        while True:
            job = await self._look(row)
            if job.blocked is not None:
                raise StopError(job.blocked)
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
                self.emit(Event(EventKind.STATE, f"{row.key} is {job.status}", row.member, row.attempt, job))
            if job.status.final and not (job.status is JobStatus.SUCCEEDED and job.model is None):
                self.store.jobs.state(row.key, job.status, job.model, job.error, job.trained_tokens)
                self.money.settle(row.key, row.member, job.trained_tokens)
                if (text := self.money.other_tokens(row, job)) is not None:
                    self.emit(Event(EventKind.OTHER_TOKENS, f"{row.key}: {text}", row.member, row.attempt, job))
                return job
            if not job.status.final:
                self.store.jobs.state(row.key, job.status)
            await self.pause(min(max(polls.first, age / 10), polls.longest))

    async def _look(self, row: JobRow) -> Job:
        """A job's present state; a failed job with a ``LOST`` error where it stays invisible."""
        request, job_id = request_of(row), row.job_id or ""
        subject = f"job {job_id} ({row.key})"

        async def get() -> Job:
            job = await self.trainer.get(job_id)
            self._compare(request, job, job_id=job_id)
            return job

        while True:
            try:
                job = await self.repeat(get, f"look at {row.key}")
            except RejectedError as error:
                found = await self.find_job(request, lag=0.0)
                if found is not None and found.id == job_id:
                    return found
                if not await self.wait_for(subject, error):
                    return Job(
                        job_id,
                        JobStatus.FAILED,
                        error=f"{LOST}the provider does not show {job_id} after "
                        f"{duration(self.grace_seconds)} ({error})",
                    )
            else:
                self.visible(subject)
                return job

    def _compare(self, request: JobRequest, job: Job, *, job_id: str | None = None, ambiguous: bool = False) -> None:
        """Raises where an answer belongs to another request: TransientError (look again) or AmbiguousSubmitError, and
        HeldJobError when that has not changed for the grace period."""
        reason = "no job id" if not job.id else None
        if job_id is not None and job.id != job_id:
            reason = f"job {job.id!r} instead of {job_id!r}"
        reason = reason or contradiction(request, job, self.trainer.capabilities.echoes)
        if reason is None:
            self._contradicted.pop(request.key, None)
            return
        now = self.clock.now()
        since = self._contradicted.setdefault(request.key, now)
        if now - since >= max(self.grace_seconds, _HELD_AFTER):
            raise HeldJobError(
                f"job {job.id or '(without an id)'} may be {request.key} of this run, but the provider shows {reason}. "
                "It is held: not used, and not submitted again. Everything so far is kept. Look at the job in the "
                "provider's console; `daunce cancel` stops it, then the same command trains this member anew. Where "
                "the provider does not repeat that field as it was sent, leave it out of backend.options.echoes."
            )
        text = f"the provider answered for {request.key} with {reason}: the answer belongs to another request"
        raise AmbiguousSubmitError(f"{text}.") if ambiguous else TransientError(f"{text}. Nothing of it was used.")

    async def _give_up(self, row: JobRow, job: Job, age: float) -> Job:
        try:
            job = await self.cancel(row.key, job.id)
        except RejectedError as error:
            return _failed(job, f"{LOST}still {job.status} after {duration(age)}, and not cancelled ({error})")
        if job.status is JobStatus.CANCELLED:
            return _failed(job, f"cancelled after {duration(age)} without an end")
        if job.status.final:
            return job
        return _failed(job, f"{LOST}still {job.status} after {duration(age)}, and cancelling did not end it")

    async def look_at(self, row: JobRow) -> Job | None:
        """The provider's present view of a job whose fate the store does not know; None where there is none."""
        if row.status == INTENT or row.job_id is None:
            look = f"look for job {row.key}"
            return await self.search(lambda: self.trainer.find_job(row.key), look, self._lag)
        job = await self._look(row)
        return None if (job.error or "").startswith(LOST) else job

    async def cancel(self, key: str, job_id: str) -> Job:
        """Request cancellation and wait up to a minute for it to take hold."""
        job = await self.repeat(lambda: self.trainer.cancel(job_id), f"cancel {key}")
        waited = 0.0
        while not job.status.final and waited < 60.0:
            step = max(self._polls.first, waited / 2)
            await self.pause(step)
            waited += step
            job = await self.repeat(lambda: self.trainer.get(job_id), f"look at {key}")
        return job

    # -- models ---------------------------------------------------------------------------------------------------

    async def first_contact(self, model: str) -> ModelInfo:
        """:meth:`model_info` as the first request of all. Raises StopError where within two minutes nothing answers:
        that is a wrong address more often than an outage, and nothing is lost by coming back."""
        try:
            return await self.repeat(lambda: self.trainer.model_info(model), f"look for {model}", REACH_RETRIES)
        except TransientError as error:
            if error.status is not None:
                return await self.model_info(model)
            raise StopError(
                f"{self.trainer.capabilities.provider} cannot be reached: {error} Nothing was sent. Check the network "
                "and backend.base_url."
            ) from error

    async def model_info(self, model: str) -> ModelInfo:
        """What the provider says of a model. Raises RejectedError where it has none of this name."""
        return await self.repeat(lambda: self.trainer.model_info(model), f"look for {model}")

    async def model_exists(self, model: str) -> bool:
        """Whether the provider still serves a model."""
        try:
            await self.model_info(model)
        except RejectedError:
            return False
        return True

    async def checkpoints(self, row: JobRow) -> tuple[str | None, ...]:
        """Models of a succeeded job from before its end, ascending by step, None in place of one that is gone. The
        provider is asked once; a job that it does not show after the grace period has none."""
        known = self.store.jobs.checkpoints(row.key)
        trainer, job_id = self.trainer, row.job_id
        if known is not None or job_id is None or not isinstance(trainer, Checkpointing):
            return known or ()
        listing, subject = trainer.checkpoints, f"the list of checkpoints of {row.key}"
        models: tuple[str, ...] = ()
        while True:
            try:
                models = tuple(await self.repeat(lambda: listing(job_id), f"look for checkpoints of {row.key}"))
            except RejectedError as error:
                # A method that is not allowed, say, will not be later either: such a provider lists none.
                not_yet = error.status in (None, 404) or names_missing(error, job_id)
                if not_yet and await self.wait_for(subject, error):
                    continue
            else:
                self.visible(subject)
            self.store.jobs.checkpoints_found(row.key, models)
            return models

    async def earlier_models(self, member: int, wanted: int) -> dict[int, str]:
        """The member's models from before the end of its job, where ``wanted`` of each member are scored, by number:
        1 is the last one before the final model. Fewer, where the provider has fewer."""
        row = self.store.jobs.trained_by(member)
        if wanted == 1 or row is None:
            return {}
        known = self.store.jobs.checkpoints(row.key) is not None
        await self.checkpoints(row)
        models = self.store.jobs.earlier_models(member, wanted) or {}
        if not known and len(models) < wanted - 1:
            text = f"{name_of(member)} has {1 + len(models)} of the {wanted} models that ensemble.checkpoints asks for"
            self.emit(Event(EventKind.FEWER_MODELS, text, member, row.attempt))
        return models

    async def checkpoint_is_gone(self, member: int, number: int, model: str, error: RejectedError) -> bool:
        """Whether a refused request means that the provider no longer has this checkpoint; then it is left out.

        False: the request was refused for another reason. Whether it may only be late is :meth:`is_not_yet`'s question.
        """
        row = self.store.jobs.trained_by(member)
        if row is None or (error.status != 404 and await self.model_exists(model)):
            return False
        self.store.jobs.checkpoint_gone(row.key, number, str(error))
        text = f"{name_of(member)} is used without {model}: {error}"
        self.emit(Event(EventKind.FEWER_MODELS, text, member, row.attempt))
        return True

    async def is_not_yet(self, model: str, error: RejectedError) -> bool:
        """Whether a refused request about a new model is worth repeating: the provider does not show the model yet.

        Waits before it says so; False once the grace period is over, or where the model is not what is missing.
        """
        if error.status != 404 and (model not in str(error) or await self.model_exists(model)):
            return False
        return await self.wait_for(f"model {model}", error)

    async def delete_model(self, model: str) -> bool:
        """True where the model is gone now."""
        return await self.repeat(lambda: self.trainer.delete_model(model), f"delete {model}")


def request_of(row: JobRow) -> JobRequest:
    """The request of an attempt, as it was sent."""
    return JobRequest(**json.loads(row.request_json))


def _failed(job: Job, error: str) -> Job:
    return Job(job.id, JobStatus.FAILED, None, error, job.trained_tokens)
