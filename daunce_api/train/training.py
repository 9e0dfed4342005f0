"""``Training``: which member needs a job, how many attempts it gets, and when it is given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import suppress

from ..config import RunConfig
from ..data.dataset import Dataset
from ..data.subsets import Ensemble
from ..errors import (
    BudgetError,
    DailyLimitError,
    DaunceError,
    NotEnoughMembersError,
    ProviderError,
    RejectedError,
    StoreError,
    TransientError,
)
from ..providers.base import Job, JobRequest, JobStatus
from ..store import FINAL, INTENT, TARGET, JobRow, name_of
from .audit import audit, check, end_orphan, say_unseen
from .client import CANCELLED, JobClient
from .events import Event, EventKind
from .files import Recipes

OnReady = Callable[[int, str], Awaitable[None]]

ORPHANS_EVERY = 60.0
"""Seconds between two looks for a second job of an attempt whose submit was repeated."""


class Training:
    """Trains the members of an ensemble with any ``Trainer``, and leaves every step in the store.

    What it promises, whenever and wherever it is interrupted: an attempt at a member becomes at most one job; a
    distinct training file is uploaded once; reserved and spent money never exceed ``budget.max_usd``; the same call
    again does only what is missing. ``client`` gives exactly one job an attempt; which attempts there are is decided
    here. ``adopt``: jobs of this run that its folder does not know are taken over instead of ending the run.
    """

    def __init__(
        self, client: JobClient, *, ensemble: Ensemble, dataset: Dataset, config: RunConfig, adopt: bool = False
    ) -> None:
        self._client = client
        self._store = client.store
        self._ensemble = ensemble
        self._recipes = Recipes(client.files, ensemble, dataset, config, client.store.run_key, client.protocol)
        self._config = config
        self._adopts = adopt
        self._slots = asyncio.Semaphore(
            config.backend.max_concurrent_jobs or max(1, client.trainer.capabilities.max_concurrent_jobs)
        )
        self._finished: frozenset[int] = frozenset()
        self._parked: DaunceError | None = None
        self._halted = False
        self._left_out: dict[int, str] = {}

    # -- the run --------------------------------------------------------------------------------------------------

    async def run(
        self, on_ready: OnReady | None = None, *, finished: Collection[int] = (), one_first: bool = False
    ) -> None:
        """Train what is missing; call ``on_ready(member, model)`` for every member as soon as it has a model.

        ``on_ready`` is also called for members that were trained before, and with member -1 for the target model of
        ``start_from: target``; calls run at the same time as other jobs and each other, and are repeated while the
        provider does not show a new model yet. ``finished``: members of which nothing more is needed; they are not
        trained again even if their models are gone. ``one_first``: hand one member over before any other job is
        submitted, where it is not known whether fine-tunes of this provider can be scored.

        Jobs that fail are tried up to ``training.max_attempts`` times, then their member is left out.

        Raises UnknownJobsError where the provider has jobs of this run that the store does not know;
        NotEnoughMembersError once fewer than ``training.min_members`` can remain; DailyLimitError or BudgetError when
        no more jobs can be submitted, after the live ones have ended and been handed over; StopError and everything
        else at once. In each case, and after cancellation (Ctrl-C), jobs continue at the provider and the same call
        resumes them.
        """
        self._finished = frozenset(finished)
        self._begin()
        wanted = [k for k in range(self._ensemble.members) if k not in self._finished]
        failure: BaseException | None = None
        try:
            if wanted:
                untrained = {*wanted} - self._store.jobs.ready_models().keys()
                if untrained:
                    await check(self._client, adopt=self._request_of_unknown if self._adopts else None)
                async with asyncio.TaskGroup() as group:
                    base = await self._base(group, on_ready)
                    if base is not None:
                        members = self._live_first(wanted)
                        if one_first and on_ready is not None and not self._finished:
                            members = await self._one_first(members, base, on_ready)
                        for member in members:
                            group.create_task(self._member(member, base, on_ready))
                if untrained:
                    await check(self._client)
                    await say_unseen(self._client)
        except BaseExceptionGroup as errors:
            failure = _gravest(errors)
        except asyncio.CancelledError:
            live = sum(row.status not in FINAL for row in self._store.jobs.rows())
            message = (
                f"Interrupted. {live} job{'' if live == 1 else 's'} may still be running at "
                f"{self._client.trainer.capabilities.provider} and nothing is lost: run the same command again to "
                "resume, or `daunce cancel` to stop them."
            )
            with suppress(StoreError):  # a full disk must not hide the interruption
                self._store.note("interrupted", message)
            self._client.emit(Event(EventKind.INTERRUPTED, message))
            raise
        if failure is not None:
            raise failure
        if self._parked is not None:
            raise self._parked
        self._require(len(self._finished | (self._store.jobs.ready_models().keys() - {TARGET})))

    def halt(self) -> None:
        """Submit no more jobs in this run; live ones are waited for. For a rule that says that K is large enough."""
        self._halted = True

    # -- one member -----------------------------------------------------------------------------------------------

    async def _base(self, group: asyncio.TaskGroup, on_ready: OnReady | None) -> str | None:
        """The model that members start from; None where no job may be submitted to make it."""
        ensemble = self._config.ensemble
        if ensemble.start_from == "base":
            return self._config.backend.model
        target = ensemble.target_model
        if target is None:
            async with self._slots:
                target = await self._train(TARGET, self._config.backend.model)
            if target is None:
                if self._may_submit:
                    raise NotEnoughMembersError(
                        "the target model, which every member starts from, could not be trained: "
                        f"{self._left_out.get(TARGET)}. Everything that was uploaded is kept; fix the cause and run "
                        "the same command again, with a higher training.max_attempts if they are used up."
                    )
                return None
        if on_ready is not None:
            group.create_task(self._hand_over(TARGET, target, on_ready))
        return target

    async def _member(self, member: int, base: str, on_ready: OnReady | None) -> None:
        while True:
            async with self._slots:
                model = await self._train(member, base)
            if model is None:
                break
            if on_ready is None or await self._hand_over(member, model, on_ready):
                return
        if member in self._left_out:
            self._require(len({*range(self._ensemble.members)} - self._left_out.keys()))

    async def _one_first(self, members: list[int], base: str, on_ready: OnReady) -> list[int]:
        """Train and hand over one member before any other job is submitted; the members that are left."""
        for done, member in enumerate(members, start=1):
            await self._member(member, base, on_ready)
            if member not in self._left_out:
                return members[done:]
        return []

    async def _train(self, member: int, base: str) -> str | None:
        """The member's model; None where it is left out, or where no more jobs may be submitted."""
        client = self._client
        while True:
            rows = self._store.jobs.rows(member)
            row = rows[-1] if rows else None
            if row is not None and row.status == JobStatus.SUCCEEDED and row.model and not row.model_deleted:
                client.emit(Event(EventKind.READY, f"{name_of(member)} is {row.model}", member, row.attempt))
                return row.model
            if row is None or row.status in FINAL:
                used = [j for j in rows if j.error != CANCELLED and not (j.model_deleted and j.error is None)]
                if len(used) >= self._config.training.max_attempts:
                    self._leave_out(member, f"{used[-1].error or used[-1].status} (attempt {len(used)})")
                    return None
                if not self._may_submit:
                    return None
            try:
                if row is None or row.status in FINAL:
                    await self._submit(member, base, row)
                elif row.status == INTENT:
                    await client.resubmit(row)
                row = self._store.jobs.rows(member)[-1]
                job = await self._watch(row)
            except (DailyLimitError, BudgetError) as error:
                self._park(error)
                return None
            except RejectedError as error:
                if not await self._refused(member, error):
                    self._leave_out(member, str(error))
                    return None
                continue
            if job.status is not JobStatus.SUCCEEDED and not await self._worth_another(row, job):
                return None

    async def _watch(self, row: JobRow) -> Job:
        """Watch a job to its end; where it was sent more than once, look for the others meanwhile and cancel them."""
        if self._client.sends(row.key) < 2:
            return await self._client.watch(row)
        orphans = asyncio.create_task(self._end_orphans())
        try:
            return await self._client.watch(row)
        finally:
            orphans.cancel()
            await asyncio.gather(orphans, return_exceptions=True)

    async def _end_orphans(self) -> None:
        while True:
            await self._client.pause(ORPHANS_EVERY)
            with suppress(ProviderError):  # the run looks again before each submit and at its end
                for row, job in (await audit(self._client)).orphans:
                    await end_orphan(self._client, row, job)

    async def _submit(self, member: int, base: str, previous: JobRow | None) -> None:
        attempt = 1 if previous is None else previous.attempt + 1
        if previous is not None and previous.model_deleted and previous.status == JobStatus.SUCCEEDED:
            reason = f"{previous.model} was deleted before everything was scored"
            self._store.scores.set_aside([member], reason, suspect=False)
        key = f"{self._store.run_key}-m{member}-a{attempt}"
        self._client.money.reserve(key, member)
        try:
            request = await self._recipes.uploaded(member, base, key)
        except RejectedError:  # nothing was submitted
            self._store.ledger.settle(key, 0.0)
            raise
        await check(self._client)
        await self._client.submit(request, member, attempt)

    async def _request_of_unknown(self, member: int, key: str, file_id: str) -> JobRequest | None:
        """The request that this run would have sent with ``key``; None where ``file_id`` is not the member's file."""
        if not TARGET <= member < self._ensemble.members:
            return None
        ensemble = self._config.ensemble
        base: str | None = self._config.backend.model
        if member != TARGET and ensemble.start_from == "target":
            base = ensemble.target_model or self._store.jobs.ready_models().get(TARGET)
        if base is None or not await self._recipes.is_of(member, file_id):
            return None
        return self._recipes.request(member, base, key, file_id)

    async def _worth_another(self, row: JobRow, job: Job) -> bool:
        """Report a job without a model; False where the provider would refuse the next one for the same reason."""
        reason = str(job.error or job.status)
        text = f"{name_of(row.member)}: {reason}"
        self._client.emit(Event(EventKind.FAILED, text, row.member, row.attempt, job))
        if not job.refused or await self._file_was_gone(row):
            return True
        self._leave_out(row.member, reason)
        return False

    async def _refused(self, member: int, error: RejectedError) -> bool:
        """Record that an attempt was refused; True where another one can do better (its file was gone)."""
        rows = self._store.jobs.rows(member)
        row = rows[-1] if rows else None
        if row is None or row.status != INTENT:  # it was the file that was refused
            return False
        self._store.jobs.state(row.key, JobStatus.FAILED, error=str(error))
        self._store.ledger.settle(row.key, 0.0)
        self._client.emit(Event(EventKind.FAILED, f"{name_of(member)}: {error}", member, row.attempt))
        return await self._file_was_gone(row)

    async def _file_was_gone(self, row: JobRow) -> bool:
        """Whether the provider no longer had the training file of a job; if so it is uploaded again."""
        file_id: str = json.loads(row.request_json)["file_id"]
        return await self._recipes.file_id(row.member, verify=True) != file_id

    async def _hand_over(self, member: int, model: str, on_ready: OnReady) -> bool:
        """False where the model turned out to be gone, so that its member has to be trained again."""
        client = self._client
        try:
            while True:
                try:
                    await on_ready(member, model)
                except RejectedError as error:
                    if not await client.is_not_yet(model, error):
                        raise
                else:
                    client.visible(f"model {model}")
                    return True
        except (DailyLimitError, BudgetError) as error:
            self._park(error)
        except RejectedError as error:
            if await client.model_exists(model) or member == TARGET:
                raise
            row = next(j for j in reversed(self._store.jobs.rows(member)) if j.model == model)
            reason = f"the provider no longer has {model} ({error})"
            self._store.scores.set_aside([member], reason, suspect=False)
            self._store.jobs.model_deleted(row.key)
            self._store.jobs.state(row.key, JobStatus.FAILED, error=reason)
            client.emit(Event(EventKind.FAILED, reason, member, row.attempt))
            return False
        return True

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Nothing is parked, and jobs that ended while nobody could book them are booked (the run was interrupted in
        between, or they were cancelled)."""
        self._parked, self._halted, self._left_out = None, False, {}
        open_keys = self._store.ledger.unsettled()
        for row in self._store.jobs.rows():
            if row.key in open_keys and row.status in FINAL:
                self._client.money.settle(row.key, row.member, row.trained_tokens)

    @property
    def _may_submit(self) -> bool:
        return self._parked is None and not self._halted

    def _park(self, error: DaunceError) -> None:
        """Submit no more jobs in this run; the first error is the one that it ends with."""
        if self._parked is not None:
            return
        if isinstance(error, DailyLimitError):
            error = DailyLimitError(
                f"{error} The run is parked: what was submitted was waited for, everything is kept. Run the same "
                "command again in some hours."
            )
        self._parked = error
        self._store.note("parked", str(error))
        self._client.emit(Event(EventKind.PARKED, str(error)))

    def _leave_out(self, member: int, reason: str) -> None:
        self._left_out[member] = reason
        self._store.jobs.leave_out(member, reason)
        self._client.emit(Event(EventKind.LEFT_OUT, f"{name_of(member)} is left out: {reason}", member))

    def _live_first(self, members: Sequence[int]) -> list[int]:
        """Members with a model, then those with a job, then the others: slots are given in this order, so that no
        new job is submitted as long as live ones could fill them."""
        rank: dict[int, int] = {}
        for row in self._store.jobs.rows():
            rank[row.member] = 2 if row.status not in FINAL else 3
        rank |= dict.fromkeys(self._store.jobs.ready_models(), 1)
        return sorted(members, key=lambda k: (rank.get(k, 3), k))

    def _require(self, possible: int) -> None:
        minimum = self._config.training.min_members
        if possible < minimum:
            reasons = [f"  {name_of(k)}: {why}" for k, why in sorted(self._left_out.items())]
            raise NotEnoughMembersError(
                "\n".join(
                    [
                        f"only {possible} of {self._ensemble.members} members can be trained, and "
                        f"training.min_members is {minimum}. Models and scores so far are kept; fix the cause and run "
                        "the same command again, with a higher training.max_attempts if attempts are used up:",
                        *reasons[:20],
                    ]
                )
            )


def _gravest(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to end with: a mistake in the program before a refusal, a refusal before a missing member."""
    ranks = (NotEnoughMembersError, TransientError, ProviderError, DaunceError)

    def rank(error: BaseException) -> int:
        return next((i for i, kind in enumerate(ranks) if isinstance(error, kind)), len(ranks))

    return max(_leaves(errors), key=rank)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
    else:
        for inner in error.exceptions:
            yield from _leaves(inner)
