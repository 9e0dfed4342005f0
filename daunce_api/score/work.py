"""``Work``: one execution of a run. It trains, scores each member as soon as it exists, and stops at enough of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any, TypedDict, Unpack

from .._util.clock import Clock
from .._util.log import logging_to
from ..attribution.from_store import assemble, complete_members
from ..core import SelfLDS
from ..data.dataset import Dataset
from ..data.example import Verdict
from ..errors import BudgetError, CapabilityError, DaunceError, MembersAlikeError, NotEnoughMembersError
from ..plan import JobCosts, Plan
from ..plan.asking import ANSWER_TOKENS, AskPlan, generation_usd, gone_text, too_few
from ..plan.inputs import HALTED, TESTS, RunInputs, with_cap
from ..providers.base import Generator
from ..providers.registry import Backend, open_backend
from ..providers.replay import Session
from ..store import TARGET, RunStore
from ..train import Event, EventKind, JobClient, OnEvent, Training
from ..train.stopping import Stopping
from .cache import open_cache
from .cleaning import take_off_before
from .client import Progress, ScoringClient
from .health import Comparison
from .members import MemberScoring, score_questions, tokens_of
from .sending import Budget

LOG_NAME = "daunce.log"
"""Inside the run folder."""


class Options(TypedDict, total=False):
    """How a run is executed; see :meth:`daunce_api.Run.execute`."""

    on_event: OnEvent | None
    on_progress: Progress | None
    session: Session | None
    clock: Clock | None
    max_usd: float | None


class Work:
    """One execution of a run: what lives only while it trains and scores. Everything that lasts is in the store."""

    def __init__(self, run: RunInputs, **options: Unpack[Options]) -> None:
        self._run = run
        self._max_usd = options.get("max_usd")
        self._config = with_cap(run.config, self._max_usd)
        if (cap := self._config.budget.max_usd) is not None:
            self._config = with_cap(run.config, max(0.0, cap - sum(run.spent_elsewhere().values())))
        self._on_event = options.get("on_event")
        self._on_progress = options.get("on_progress")
        self._session = session = options.get("session")
        self._clock = options.get("clock") or (None if session is None else session.clock)
        self._replayed = None if session is None else session.replayed
        self._stop = Stopping(run.config.ensemble.stop)

    async def run(self) -> None:
        """Train and score what is missing; nothing is opened where nothing is.

        Raises MembersAlikeError as soon as members show that the endpoint does not serve the fine-tunes: their scores
        are set aside, so that the same call scores them again.
        """
        run, session = self._run, self._session
        plan = run.plan(max_usd=self._max_usd)
        plan.check()
        run_key = None if session is None else session.run_key
        with RunStore.create_or_open(run.run_dir, run.manifest(), run_key=run_key, accept_loss=run.adopts) as store:
            self._store, self._comparison = store, Comparison(store)
            if session is not None:
                session.check_run(store.run_key)
            run.keep(store)
            with logging_to(run.run_dir / LOG_NAME), store.history.busy():
                if session is None:
                    await take_off_before(run.config, store)
                if self._max_usd is not None:
                    store.note("budget", f"max_usd {self._max_usd:g} for this command")
                try:
                    await self._train_and_score(plan)
                except MembersAlikeError as error:
                    raise self._set_aside(error) from error
                except DaunceError as error:
                    with suppress(DaunceError):  # what ended the run is what has to be said
                        store.history.stopped("error", str(error))
                    raise

    async def _train_and_score(self, plan: Plan) -> None:
        run, store = self._run, self._store
        members = await asyncio.to_thread(complete_members, store, run.material)
        await self._compare(members)
        if await self._enough(members) or len(members) == run.material.ensemble.members:
            return
        store.history.cleared()
        async with self._backend() as backend:
            await self._at(backend, plan)
        await self._compare(await asyncio.to_thread(complete_members, store, run.material))

    async def ask(self, questions: Dataset, plan: AskPlan, verdict: Verdict | None = None) -> None:
        """Add questions to the run and score them under the models that exist."""
        run, session = self._run, self._session
        with RunStore.open(run.run_dir) as store:
            self._store = store
            if session is not None:
                session.belongs_to(store.run_key)
            added = run.questions.asked(questions)
            run.take(added if verdict is None else added.marked(questions.ids, verdict))
            run.keep(store)
            if not plan.requests:
                return
            with logging_to(run.run_dir / LOG_NAME), store.history.busy():
                if session is None:
                    await take_off_before(run.config, store)
                async with self._backend() as backend:
                    client, jobs = self._client(backend, plan.usd_per_token), self._jobs(backend)
                    await self._score_questions(client, jobs, plan, questions)

    async def _score_questions(
        self,
        client: ScoringClient,
        jobs: JobClient,
        plan: AskPlan,
        questions: Dataset,
        *,
        members_only: bool = False,
    ) -> None:
        run, store = self._run, self._store
        trained = run.trained_members(store)
        gone = await score_questions(
            client,
            store,
            jobs,
            run.encoded_questions(questions),
            run.models_to_ask(store, trained, members_only=members_only),
            usd_per_token=plan.usd_per_token,
            cap=self._config.budget.max_usd,
            on_progress=self._on_progress,
        )
        for member, why in gone.items():
            row = store.jobs.trained_by(member)
            if row is not None:
                store.jobs.model_deleted(row.key)
            store.note("model gone", f"member {member}: {why}")
        lost = [k for k in trained if k not in store.jobs.ready_models()]
        if shortfall := too_few(len(trained) - len(lost), len(trained)):
            raise NotEnoughMembersError(f"{shortfall} {gone_text(lost)}")

    async def generate(
        self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], members: Sequence[int] = (TARGET,)
    ) -> list[list[str]]:
        """What each model (default: the target) answers to each prompt or list of messages; booked before it is sent.

        Raises CapabilityError where nothing can give an answer, BudgetError beyond the cap.
        """
        config = self._config
        with RunStore.open(self._run.run_dir) as store:
            models = {
                **({TARGET: given} if (given := config.ensemble.target_model) else {}),
                **store.jobs.ready_models(),
            }
            if not models.keys() >= set(members):
                raise CapabilityError(
                    "the run has no target model (ensemble.start_from is base), so there is nothing to generate an "
                    "answer: give the answer. Nothing was sent."
                )
            async with open_backend(config) as backend:
                if not isinstance(backend.scorer, Generator):
                    raise CapabilityError(
                        f"{backend.scorer.capabilities.provider} does not generate answers: give the answer. Nothing "
                        "was sent."
                    )
                answers = []
                for prompt in prompts:
                    usd = generation_usd(config, prompt)
                    if usd is None and config.budget.max_usd is not None:
                        raise BudgetError(
                            "budget.max_usd is set, but the price of generating an answer is not known. Nothing was "
                            "sent. Set budget.price (input and output), or give the answer."
                        )
                    usd = len(members) * (usd or 0.0)
                    store.ledger.add("generate", usd, purpose="ask", cap=config.budget.max_usd)
                    answers.append(
                        [await backend.scorer.generate(models[k], prompt, max_tokens=ANSWER_TOKENS) for k in members]
                    )
        return answers

    @asynccontextmanager
    async def _backend(self) -> AsyncIterator[Backend]:
        """The opened backend, its traffic recorded or replayed where that is wanted."""
        session = self._session
        if session is not None and session.not_checked and self._on_event is not None:
            text = f"This replay does not check: {'; '.join(session.not_checked)}."
            self._on_event(Event(EventKind.NOT_CHECKED, text))
        with session or nullcontext():
            async with open_backend(self._run.config, replaying=self._replayed is not None) as backend:
                yield backend

    def _client(self, backend: Backend, usd_per_token: float) -> ScoringClient:
        return ScoringClient(
            backend.scorer,
            self._store,
            concurrency=self._config.scoring.concurrency,
            clock=self._clock,
            # A recording holds every request, so nothing may be answered from elsewhere.
            cache=open_cache(self._run.config) if self._session is None else None,
            reduction=self._config.attribution.loss,
            budget=Budget(usd_per_token, self._config.budget.max_usd),
            replayed=self._replayed,
            base=self._config.backend.model,
        )

    def _jobs(self, backend: Backend, costs: JobCosts | None = None) -> JobClient:
        return JobClient(
            backend.trainer,
            self._store,
            costs=costs,
            cap=None if costs is None else self._config.budget.max_usd,
            purpose="retrain" if self._run.purpose == "retrain" else "train",
            on_event=self._on_event,
            clock=self._clock,
            replayed=self._replayed,
        )

    async def _at(self, backend: Backend, plan: Plan) -> None:
        run, store, config, material = self._run, self._store, self._config, self._run.material
        tokens = tokens_of(material.encoded) + plan.test_tokens
        self._scorer = client = self._client(backend, (plan.scoring_usd_per_model or 0.0) / tokens)
        jobs = self._jobs(backend, plan.costs)
        self._training = Training(jobs, ensemble=material.ensemble, dataset=run.train, config=config, adopt=run.adopts)
        self._scoring = MemberScoring(
            client,
            store,
            jobs,
            config,
            material.encoded_test,
            material.encoded_train,
            usd_per_model=plan.scoring_usd_per_model,
            usd_again=plan.again_usd,
            purpose=run.purpose,
            on_progress=self._on_progress,
        )
        base = config.backend.model
        plan.check_model(await jobs.first_contact(base))
        if backend.scorer.capabilities.max_models is None and not run.questions_only:
            # Before anything is paid for. An endpoint that has to load each model is tested with members alone.
            await client.probe(base, self._scoring.shortest)
        trained = run.trained_members(store)
        if trained and not run.questions_only:
            more = run.asking(run.test, members_only=True, max_usd=self._max_usd)
            if more.requests:  # the test file has more lines than before
                more.check()
                await self._score_questions(client, jobs, more, run.test, members_only=True)
        try:
            one_first = not backend.scorer.capabilities.fine_tunes_verified
            await self._training.run(self._score, finished=trained, one_first=one_first)
        except MembersAlikeError:
            await client.drain()
            raise

    async def _score(self, member: int, model: str) -> None:
        """Everything that is asked of one member's models, as soon as they exist."""
        run = self._run
        if member == TARGET and not self._config.scoring.target:
            return
        await self._scoring.member(member, model)
        if member == TARGET or run.questions_only:
            return
        members = await asyncio.to_thread(complete_members, self._store, run.material)
        if self._replayed is None:
            base, examples = self._config.backend.model, run.material.encoded_train
            await self._comparison.look_for_base(self._scorer, members, base, examples, self._config.attribution.loss)
        if not self._comparison.due(len(members)) and self._config.ensemble.stop is None:
            return
        await self._compare(members, self._scorer)
        if await self._enough(members):
            self._training.halt()

    async def _compare(self, members: list[int], client: ScoringClient | None = None) -> None:
        """Compare the first complete members with each other, before more of them are paid for."""
        due = client is None or self._comparison.due(len(members))
        if self._run.questions_only or len(members) < 2 or not due:
            return
        attribution = await asyncio.to_thread(assemble, self._store, self._run.material, self._config)
        await self._comparison.look(attribution, client, self._run.material.encoded_train)

    async def _enough(self, members: list[int]) -> bool:
        """Whether no further member is needed, by ``ensemble.stop``: a plan asks for no more under the same rule."""
        rule, store = self._config.ensemble.stop, self._store
        if rule is None:
            return False

        def look() -> str | None:
            def quality(chosen: Sequence[int]) -> SelfLDS | None:
                attribution = assemble(self._store, self._run.material, self._config)
                return attribution.of_members([attribution.members.index(k) for k in chosen]).self_lds

            return self._stop.reason(members, quality)

        reason = await asyncio.to_thread(look)
        if reason is None:
            return False
        stop = store.history.stop()
        if stop is None or stop.kind != HALTED:
            store.history.stopped(HALTED, reason)
        store.set_value(HALTED, rule.model_dump())
        return True

    def _set_aside(self, error: MembersAlikeError) -> MembersAlikeError:
        """Set the scores aside that may not be those of their models."""
        store = self._store
        members = sorted({m for m, _, _ in store.scores.models()}) if error.members is None else list(error.members)
        store.scores.set_aside(members, str(error), suspect=True)
        # An endpoint that served something else is tested again.
        served = None if error.members is None else {store.jobs.ready_models().get(k) for k in members}
        tests = store.get_value(TESTS, {})
        store.set_value(TESTS, {m: report for m, report in tests.items() if served is not None and m not in served})
        return MembersAlikeError(
            f"{error} What was scored of {_listed(members)} is set aside; the models are kept. Once the endpoint "
            "serves them, run the same command: it scores them again, and they are paid for again.",
            members,
        )


def _listed(members: Collection[int]) -> str:
    numbers = [str(k) for k in members if k != TARGET]
    named = f"member{'' if len(numbers) == 1 else 's'} {', '.join(numbers)}"
    return f"{named} and the target model" if TARGET in members else named
