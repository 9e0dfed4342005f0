"""``Run``: the conductor. It plans, trains, scores, attributes, and answers further questions; nothing else does all.

A run has a *design* (which subsets its members are trained on) and *questions* (which answers are explained). The
retraining of an evaluation is a run with another design that is scored on its questions alone.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

from ._util.blocking import run_blocking
from ._util.clock import Clock, SystemClock
from ._util.log import logger, logging_to
from ._util.sections import BackendName, BackendSection, Sections
from ._util.text import terminal_text
from .attribution import Attribution
from .attribution.cause import Cause, cause_of
from .attribution.from_store import Material, assemble, complete_members, question_groups
from .config import VERSION, RunConfig
from .core import SelfLDS, per_example_losses
from .data.dataset import Dataset
from .data.questions import Questions, Verdict, keep_dataset, kept_dataset
from .data.subsets import Ensemble, plan_ensemble
from .data.tokenizers import EncodedExample, Tokenizer, encode_dataset
from .errors import (
    CapabilityError,
    ConfigurationError,
    DataError,
    DaunceError,
    MembersAlikeError,
    NotEnoughMembersError,
)
from .plan import Missing, Plan, make_plan, plan_of_missing
from .plan.asking import BASE, AskPlan, gone_text, plan_asking, too_few
from .providers.base import Deferred, Generator, within_scope
from .providers.registry import Backend, capabilities_of, open_backend, open_tokenizer
from .providers.replay import Session
from .score.asking import QuestionScoring
from .score.cache import ScoredCache, open_cache
from .score.client import PROBE_VALUE, Progress, ScoringClient
from .score.health import check_served
from .score.leftovers import take_off, take_off_before
from .score.members import Asked, MemberScoring
from .status import RunStatus, status_of
from .store import FINAL, TARGET, RunStore
from .store.ledger import Purpose
from .store.run import FILE_NAME as DATABASE
from .train import JOB_RETRIES, CancelReport, CleanReport, Event, OnEvent, Orchestrator, PollPolicy
from .train.cleanup import cancel_jobs, clean_up
from .train.jobs import Desk
from .train.stopping import StopRule

DATA_FOLDER, LOG_NAME = "data", "daunce.log"
"""Inside the run folder: the examples as they were read, and the log."""

Answer = TypeVar("Answer")

ANSWER_TOKENS = 256
"""Most tokens of an answer that the target generates."""


class Run:
    """One run: a config, its data, and the folder that keeps everything that was bought and measured.

    ``Run.create`` starts or resumes a run, ``Run.open`` opens an existing one. Nothing is written before
    :meth:`execute`.

        run = Run.create("run.yaml")
        print(run.plan().text())      # what it will cost; nothing is sent
        attribution = run.execute()   # trains and scores what is missing

    ``design`` gives the subsets and seeds of the members instead of drawing them from the config; ``wanted``: only its
    first so many. With ``questions_only``, members are not scored on the training examples, so that there are losses
    and no attribution.
    """

    def __init__(
        self,
        config: RunConfig,
        train: Dataset,
        test: Dataset | Questions,
        *,
        design: Ensemble | None = None,
        wanted: int | None = None,
        questions_only: bool = False,
        purpose: Purpose = "score",
    ) -> None:
        self.config = config
        self.train = train
        self.questions = test if isinstance(test, Questions) else Questions.of(test)
        self.design = design
        self.questions_only = questions_only
        self._wanted = wanted
        self._purpose: Purpose = purpose
        self._encoded: dict[Dataset, tuple[EncodedExample, ...]] = {}
        self._plan: Plan | None = None
        self._attributed: tuple[object, tuple[Attribution, ...]] | None = None

    @classmethod
    def create(cls, config: RunConfig | Mapping[str, Any] | str | Path) -> Run:
        """From a config, a mapping of its keys, or the path of a YAML file; reads and checks the data.

        A run that was started keeps its recipe: defaults that have changed since are those of its version. Lines that
        the test file has more than before become questions of the run. Raises ConfigurationError, DataError.
        """
        if isinstance(config, str | Path):
            config = RunConfig.from_yaml(config)
        elif not isinstance(config, RunConfig):
            config = RunConfig.from_mapping(dict(config))
        for path in (config.data.train, config.data.test):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ConfigurationError(f"{path} is not a regular file, and examples are read more than once.")
        return cls.of(config, Dataset.from_jsonl(config.data.train), Dataset.from_jsonl(config.data.test))

    @classmethod
    def of(cls, config: RunConfig, train: Dataset, test: Dataset, **design: Any) -> Run:
        """From a config and examples that are read already; takes up what its folder holds. ``design``: further
        arguments of the class."""
        if not RunStore.exists(config.run_dir):
            return cls(config, train, test, **design)
        with RunStore.open(config.run_dir, read_only=True) as store:
            manifest, value = store.manifest, store.get_value("questions")
        version = int(manifest.get("version", 1))
        config = config.as_started(version)
        questions = Questions.of(test)
        if value or manifest["test_digest"] != test.digest:
            # Read only where it is needed: the copy may be damaged, and is written anew from the original.
            kept = Questions.read(config.run_dir / DATA_FOLDER, value, manifest["test_digest"], instead=test)
            questions = kept.from_file(test)
        run = cls(config, train, questions, **design)
        run._version = version
        return run

    @classmethod
    def open(cls, run_dir: str | Path) -> Run:
        """An existing run folder, as it was started; the original data files are not needed.

        Runs of earlier versions open, too; what of their config is gone is in :attr:`warnings`. Raises StoreError where
        there is no run, StoreCorruptError where the kept examples are not those of the run.
        """
        run_dir = Path(run_dir)
        with RunStore.open(run_dir, read_only=True) as store:
            manifest, questions, design = store.manifest, store.get_value("questions"), store.get_value("design")
        config, gone = RunConfig.from_manifest(manifest)
        config = config.model_copy(update={"run_dir": run_dir.resolve()})
        data = run_dir / DATA_FOLDER
        train = kept_dataset(data / "train.jsonl", manifest["train_digest"])
        run = cls(
            config,
            train,
            Questions.read(data, questions, manifest["test_digest"]),
            design=None if design is None else Ensemble.from_value(design["ensemble"]),
            questions_only=design is not None and design["questions_only"],
            purpose="score" if design is None else "retrain",
        )
        run._version, run._gone = int(manifest.get("version", 1)), gone
        return run

    _version: int = VERSION
    """Of the config's keys, when the run was started."""
    _gone: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape = f"{self.config.ensemble.members} members of {self.config.backend.model} at {self.config.backend.kind}"
        examples = f"{len(self.train)} training examples, {len(self.test)} questions"
        started = "" if RunStore.exists(self.run_dir) else ", not started"
        return f"Run({str(self.run_dir)!r}, {shape}, {examples}{started})"

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.config.run_dir

    @property
    def test(self) -> Dataset:
        """The questions: the answers that are explained."""
        return self.questions.shown

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed in the data and the config, and kept."""
        return self.train.warnings + self.questions.batches[0].examples.warnings + self._gone

    # -- before anything is spent ---------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config's model."""
        return open_tokenizer(self.config)

    def encoded(self, dataset: Dataset) -> tuple[EncodedExample, ...]:
        """A data set as token ids of the run's tokenizer, with the run's ``loss_on``; encoded once.

        Raises DataError that lists every line that cannot be encoded.
        """
        if dataset not in self._encoded:
            self._encoded[dataset] = encode_dataset(dataset, self.tokenizer, self.config.data.loss_on)
        return self._encoded[dataset]

    def share_encoding(self, other: Run) -> None:
        """Take over what another run of the same tokenizer has encoded, so that it is not encoded twice."""
        self._encoded |= other._encoded
        if "tokenizer" in other.__dict__:
            self.__dict__["tokenizer"] = other.tokenizer

    def plan(self, *, max_usd: float | None = None) -> Plan:
        """Jobs, tokens, dollars and time of what is missing: of the whole run before it is started. No network, no key,
        nothing is written. ``max_usd`` takes the place of ``budget.max_usd``.

        Raises DataError or ConfigurationError. Reasons not to start are in ``Plan.refusals``; :meth:`Plan.check` raises
        the first.
        """
        config = with_cap(self.config, max_usd)
        elsewhere = sum(self.spent_elsewhere().values())
        if RunStore.exists(self.run_dir):
            with RunStore.open(self.run_dir, read_only=True) as store:
                missing = self._missing(store)
        elif elsewhere:
            everything = self._whole_plan()
            missing = Missing(everything.submitted, everything.submitted, everything.models)
        else:
            return plan_of_missing(config, self._whole_plan(), None)
        missing = replace(missing, spent_usd=missing.spent_usd + elsewhere)
        return plan_of_missing(config, self._whole_plan(), missing)

    def spent_elsewhere(self) -> dict[str, float]:
        """Dollars that other runs of the family have spent or reserved, by purpose: the cap is for a run and all
        retraining within its folder together."""
        total: dict[str, float] = {}
        for folder in family_of(self.run_dir):
            if folder.resolve() != self.run_dir.resolve():
                with RunStore.open(folder, read_only=True) as store:
                    for purpose, usd in store.ledger.spent_by_purpose().items():
                        total[purpose] = total.get(purpose, 0.0) + usd
        return total

    def _whole_plan(self) -> Plan:
        """Cached per UTC day: provider shutdown dates depend on it."""
        today = datetime.now(UTC).date()
        if self._plan is None or self._plan.today != today:
            self._plan = make_plan(
                self.config,
                self.train,
                self.test,
                self.encoded,
                *capabilities_of(self.config),
                design=self.design,
                questions_only=self.questions_only,
                today=today,
            )
        return self._plan

    def _missing(self, store: RunStore) -> Missing:
        material, shape = self.material, self.config.ensemble
        done, ready = set(self.trained_members(store)), store.jobs.ready_models()
        live = {job.member for job in store.jobs.rows() if job.status not in FINAL}
        members = range(material.ensemble.members)
        training = {k for k in members if k not in done and k not in ready}
        asked = [k for k in members if k not in done or k in ready]
        models = sum(not material.is_scored(store, k, n) for k in asked for n in range(material.models))
        target_unscored = self.config.scoring.target and not material.is_scored(store, TARGET)
        made_here = shape.start_from == "target" and shape.target_model is None
        if made_here and TARGET not in ready and (training or target_unscored):
            training.add(TARGET)
        return Missing(frozenset(training - live), frozenset(training), models + target_unscored, store.ledger.spent())

    def trained_members(self, store: RunStore) -> list[int]:
        """Members whose every training example is scored (every question, where a run has those alone): their models
        are never trained again."""
        if self.questions_only:
            return complete_members(store, self.material)
        return complete_members(store, replace(self.material, encoded_test=()))

    @cached_property
    def material(self) -> Material:
        """The examples as token ids, and the design. Raises DataError for examples that cannot be encoded and
        CapabilityError for those that the scorer cannot measure."""
        trainer, scorer = capabilities_of(self.config)
        shape = self.config.ensemble
        design = self.design
        if design is None:
            design = plan_ensemble(
                len(self.train), shape.members, shape.subset_ratio, shape.seed, min_subset=trainer.min_examples
            )
        elif self._wanted is not None:
            design = design.first(self._wanted)
        asked = () if self.questions_only else self.encoded(self.train)
        return Material(
            self.train,
            self.test,
            scorer.measured,
            tuple(within_scope(e, scorer) for e in asked),
            tuple(within_scope(e, scorer) for e in self.encoded(self.test)),
            design,
            shape.checkpoints,
            priced=self._whole_plan().usd is not None,
        )

    # -- the run --------------------------------------------------------------------------------------------------

    def execute(
        self,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
        max_usd: float | None = None,
    ) -> Attribution:
        """Train and score what is missing, then attribute; the same call again does only what is missing.

        ``on_event`` and ``on_progress`` are called as it goes on; ``session`` records or replays the API traffic
        (:mod:`daunce_api.providers.replay`); ``max_usd`` takes the place of ``budget.max_usd`` for this call, and is
        recorded. Whatever ends it, what was trained and scored is kept. Raises any
        :class:`~daunce_api.errors.DaunceError`; KeyboardInterrupt leaves a run that the same call resumes.
        """
        self.measure(on_event=on_event, on_progress=on_progress, session=session, clock=clock, max_usd=max_usd)
        return self.attribution()

    async def execute_async(
        self,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
        max_usd: float | None = None,
    ) -> Attribution:
        """:meth:`execute` for programs that run an event loop of their own."""
        work = Work(self, on_event=on_event, on_progress=on_progress, session=session, clock=clock, max_usd=max_usd)
        await work.run()
        return await asyncio.to_thread(self.attribution)

    def measure(
        self,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
        max_usd: float | None = None,
    ) -> None:
        """:meth:`execute` without an attribution: for designs that are scored on their questions alone."""
        work = Work(self, on_event=on_event, on_progress=on_progress, session=session, clock=clock, max_usd=max_usd)
        run_blocking(work.run())

    # -- results --------------------------------------------------------------------------------------------------

    def attributions(self) -> tuple[Attribution, ...]:
        """One attribution for each group of questions that the same members answered; the largest group first.

        Usually there is one. Questions that were asked after some models were gone are answered by fewer members and
        form a group of their own, with its own quality. Also while another process works on the run; nothing is read
        again where nothing changed. Raises NotEnoughMembersError where no question has two members, StoreError where
        there is no run.
        """
        with RunStore.open(self.run_dir, read_only=True) as store:
            state = (store.sequence, self.questions)
            if self._attributed is None or self._attributed[0] != state:
                self._attributed = (state, self._attribute(store))
            return self._attributed[1]

    def attribution(self, question: str | None = None) -> Attribution:
        """The attribution of the group that holds a question; default: the first of :meth:`attributions`.

        Raises DataError for an unknown question, NotEnoughMembersError for one that too few members have answered.
        """
        groups = self.attributions()
        if question is None:
            return groups[0]
        self.test.position(question)
        for group in groups:
            if question in group.test.ids:
                return group
        raise NotEnoughMembersError(
            f"{question!r} is not answered by enough members yet. `daunce run` or `daunce ask` scores what is missing."
        )

    def _attribute(self, store: RunStore) -> tuple[Attribution, ...]:
        if self.questions_only:
            raise ConfigurationError(
                f"{self.run_dir} holds models that are scored on the questions alone: there are losses and no "
                "attribution. It belongs to an evaluation of another run."
            )
        groups = question_groups(store, self.material, self.questions)
        if not groups:
            trained = len(self.trained_members(store))
            raise NotEnoughMembersError(
                f"{trained} of {self.material.ensemble.members} members are trained and scored; attribution needs at "
                "least 2. Everything so far is kept: run `daunce run` again to resume."
            )
        return tuple(assemble(store, group, self.config, self.tokenizer) for group in groups)

    # -- further questions ----------------------------------------------------------------------------------------

    def ask(
        self,
        questions: Dataset | None = None,
        *,
        prompt: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        verdict: Verdict | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
        max_usd: float | None = None,
    ) -> Attribution:
        """Which training examples made the model answer this? Asked of the members that exist: no fine-tuning.

            run = Run.open("runs/support-bot")
            run.ask(prompt="Do you charge a fee?", answer="Yes, $20.")

        Either ``questions``, or a ``prompt`` with its ``answer`` (default: what the target model answers, where the
        endpoint generates) and perhaps a ``system`` prompt. The questions become part of the run. With a provider that
        bills, this spends a little without a question, up to ``budget.max_usd``; :meth:`asking` has the price.

        Returns the attribution of the group that holds the (first) question; ``focus`` names those that were asked.
        Raises NotEnoughMembersError where fewer than 3, or than half of the members, have a model; CapabilityError,
        DataError, BudgetError, and what the provider's errors are.
        """
        if (questions is None) == (prompt is None):
            raise ConfigurationError("ask needs either questions or a prompt.")
        if questions is None:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": str(prompt)})
            questions = self.question(messages, answer)
        plan = self.asking(questions, max_usd=max_usd)
        plan.check()
        work = Work(self, on_progress=on_progress, session=session, clock=clock, max_usd=max_usd)
        run_blocking(work.ask(questions, plan, verdict))
        return replace(self.attribution(questions.ids[0]), focus=tuple(questions.ids))

    def question(self, messages: Sequence[Mapping[str, Any]], answer: str | None = None) -> Dataset:
        """One question as a data set: the messages before the answer, and the answer.

        Without an answer it is the last message where that is the assistant's, and otherwise what the target model
        generates. A run of prompt/completion examples gets such a question where there is a single user message.
        Raises DataError; CapabilityError where there is no target, or its endpoint does not generate.
        """
        turns = [dict(message) for message in messages]
        if answer is None and turns and turns[-1].get("role") == "assistant":
            answer = turns.pop()["content"]
        plain = not self.train[0].is_chat and len(turns) == 1
        if answer is None:
            answer = run_blocking(Work(self).generate(turns[0]["content"] if plain else turns))
        record: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": answer}]}
        if plain:
            record = {"prompt": turns[0]["content"], "completion": answer}
        (example,) = Dataset.from_records([record], name="question")
        known = [e for batch in self.questions for e in batch.examples if e.content_hash == example.content_hash]
        if known:
            return Dataset(known[:1], name="question")
        return Dataset.from_records([{"id": f"ask-{example.content_hash[:8]}", **record}], name="question")

    def asking(self, questions: Dataset, *, members_only: bool = False, max_usd: float | None = None) -> AskPlan:
        """What asking these questions costs, and why it may be refused; nothing is sent. ``members_only``: not of the
        base and the target.

        Raises StoreError where the run was not started, DataError where a question cannot be encoded.
        """
        encoded = self.encoded_questions(questions)
        with RunStore.open(self.run_dir, read_only=True) as store:
            trained = self.trained_members(store)
            models = self.models_to_ask(store, trained, members_only=members_only)
            missing = {
                member: [e for e in encoded for n in checkpoints if not _has(store, e, member, n)]
                for member, checkpoints in models.items()
            }
            spent = store.ledger.spent() + sum(self.spent_elsewhere().values())
        return plan_asking(
            with_cap(self.config, max_usd),
            encoded,
            {member: asked for member, asked in missing.items() if asked},
            capabilities_of(self.config)[1],
            trained=trained,
            gone=[k for k in trained if k not in models],
            spent_usd=spent,
        )

    def encoded_questions(self, questions: Dataset) -> tuple[EncodedExample, ...]:
        """Questions as the scorer measures them; one that it cannot measure as it is, for the plan to name."""
        scorer = capabilities_of(self.config)[1]

        def scoped(example: EncodedExample) -> EncodedExample:
            try:
                return within_scope(example, scorer)
            except CapabilityError:
                return example

        return tuple(scoped(e) for e in self.encoded(questions))

    def models_to_ask(
        self, store: RunStore, trained: Collection[int], *, members_only: bool = False
    ) -> dict[int, dict[int, str]]:
        """Models by member and checkpoint: of the members that are trained, of the base, and of the target."""
        ready = store.jobs.ready_models()
        models: dict[int, dict[int, str]] = {}
        for member in trained:
            row = store.jobs.trained_by(member)
            if member not in ready or row is None:
                continue
            earlier = store.jobs.checkpoints(row.key) or ()
            numbers = store.jobs.wanted_checkpoints(member, self.material.models) or ()
            models[member] = {0: ready[member], **{n: str(earlier[-n]) for n in numbers}}
        if members_only:
            return models
        target = ready.get(TARGET) or self.config.ensemble.target_model
        if target is not None:
            models[TARGET] = {0: target}
        if capabilities_of(self.config)[1].tried_on == "base":
            models[BASE] = {0: self.config.backend.model}
        return models

    def cause(self, question: str) -> Cause:
        """Whether fine-tuning made this answer more likely: its loss under the base and the target beside the members'.

        Raises DataError for an unknown question, NotEnoughMembersError where too few members have answered it.
        """
        attribution = self.attribution(question)
        column = attribution.test.position(question)
        example = self.material.encoded_test[self.test.position(question)]
        with RunStore.open(self.run_dir, read_only=True) as store:
            base, target = (self._loss(store, example, member) for member in (BASE, TARGET))
        return cause_of(question, attribution.test_loss_KM[:, column], base, target)

    def _loss(self, store: RunStore, example: EncodedExample, member: int) -> float | None:
        found = store.scores.load_some(store.scores.find_ids([example]), member).scores()
        for scores in found.values():
            return float(per_example_losses([scores.logprobs], self.config.attribution.loss)[0])
        return None

    def remove(self, questions: Sequence[str]) -> None:
        """Take questions out of the tables; their scores are kept, and asking again shows them again.

        Raises DataError for an unknown id, StoreError where nothing can be written.
        """
        with RunStore.open(self.run_dir) as store:
            self.take(self.questions.without(questions))
            store.set_value("questions", self.questions.to_value())

    def mark(self, questions: Sequence[str], verdict: Verdict | None) -> None:
        """Say which answers are wanted and which are not, or take that back. Raises as :meth:`remove`."""
        with RunStore.open(self.run_dir) as store:
            self.take(self.questions.marked(questions, verdict))
            store.set_value("questions", self.questions.to_value())

    def take(self, questions: Questions) -> None:
        """Go on with other questions; nothing is written."""
        if not any(batch.shown for batch in questions):
            raise DataError("a run needs a question: these are all it has. Nothing was changed.")
        self.questions = questions
        self.__dict__.pop("material", None)

    # -- state ----------------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """How far the run is; also while another process works on it. Raises StoreError where there is no run."""
        try:
            attribution = None if self.questions_only else self.attribution()
        except NotEnoughMembersError:
            attribution = None
        with RunStore.open(self.run_dir, read_only=True) as store:
            scored = complete_members(store, self.material)
            status = status_of(store, self.material, self.config, attribution, scored)
        retrained = {} if self._purpose == "retrain" else self.spent_elsewhere()
        return status.with_spent(retrained) if retrained else status

    def cancel(self) -> CancelReport:
        """Stop the jobs of the run that are not final; what is trained and scored is kept."""
        return cancel_run(self.run_dir)

    def clean(self) -> CleanReport:
        """Delete what the run created at the provider: its jobs' models and its files, and nothing else. What it left
        on the scoring server (deployments, adapters) is taken off first."""
        return clean_run(self.run_dir)

    def _repr_html_(self) -> str:
        from .attribution.notebook import rows_html

        try:
            if RunStore.exists(self.run_dir):
                return rows_html("Run", self.status().rows())
            return rows_html("Run, not started", [("Folder", str(self.run_dir)), *self.plan().rows()])
        except DaunceError as error:  # a notebook shows what can be said, no traceback
            return rows_html("Run", [("folder", str(self.run_dir)), (type(error).__name__, str(error))])

    # -- what is kept ---------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """What the run is started with, as plain data."""
        version = {} if self._version == 1 else {"version": self._version}
        return {
            **version,
            "config": self.config.model_dump(mode="json"),
            "train_digest": self.train.digest,
            "test_digest": self.questions.batches[0].examples.digest,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def keep(self, store: RunStore) -> None:
        """Copies of the examples, so that the run folder stands alone; written before anything is bought."""
        folder = self.run_dir / DATA_FOLDER
        keep_dataset(folder / "train.jsonl", self.train)
        self.questions.write(folder)
        store.set_value("questions", self.questions.to_value())
        if self.design is not None:
            design = {"ensemble": self.design.to_value(), "questions_only": self.questions_only}
            if store.get_value("design") != design:
                store.set_value("design", design)


class Work:
    """One execution of a run: what lives only while it trains and scores. Everything that lasts is in the store."""

    def __init__(
        self,
        run: Run,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
        max_usd: float | None = None,
    ) -> None:
        self._run = run
        self._config = with_cap(run.config, max_usd)
        if (cap := self._config.budget.max_usd) is not None:
            self._config = with_cap(run.config, max(0.0, cap - sum(run.spent_elsewhere().values())))
        self._max_usd = max_usd
        self._on_event = on_event
        self._on_progress = on_progress
        self._session = session
        self._clock = clock if clock is not None or session is None else session.clock
        self._stop = StopRule(run.config.ensemble.stop)
        self._compared = run.questions_only
        self._scoring: MemberScoring | None = None

    async def run(self) -> None:
        """Train and score what is missing; nothing is opened where nothing is.

        Raises MembersAlikeError as soon as members show that the endpoint does not serve the fine-tunes: their scores
        are set aside, so that the same call scores them again.
        """
        run, session = self._run, self._session
        plan = run.plan(max_usd=self._max_usd)
        plan.check()
        run_key = None if session is None else session.run_key
        with RunStore.create_or_open(run.run_dir, run.manifest(), run_key=run_key) as store:
            self._store = store
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
        reason = await self._enough(members)
        if len(members) == run.material.ensemble.members or reason is not None:
            return
        store.history.cleared()
        async with self._backend() as (backend, cache):
            await self._at(backend, plan, cache)
        self._compared = run.questions_only
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
                async with self._backend() as (backend, cache):
                    await self._score_questions(backend, self._client(backend, cache), plan, questions)

    async def _score_questions(
        self,
        backend: Backend,
        client: ScoringClient,
        plan: AskPlan,
        questions: Dataset,
        *,
        members_only: bool = False,
    ) -> None:
        run, store = self._run, self._store
        trained = run.trained_members(store)
        scoring = QuestionScoring(
            client,
            store,
            exists=_jobs_at(backend, store, self._clock).model_exists,
            usd_per_token=plan.usd_per_token,
            cap=self._config.budget.max_usd,
        )
        models = run.models_to_ask(store, trained, members_only=members_only)
        gone = await scoring.score(run.encoded_questions(questions), models)
        for member, why in gone.items():
            row = store.jobs.trained_by(member)
            if row is not None:
                store.jobs.model_deleted(row.key)
            store.note("model gone", f"member {member}: {why}")
        lost = [k for k in trained if k not in store.jobs.ready_models()]
        if shortfall := too_few(len(trained) - len(lost), len(trained)):
            raise NotEnoughMembersError(f"{shortfall} {gone_text(lost)}")

    async def generate(self, asked: str | Sequence[Mapping[str, Any]]) -> str:
        """The target's own answer to a prompt or messages. Raises CapabilityError where nothing can give one."""
        run = self._run
        with RunStore.open(run.run_dir, read_only=True) as store:
            target = store.jobs.ready_models().get(TARGET) or run.config.ensemble.target_model
        if target is None:
            raise CapabilityError(
                "the run has no target model (ensemble.start_from is base), so there is nothing to generate an answer: "
                "give the answer. Nothing was sent."
            )
        async with open_backend(run.config) as backend:
            if not isinstance(backend.scorer, Generator):
                raise CapabilityError(
                    f"{backend.scorer.capabilities.provider} does not generate answers: give the answer. Nothing was "
                    "sent."
                )
            return await backend.scorer.generate(target, asked, max_tokens=ANSWER_TOKENS)

    @asynccontextmanager
    async def _backend(self) -> AsyncIterator[tuple[Backend, ScoredCache | None]]:
        """The opened backend, and the cache of scores. A recording holds every request, so nothing may be answered from
        elsewhere while one is made or replayed."""
        session = self._session
        recording: AbstractContextManager[Any] = session or nullcontext()
        cache = None if session is not None else open_cache(self._run.config)
        with recording, cache or nullcontext():
            async with open_backend(self._run.config, replaying=session is not None and session.replaying) as backend:
                yield backend, cache

    def _client(self, backend: Backend, cache: ScoredCache | None) -> ScoringClient:
        return ScoringClient(
            backend.scorer,
            self._store,
            concurrency=self._config.scoring.concurrency,
            clock=self._clock,
            on_progress=self._progressed,
            cache=cache,
        )

    def _progressed(self, member: int, done: int, total: int) -> None:
        if self._scoring is not None:
            self._scoring.progressed(member, done, total)
        elif self._on_progress is not None:
            self._on_progress(member, done, total)

    async def _at(self, backend: Backend, plan: Plan, cache: ScoredCache | None) -> None:
        run, store, config = self._run, self._store, self._config
        client = self._client(backend, cache)
        self._training = Orchestrator(
            backend.trainer,
            store,
            ensemble=run.material.ensemble,
            dataset=run.train,
            config=config,
            costs=plan.costs,
            clock=self._clock,
        )
        self._scoring = MemberScoring(
            client,
            store,
            config,
            Asked(run.material.encoded_test, run.material.encoded_train),
            partial(run.material.is_scored, store),
            usd_per_model=plan.scoring_usd_per_model,
            cap=config.budget.max_usd,
            purpose=run._purpose,
            on_progress=self._on_progress,
        )
        base = config.backend.model
        plan.check_model(await self._training.model_info(base))
        if backend.scorer.capabilities.max_models is None and not run.questions_only:
            # Before anything is paid for. An endpoint that has to load each model is tested with member 0.
            await client.probe(base, self._scoring.shortest)
        trained = run.trained_members(store)
        if trained and not run.questions_only:
            asked = run.asking(run.test, members_only=True, max_usd=self._max_usd)
            if asked.requests:  # the test file has more lines than before
                asked.check()
                await self._score_questions(backend, client, asked, run.test, members_only=True)
        try:
            await self._training.run(self._score, self._tell, finished=trained)
        except MembersAlikeError:
            await client.drain()
            raise

    async def _score(self, member: int, model: str) -> None:
        """Everything that is asked of one member's models, as soon as they exist."""
        if member == TARGET and not self._config.scoring.target:
            return
        assert self._scoring is not None
        await self._scoring.member(member, model, self._training)
        if member == TARGET or (self._compared and self._config.ensemble.stop is None):
            return
        members = await asyncio.to_thread(complete_members, self._store, self._run.material)
        await self._compare(members)
        reason = await self._enough(members)
        if reason is not None:
            self._training.halt(reason)

    async def _compare(self, members: list[int]) -> None:
        """Compare the first complete members with each other, before more of them are paid for."""
        if self._compared or len(members) < 2:
            return
        attribution = await asyncio.to_thread(assemble, self._store, self._run.material, self._config)
        check_served(attribution, self._store.jobs.ready_models())
        self._compared = True

    async def _enough(self, members: list[int]) -> str | None:
        """Why no further member is needed, by ``ensemble.stop``."""
        if self._config.ensemble.stop is None:
            return None

        def look() -> str | None:
            def quality(count: int) -> SelfLDS | None:
                return assemble(self._store, self._run.material, self._config).first(count).self_lds

            return self._stop.reason(len(members), quality)

        return await asyncio.to_thread(look)

    def _tell(self, event: Event) -> None:
        logger.info("%s", terminal_text(event.message))
        if self._on_event is not None:
            self._on_event(event)

    def _set_aside(self, error: MembersAlikeError) -> MembersAlikeError:
        """Use no more, here and in the cache, what may be the answers of other models."""
        run, store = self._run, self._store
        keys = [e.key for e in run.material.encoded]
        members = sorted({m for m, _, _ in store.scores.models()}) if error.members is None else list(error.members)
        fingerprint = store.scores.scored_with
        cache = open_cache(run.config) if self._session is None else None
        if cache is not None and fingerprint is not None:
            with cache:
                for member in members:
                    given = run.config.ensemble.target_model
                    models = [given] if member == TARGET and given is not None else store.jobs.models(member)
                    for model in models:
                        cache.discard(fingerprint, model, keys)
        store.scores.set_aside(members, str(error), suspect=True)
        if error.members is None:
            store.set_value(PROBE_VALUE, None)  # an endpoint that served something else is tested again
        return MembersAlikeError(
            f"{error} What was scored of {_listed(members)} is set aside; the models are kept. Once the endpoint "
            "serves them, run the same command: it scores them again, and they are paid for again.",
            members,
        )


def cancel_run(run_dir: str | Path) -> CancelReport:
    """Stop the jobs of a run that are not final: of any run folder, also one whose data or tokenizer is gone."""
    return _at_provider(run_dir, lambda store, backend, jobs: cancel_jobs(jobs))


def clean_run(run_dir: str | Path) -> CleanReport:
    """Delete what a run created at the provider: models and files of its jobs, batches of its scoring. What it left on
    the scoring server is taken off first. Needs the run's store and its provider, nothing else."""
    return _at_provider(run_dir, clean_at)


async def clean_at(store: RunStore, backend: Backend, jobs: Desk) -> CleanReport:
    """:func:`clean_run` with a store and a backend that are open."""
    left = store.hosted.models()
    hosted = await take_off(backend.scorer, store)
    report = await clean_up(jobs)
    report.unloaded = [model for model in left if model not in hosted]
    report.kept.update({f"{model} on the scoring server": why for model, why in hosted.items()})
    if isinstance(backend.scorer, Deferred):
        swept = await backend.scorer.sweep(store.jobs.models())
        report.files += swept.files
        report.kept |= swept.kept
    return report


def _at_provider(
    run_dir: str | Path, action: Callable[[RunStore, Backend, Desk], Coroutine[Any, Any, Answer]]
) -> Answer:
    async def act() -> Answer:
        with RunStore.open(run_dir) as store:
            async with open_backend(RunConfig.from_manifest(store.manifest)[0]) as backend:
                return await action(store, backend, _jobs_at(backend, store))

    return run_blocking(act())


def _jobs_at(backend: Backend, store: RunStore, clock: Clock | None = None) -> Desk:
    return Desk(
        backend.trainer,
        store,
        lambda _: None,
        clock=clock or SystemClock(),
        retries=JOB_RETRIES,
        polls=PollPolicy(),
        rng=random.Random(),
    )


def _has(store: RunStore, example: EncodedExample, member: int, checkpoint: int) -> bool:
    return store.scores.has_all(store.scores.find_ids([example]), member, checkpoint=checkpoint)


def _listed(members: Collection[int]) -> str:
    numbers = [str(k) for k in members if k != TARGET]
    named = f"member{'' if len(numbers) == 1 else 's'} {', '.join(numbers)}"
    return f"{named} and the target model" if TARGET in members else named


def family_of(run_dir: Path) -> list[Path]:
    """The folders of a run and of all runs within it (retraining); the outermost run comes first."""
    outer = [folder for folder in (run_dir, *run_dir.parents[:4]) if RunStore.exists(folder)]
    if not outer:
        return []
    inner = (path.parent for depth in ("*/*", "*/*/*") for path in outer[-1].glob(f"{depth}/{DATABASE}"))
    return [outer[-1], *sorted(inner)]


def with_cap(config: RunConfig, max_usd: float | None) -> RunConfig:
    """The config with another cap for one command; None leaves it."""
    if max_usd is None:
        return config
    if not (math.isfinite(max_usd) and max_usd >= 0):
        raise ConfigurationError("max_usd must be an amount of US dollars, 0 or more. Nothing was sent.")
    return config.model_copy(update={"budget": config.budget.model_copy(update={"max_usd": max_usd})})


def attribute(
    train: Dataset | str | Path,
    test: Dataset | str | Path,
    *,
    backend: BackendName | BackendSection = "embedded",
    members: int = 32,
    run_dir: str | Path = "runs/attribute",
    **sections: Unpack[Sections],
) -> Attribution:
    """Fine-tune ``members`` models on random halves of ``train`` and attribute the answers in ``test``: one call.

        attribution = attribute("train.jsonl", "test.jsonl", backend="local", members=16)
        attribution.top("q-17")

    With a provider that bills, it spends money without a plan or a question, up to ``budget={"max_usd": 20}``: set a
    cap, or use :class:`Run`, whose plan has the price. ``backend`` is the name of a kind or the ``backend:`` section of
    a config; ``sections`` are further sections (``ensemble={"subset_ratio": 0.3}``). The run lives in ``run_dir``; the
    same call again does only what is missing. Raises what :meth:`Run.execute` raises.
    """
    run_dir = Path(run_dir).expanduser().resolve()
    paths: dict[str, str] = {}
    data: dict[str, Dataset] = {}
    for side, given in (("train", train), ("test", test)):
        data[side] = given if isinstance(given, Dataset) else Dataset.from_jsonl(given)
        paths[side] = str(run_dir / DATA_FOLDER / f"{side}.jsonl" if isinstance(given, Dataset) else given)
    content: dict[str, Any] = dict(sections)
    config = RunConfig.from_mapping(
        {
            **content,
            "run_dir": str(run_dir),
            "data": {**paths, **content.get("data", {})},
            "backend": {"kind": backend} if isinstance(backend, str) else dict(backend),
            "ensemble": {"members": members, **content.get("ensemble", {})},
        }
    )
    return Run.of(config, data["train"], data["test"]).execute()
