"""``RunInputs``: what a run is made of, and what of it is missing; nothing here sends anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ..attribution.from_store import Material, complete_members
from ..config import VERSION, RunConfig
from ..data.dataset import Dataset, LossOn
from ..data.kept import KeptDataset, keep_dataset
from ..data.questions import Questions
from ..data.subsets import Ensemble, plan_ensemble
from ..data.tokenizers import EncodedExample, Tokenizer, encode_dataset
from ..errors import ConfigurationError, DataError
from ..providers.base import all_within_scope
from ..providers.registry import capabilities_of, open_tokenizer
from ..store import BASE, FINAL, TARGET, RunStore
from ..store.ledger import Purpose
from ..store.run import FILE_NAME as DATABASE
from .asking import AskPlan, plan_asking
from .plan import Missing, Plan
from .planning import make_plan, plan_of_missing
from .prices import prices_known
from .tokens import scoped

HALTED = "halted"
"""Why a run stopped that has enough members; with this name the store keeps the rule that said so."""
TESTS = "endpoint tests"
"""Key in the store: reports of the endpoint's tests, by model."""
DATA_FOLDER = "data"
"""Inside the run folder: the examples as they were read."""


class RunInputs:
    """A config, its data, a design (which subsets) and questions (which answers); see :class:`daunce_api.run.Run`."""

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
        adopts: bool = False,
    ) -> None:
        """``purpose``: what the ledger books scoring for. ``adopts``: jobs that the run folder does not know are taken
        over from the provider."""
        self.config = config
        self.train = train
        self.questions = test if isinstance(test, Questions) else Questions.of(test)
        self.design = design
        self.questions_only = questions_only
        self.purpose: Purpose = purpose
        self.adopts = adopts
        self._wanted = wanted
        self._version = VERSION
        """Of the config's keys, when the run was started."""
        self._tokenizer_fingerprint: str | None = None
        """Of the tokenizer that the run was started with; None for a new one."""
        self._encoded: dict[Dataset, Sequence[EncodedExample]] = {}
        self._plan: Plan | None = None

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.config.run_dir

    @property
    def test(self) -> Dataset:
        """The questions: the answers that are explained."""
        return self.questions.shown

    # -- the examples ---------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config's model."""
        return open_tokenizer(self.config)

    def encoded(self, dataset: Dataset) -> Sequence[EncodedExample]:
        """A data set as token ids of the run's tokenizer, the turns that are measured as targets; encoded once, and
        read where the run folder keeps them.

        Raises DataError that lists every line that cannot be encoded.
        """
        if dataset not in self._encoded:
            kept = dataset.tokens(self._recipe(dataset)) if isinstance(dataset, KeptDataset) else None
            if kept is None:
                kept = encode_dataset(dataset, self.tokenizer, self._turns(dataset))
            self._encoded[dataset] = kept
        return self._encoded[dataset]

    def _turns(self, dataset: Dataset) -> LossOn:
        data, one_turn = self.config.data, capabilities_of(self.config)[1].one_turn
        return data.measured(one_turn=one_turn) if dataset is self.train else data.asked

    def _recipe(self, dataset: Dataset) -> list[str]:
        """What the token ids of a data set depend on, besides its examples."""
        return [self._tokenizer_fingerprint or self.tokenizer.fingerprint, self._turns(dataset)]

    def share_encoding(self, other: RunInputs) -> None:
        """Take over what another run of the same tokenizer has encoded, so that it is not encoded twice."""
        self._encoded |= other._encoded
        if "tokenizer" in other.__dict__:
            self.__dict__["tokenizer"] = other.tokenizer

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
            all_within_scope(asked, scorer),
            all_within_scope(self.encoded(self.test), scorer),
            design,
            shape.checkpoints,
            priced=prices_known(self.config, scorer),
        )

    # -- what it costs --------------------------------------------------------------------------------------------

    def plan(self, *, max_usd: float | None = None) -> Plan:
        """Jobs, tokens, dollars and time of what is missing: of the whole run before it is started. No network, no key,
        nothing is written. ``max_usd`` takes the place of ``budget.max_usd``.

        Raises DataError or ConfigurationError. Reasons not to start are in ``Plan.refusals``; :meth:`Plan.check` raises
        the first.
        """
        config, missing = with_cap(self.config, max_usd), self.whole_plan().missing
        if RunStore.exists(self.run_dir):
            with RunStore.open(self.run_dir, read_only=True) as store:
                missing = self._missing(store)
        spent = missing.spent_usd + sum(self.spent_elsewhere().values())
        return plan_of_missing(config, self.whole_plan(), replace(missing, spent_usd=spent))

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

    def whole_plan(self) -> Plan:
        """The plan of the whole run, started or not. Cached per UTC day: provider shutdown dates depend on it."""
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
        finals = sum(not material.is_scored(store, k, 0) for k in asked)
        models = finals + sum(not material.is_scored(store, k, n) for k in asked for n in range(1, material.models))
        target_unscored = self.config.scoring.target and not material.is_scored(store, TARGET)
        rule, stop = shape.stop, store.history.stop()
        if (
            rule is not None
            and stop is not None
            and stop.kind == HALTED
            and store.get_value(HALTED) == rule.model_dump()
        ):
            return Missing(frozenset(), frozenset(), 0, spent_usd=store.ledger.spent())
        made_here = shape.start_from == "target" and shape.target_model is None
        if made_here and TARGET not in ready and (training or target_unscored):
            training.add(TARGET)
        spent = store.ledger.spent()
        return Missing(frozenset(training - live), frozenset(training), models + target_unscored, finals, spent)

    def trained_members(self, store: RunStore) -> list[int]:
        """Members whose every training example is scored (every question, where a run has those alone): their models
        are never trained again."""
        if self.questions_only:
            return complete_members(store, self.material)
        return complete_members(store, replace(self.material, encoded_test=()))

    def finished_members(self, store: RunStore) -> list[int]:
        """Members of which nothing is left to be scored: those whose model is gone are finished without the questions
        that were asked since."""
        ready, complete = store.jobs.ready_models(), set(complete_members(store, self.material))
        return [k for k in self.trained_members(store) if k in complete or k not in ready]

    def asking(self, questions: Dataset, *, members_only: bool = False, max_usd: float | None = None) -> AskPlan:
        """What asking these questions costs, and why it may be refused; nothing is sent. ``members_only``: not of the
        base and the target.

        Raises StoreError where the run was not started, DataError where a question cannot be encoded,
        ConfigurationError where members are scored on their questions alone.
        """
        self.check_attributed()
        encoded = self.encoded_questions(questions)
        with RunStore.open(self.run_dir, read_only=True) as store:
            trained = self.trained_members(store)
            models = self.models_to_ask(store, trained, members_only=members_only)
            has_all, find_ids = store.scores.has_all, store.scores.find_ids
            missing = {
                member: [e for e in encoded for n in checkpoints if not has_all(find_ids([e]), member, checkpoint=n)]
                for member, checkpoints in models.items()
            }
            tested = store.get_value(TESTS, {})
            spent = store.ledger.spent() + sum(self.spent_elsewhere().values())
        return plan_asking(
            with_cap(self.config, max_usd),
            encoded,
            {member: asked for member, asked in missing.items() if asked},
            capabilities_of(self.config)[1],
            trained=trained,
            gone=[k for k in trained if k not in models],
            spent_usd=spent,
            untested={k: sum(m not in tested for m in checkpoints.values()) for k, checkpoints in models.items()},
        )

    def check_attributed(self) -> None:
        """Raises ConfigurationError for a run of an evaluation, which has losses and no attribution."""
        if self.questions_only:
            raise ConfigurationError(
                f"{self.run_dir} holds models that are scored on the questions alone: there are losses and no "
                "attribution. It belongs to an evaluation or a fix of another run: name that."
            )

    def encoded_questions(self, questions: Dataset) -> tuple[EncodedExample, ...]:
        """Questions as the scorer measures them; one that it cannot measure as it is, for the plan to name."""
        return tuple(scoped(questions, self.encoded(questions), capabilities_of(self.config)[1])[0])

    def models_to_ask(
        self, store: RunStore, trained: Collection[int], *, members_only: bool = False
    ) -> dict[int, dict[int, str]]:
        """Models by member and checkpoint: of the members that are trained, of the base, and of the target."""
        ready = store.jobs.ready_models()
        models: dict[int, dict[int, str]] = {}
        for member in trained:
            if member in ready:
                models[member] = {0: ready[member], **(store.jobs.earlier_models(member, self.material.models) or {})}
        if members_only:
            return models
        target = ready.get(TARGET) or self.config.ensemble.target_model
        if target is not None:
            models[TARGET] = {0: target}
        if capabilities_of(self.config)[1].tried_on == "base":
            models[BASE] = {0: self.config.backend.model}
        return models

    # -- what is kept ---------------------------------------------------------------------------------------------

    def take(self, questions: Questions) -> None:
        """Go on with other questions; nothing is written."""
        if not any(batch.shown for batch in questions):
            raise DataError("a run needs a question: these are all it has. Nothing was changed.")
        self.questions = questions
        self.__dict__.pop("material", None)
        self._plan = None

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

        def keep_tokens(path: Path, dataset: Dataset) -> None:
            keep_dataset(path, dataset, self._encoded.get(dataset), self._recipe(dataset))

        keep_tokens(folder / "train.jsonl", self.train)
        self.questions.write(folder, keep_tokens)
        store.set_value("questions", self.questions.to_value())
        if self.design is not None:
            design = {"ensemble": self.design.to_value(), "questions_only": self.questions_only}
            if store.get_value("design") != design:
                store.set_value("design", design)


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
