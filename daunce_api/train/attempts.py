"""Attempts at one model: submit a job, watch it, book it, try again or leave the member out."""

from __future__ import annotations

import json

from ..config import RunConfig
from ..data.dataset import Dataset
from ..data.subsets import Ensemble
from ..errors import BudgetError, DailyLimitError, DaunceError, RejectedError
from ..plan import JobCosts
from ..providers.base import Job, JobRequest, JobStatus
from ..store import FINAL, INTENT, TARGET, JobRow, RunStore
from .events import Event, EventKind, OnEvent
from .jobs import CANCELLED, Desk


class Attempts:
    """The jobs of one run, member by member, and why no more of them may be submitted.

    Attributes:
        parked: what stands in the way of further jobs for hours (a daily limit, the budget), None if nothing does.
        halted: the reason why no more members are wanted, if one was given.
        left_out: why members have no model, by member.
    """

    def __init__(
        self,
        desk: Desk,
        store: RunStore,
        *,
        ensemble: Ensemble,
        dataset: Dataset,
        config: RunConfig,
        costs: JobCosts | None,
        emit: OnEvent,
    ) -> None:
        self._desk = desk
        self._store = store
        self._ensemble = ensemble
        self._dataset = dataset
        self._config = config
        self._costs = costs
        self._emit = emit
        self.parked: DaunceError | None = None
        self.halted: str | None = None
        self.left_out: dict[int, str] = {}

    def begin(self) -> None:
        """Start a run anew: nothing is parked, and jobs that ended while nobody could book them are booked (the run
        was interrupted in between, or they were cancelled)."""
        self.parked, self.halted, self.left_out = None, None, {}
        open_keys = self._store.ledger.unsettled()
        for row in self._store.jobs.rows():
            if row.key in open_keys and row.status in FINAL:
                self._settle(row.key, row.member, row.trained_tokens)

    @property
    def may_submit(self) -> bool:
        """Whether new jobs may be submitted."""
        return self.parked is None and self.halted is None

    def park(self, error: DaunceError) -> None:
        """Submit no more jobs in this run; the first error is the one that it ends with."""
        if self.parked is not None:
            return
        if isinstance(error, DailyLimitError):
            error = DailyLimitError(
                f"{error} The run is parked: what was submitted was waited for, everything is kept. Run the same "
                "command again in some hours."
            )
        self.parked = error
        self._store.note("parked", str(error))
        self._emit(Event(EventKind.PARKED, str(error)))

    def halt(self, reason: str) -> None:
        """Submit no more jobs in this run, because there are enough members."""
        if self.halted is None:
            self.halted = reason
            self._store.note("halted", reason)

    async def train(self, member: int, base: str) -> str | None:
        """The member's model; None where it is left out, or where no more jobs may be submitted."""
        while True:
            rows = self._store.jobs.rows(member)
            row = rows[-1] if rows else None
            if row is not None and row.status == JobStatus.SUCCEEDED and row.model and not row.model_deleted:
                self._emit(Event(EventKind.READY, f"{name_of(member)} is {row.model}", member, row.attempt))
                return row.model
            if row is None or row.status in FINAL:
                used = [j for j in rows if j.error != CANCELLED and not (j.model_deleted and j.error is None)]
                if len(used) >= self._config.training.max_attempts:
                    self._leave_out(member, f"{used[-1].error or used[-1].status} (attempt {len(used)})")
                    return None
                if not self.may_submit:
                    return None
            try:
                if row is None or row.status in FINAL:
                    await self._submit(member, base, row)
                elif row.status == INTENT:
                    await self._desk.resubmit(row)
                row = self._store.jobs.rows(member)[-1]
                job = await self._desk.watch(row)
            except (DailyLimitError, BudgetError) as error:
                self.park(error)
                return None
            except RejectedError as error:
                if not await self._rejected(member, error):
                    self._leave_out(member, str(error))
                    return None
                continue
            self._settle(row.key, member, job.trained_tokens)
            if job.status is not JobStatus.SUCCEEDED and not await self._worth_another(row, job):
                return None

    async def _worth_another(self, row: JobRow, job: Job) -> bool:
        """Tell of a job without a model; False where the provider would refuse the next one for the same reason."""
        reason = str(job.error or job.status)
        self._emit(Event(EventKind.FAILED, f"{name_of(row.member)}: {reason}", row.member, row.attempt, job))
        if not job.refused or await self._file_was_gone(row):
            return True
        self._leave_out(row.member, reason)
        return False

    async def _submit(self, member: int, base: str, previous: JobRow | None) -> None:
        attempt = _next_attempt(previous)
        key = self._key(member, previous)
        if previous is not None and previous.model_deleted and previous.status == JobStatus.SUCCEEDED:
            reason = f"{previous.model} was deleted before everything was scored"
            self._store.scores.set_aside([member], reason, suspect=False)
        if self._costs is not None:
            self._store.ledger.reserve(
                key, self._costs.estimate(member), purpose="train", cap=self._config.budget.max_usd
            )
        training = self._config.training
        hyperparameters = training.hyperparameters
        if member == TARGET and training.target_hyperparameters is not None:
            hyperparameters = training.target_hyperparameters
        request = JobRequest(
            key=key,
            model=base,
            file_id=await self._desk.file(self._content(member)),
            seed=self._ensemble.target_seed if member == TARGET else int(self._ensemble.seeds_K[member]),
            hyperparameters=dict(hyperparameters),
            suffix=f"{self._config.name}-{self._store.run_key}-{'target' if member == TARGET else f'm{member}'}",
        )
        await self._desk.submit(request, member, attempt)

    def _key(self, member: int, previous: JobRow | None) -> str:
        return f"{self._store.run_key}-m{member}-a{_next_attempt(previous)}"

    def _content(self, member: int) -> bytes:
        positions = range(len(self._dataset)) if member == TARGET else self._ensemble.subset(member).tolist()
        return self._dataset.training_file(positions, self._config.data.loss_on)

    async def _rejected(self, member: int, error: RejectedError) -> bool:
        """Record that an attempt was refused; True where another one can do better (its file was gone)."""
        rows = self._store.jobs.rows(member)
        row = rows[-1] if rows else None
        if row is None or row.status != INTENT:  # it was the file that was refused
            self._store.ledger.settle(self._key(member, row), 0.0)
            return False
        self._store.jobs.state(row.key, JobStatus.FAILED, error=str(error))
        self._store.ledger.settle(row.key, 0.0)
        self._emit(Event(EventKind.FAILED, f"{name_of(member)}: {error}", member, row.attempt))
        return await self._file_was_gone(row)

    async def _file_was_gone(self, row: JobRow) -> bool:
        """Whether the provider no longer had the training file of a job; if so it is uploaded again."""
        file_id: str = json.loads(row.request_json)["file_id"]
        return await self._desk.file(self._content(row.member), verify=True) != file_id

    def _settle(self, key: str, member: int, trained_tokens: int | None) -> None:
        """Book what was billed: the price of the reported tokens. Where none are reported the reservation stands,
        since a job that failed may have been billed for its steps."""
        if self._costs is not None:
            usd = self._costs.estimate(member) if trained_tokens is None else self._costs.billed(trained_tokens)
            self._store.ledger.settle(key, usd)

    def _leave_out(self, member: int, reason: str) -> None:
        self.left_out[member] = reason
        self._store.jobs.leave_out(member, reason)
        self._emit(Event(EventKind.LEFT_OUT, f"{name_of(member)} is left out: {reason}", member))


def name_of(member: int) -> str:
    """A member in a sentence."""
    return "the target model" if member == TARGET else f"member {member}"


def _next_attempt(previous: JobRow | None) -> int:
    return 1 if previous is None else previous.attempt + 1
