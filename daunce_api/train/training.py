"""``Orchestrator``: K fine-tuning jobs, from the first upload to the last model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

from .._util.clock import Clock, SystemClock
from .._util.retry import RetryPolicy
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
from ..plan import JobCosts
from ..providers.base import JobStatus, ModelInfo, Trainer
from ..store import FINAL, TARGET, RunStore
from .attempts import Attempts, name_of
from .cleanup import cancel_jobs, clean_up
from .events import CancelReport, CleanReport, Event, EventKind, OnEvent, TrainingOutcome
from .jobs import Desk
from .policy import JOB_RETRIES, PollPolicy

OnReady = Callable[[int, str], Awaitable[None]]


class Orchestrator:
    """Trains the members of an ensemble with any ``Trainer``, and leaves every step in the store.

    What it promises, whenever and wherever it is interrupted: an attempt at a member becomes at most one job; a
    distinct training file is uploaded once; reserved and spent money never exceed ``budget.max_usd``; the same call
    again does only what is missing.
    """

    def __init__(
        self,
        trainer: Trainer,
        store: RunStore,
        *,
        ensemble: Ensemble,
        dataset: Dataset,
        config: RunConfig,
        costs: JobCosts | None = None,
        clock: Clock | None = None,
        retries: RetryPolicy = JOB_RETRIES,
        polls: PollPolicy | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """``costs``: tokens and price of each job; without it nothing is reserved, and a config with
        ``budget.max_usd`` is refused (BudgetError). ``rng`` spreads waiting times and nothing else."""
        if config.budget.max_usd is not None and costs is None:
            raise BudgetError(
                "budget.max_usd is set, but the price of a job is not known; nothing was sent. Set budget.price, or "
                "take max_usd out."
            )
        self._trainer = trainer
        self._store = store
        self._ensemble = ensemble
        self._config = config
        self._on_event: OnEvent | None = None
        self._desk = Desk(
            trainer,
            store,
            self._emit,
            clock=clock or SystemClock(),
            retries=retries,
            polls=polls or PollPolicy(),
            rng=rng or random.Random(),
        )
        self._slots = asyncio.Semaphore(
            config.backend.max_concurrent_jobs or max(1, trainer.capabilities.max_concurrent_jobs)
        )
        self._attempts = Attempts(
            self._desk, store, ensemble=ensemble, dataset=dataset, config=config, costs=costs, emit=self._emit
        )
        self._finished: frozenset[int] = frozenset()

    # -- the run --------------------------------------------------------------------------------------------------

    async def run(
        self,
        on_ready: OnReady | None = None,
        on_event: OnEvent | None = None,
        *,
        finished: Collection[int] = (),
    ) -> TrainingOutcome:
        """Train what is missing; call ``on_ready(member, model)`` for every member as soon as it has a model.

        ``on_ready`` is also called for members that were trained before, and with member -1 for the target model of
        ``start_from: target``; calls run at the same time as other jobs and each other. ``finished``: members of
        which nothing more is needed; they are not trained again even if their models are gone.

        Jobs that fail are tried up to ``training.max_attempts`` times, then their member is left out.

        Raises NotEnoughMembersError once fewer than ``training.min_members`` can remain; DailyLimitError or
        BudgetError when no more jobs can be submitted, after the live ones have ended and been handed over; StopError
        and everything else at once. In each case, and after cancellation (Ctrl-C), jobs go on at the provider and the
        same call takes them up.
        """
        self._on_event = on_event
        self._finished = frozenset(finished)
        self._attempts.begin()
        wanted = [k for k in range(self._ensemble.members) if k not in self._finished]
        failure: BaseException | None = None
        try:
            if wanted:
                async with asyncio.TaskGroup() as group:
                    base = await self._base(group, on_ready)
                    if base is not None:
                        for member in self._live_first(wanted):
                            group.create_task(self._member(member, base, on_ready))
        except BaseExceptionGroup as errors:
            failure = _gravest(errors)
        except asyncio.CancelledError:
            live = sum(row.status not in FINAL for row in self._store.jobs.rows())
            message = (
                f"Interrupted. {live} job{'' if live == 1 else 's'} may still be running at "
                f"{self._trainer.capabilities.provider} and nothing is lost: run the same command again to go on, or "
                "`daunce cancel` to stop them."
            )
            with suppress(StoreError):  # a full disk must not hide the interruption
                self._store.note("interrupted", message)
            self._emit(Event(EventKind.INTERRUPTED, message))
            raise
        if failure is not None:
            raise failure
        if self._attempts.parked is not None:
            raise self._attempts.parked
        models = self._store.jobs.ready_models()
        if self._config.ensemble.target_model is not None:
            models[TARGET] = self._config.ensemble.target_model
        self._require(len(self._finished | (models.keys() - {TARGET})))
        return TrainingOutcome(models, dict(self._attempts.left_out), self._attempts.halted)

    def halt(self, reason: str) -> None:
        """Submit no more jobs in this run; live ones are waited for. For a rule that says that K is large enough."""
        self._attempts.halt(reason)

    async def model_info(self, model: str) -> ModelInfo:
        """What the provider says of a model, asked as patiently as everything else. Raises RejectedError where it has
        none of this name."""
        return await self._desk.model_info(model)

    async def checkpoints(self, member: int) -> dict[int, str]:
        """The member's models from before the end of its job that ``ensemble.checkpoints`` asks for, by their number:
        1 is the last one before the final model. Fewer, where the provider has fewer."""
        asked = self._config.ensemble.checkpoints
        row = self._store.jobs.trained_by(member)
        if asked == 1 or row is None:
            return {}
        known = self._store.jobs.checkpoints(row.key) is not None
        found = await self._desk.checkpoints(row)
        models = {n: model for n, model in enumerate(reversed(found), start=1) if n < asked and model is not None}
        if not known and len(models) < asked - 1:
            text = f"{name_of(member)} has {1 + len(models)} of the {asked} models that ensemble.checkpoints asks for"
            self._emit(Event(EventKind.FEWER_MODELS, text, member, row.attempt))
        return models

    async def checkpoint_is_gone(self, member: int, number: int, model: str, error: RejectedError) -> bool:
        """Whether a refused request means that the provider no longer has this checkpoint; then it is left out."""
        row = self._store.jobs.trained_by(member)
        if row is None or (error.status != 404 and await self._desk.model_exists(model)):
            return False
        self._store.jobs.checkpoint_gone(row.key, number, str(error))
        text = f"{name_of(member)} is used without {model}: {error}"
        self._emit(Event(EventKind.FEWER_MODELS, text, member, row.attempt))
        return True

    async def cancel(self) -> CancelReport:
        """Cancel every job of the run that is not final, those found by their key included."""
        return await cancel_jobs(self._desk)

    async def clean(self) -> CleanReport:
        """Cancel what runs, then delete the models and files that this run created: all of them and only them."""
        return await clean_up(self._desk)

    # -- one member -----------------------------------------------------------------------------------------------

    async def _base(self, group: asyncio.TaskGroup, on_ready: OnReady | None) -> str | None:
        """The model that members start from; None where no job may be submitted to make it."""
        ensemble = self._config.ensemble
        if ensemble.start_from == "base":
            return self._config.backend.model
        target = ensemble.target_model
        if target is None:
            async with self._slots:
                target = await self._attempts.train(TARGET, self._config.backend.model)
            if target is None:
                if self._attempts.may_submit:
                    raise NotEnoughMembersError(
                        "the target model, which every member starts from, could not be trained: "
                        f"{self._attempts.left_out.get(TARGET)}. Everything that was uploaded is kept; mend the cause "
                        "and run the same command again, with a higher training.max_attempts if they are used up."
                    )
                return None
        if on_ready is not None:
            group.create_task(self._hand_over(TARGET, target, on_ready))
        return target

    async def _member(self, member: int, base: str, on_ready: OnReady | None) -> None:
        while True:
            async with self._slots:
                model = await self._attempts.train(member, base)
            if model is None:
                break
            if on_ready is None or await self._hand_over(member, model, on_ready):
                return
        if member in self._attempts.left_out:
            self._require(len({*range(self._ensemble.members)} - self._attempts.left_out.keys()))

    async def _hand_over(self, member: int, model: str, on_ready: OnReady) -> bool:
        """False where the model turned out to be gone, so that its member has to be trained again."""
        try:
            await on_ready(member, model)
        except (DailyLimitError, BudgetError) as error:
            self._attempts.park(error)
        except RejectedError as error:
            if await self._desk.model_exists(model) or member == TARGET:
                raise
            row = next(j for j in reversed(self._store.jobs.rows(member)) if j.model == model)
            reason = f"the provider no longer has {model} ({error})"
            self._store.scores.set_aside([member], reason, suspect=False)
            self._store.jobs.model_deleted(row.key)
            self._store.jobs.state(row.key, JobStatus.FAILED, error=reason)
            self._emit(Event(EventKind.FAILED, reason, member, row.attempt))
            return False
        return True

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _live_first(self, members: Sequence[int]) -> list[int]:
        """Members with a model, then those with a job, then the others: slots are given in this order, so that no
        new job is submitted as long as live ones could fill them."""
        rank: dict[int, int] = {}
        for row in self._store.jobs.rows():
            rank[row.member] = 2 if row.status not in FINAL else 3
        rank |= dict.fromkeys(self._store.jobs.ready_models(), 1)
        return sorted(members, key=lambda k: (rank.get(k, 3), k))

    def _require(self, possible: int) -> None:
        need = self._config.training.min_members
        if possible < need:
            reasons = [f"  {name_of(k)}: {why}" for k, why in sorted(self._attempts.left_out.items())]
            raise NotEnoughMembersError(
                "\n".join(
                    [
                        f"only {possible} of {self._ensemble.members} members can be had, and training.min_members is "
                        f"{need}. Models and scores so far are kept; mend the cause and run the same command again, "
                        "with a higher training.max_attempts if attempts are used up:",
                        *reasons[:20],
                    ]
                )
            )

    def _emit(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)


def _gravest(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to end with: a mistake in the program before a refusal, a refusal before a missing member."""
    leaves: list[BaseException] = []

    def walk(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                walk(inner)
        else:
            leaves.append(error)

    walk(errors)
    ranks = (NotEnoughMembersError, TransientError, ProviderError, DaunceError)
    leaves.sort(key=lambda e: next((i for i, kind in enumerate(ranks) if isinstance(e, kind)), len(ranks)))
    return leaves[-1]
