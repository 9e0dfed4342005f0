"""``Run``: the conductor. It plans, trains, scores, attributes, and answers further questions; nothing else does all.

A run has a *design* (which subsets its members are trained on) and *questions* (which answers are explained). The
retraining of an evaluation is a run with another design that is scored on its questions alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from ._util.blocking import run_blocking
from ._util.sections import BackendName, BackendSection, Sections
from .attribution import Attribution
from .attribution.cause import Cause, cause_of
from .attribution.from_store import assemble, question_groups, too_few_members
from .config import RunConfig
from .core import segment_losses
from .data.dataset import Dataset, Example
from .data.example import Verdict
from .data.kept import kept_dataset
from .data.questions import Questions
from .data.subsets import Ensemble
from .data.tokenizers import EncodedExample
from .errors import ConfigurationError, DaunceError, NotEnoughMembersError
from .plan.inputs import DATA_FOLDER, RunInputs
from .score.cleaning import cancel_run, clean_run
from .score.work import Options, Work
from .status import RunStatus, status_of
from .store import BASE, TARGET, RunStore
from .train import CancelReport, CleanReport


class Run(RunInputs):
    """One run: a config, its data, and the folder that keeps everything that was bought and measured.

    ``Run.create`` starts or resumes a run, ``Run.open`` opens an existing one. Nothing is written before
    :meth:`execute`.

        run = Run.create("run.yaml")
        print(run.plan().text())      # what it will cost; nothing is sent
        attribution = run.execute()   # trains and scores what is missing

    ``design`` gives the subsets and seeds of the members instead of drawing them from the config; ``wanted``: only its
    first members. With ``questions_only``, members are not scored on the training examples, so that there are losses
    and no attribution.
    """

    _gone: tuple[str, ...] = ()
    _attributed: tuple[object, tuple[Attribution, ...]] | None = None

    @classmethod
    def create(cls, config: RunConfig | Mapping[str, Any] | str | Path, *, adopt: bool = False) -> Run:
        """From a config, a mapping of its keys, or the path of a YAML file; reads and checks the data.

        A run that was started keeps its recipe: defaults that have changed since are those of its version. Lines that
        the test file has more than before become questions of the run. ``adopt``: jobs of this run that the provider
        lists and the run folder does not know (it is a copy, or lost its end, or its store) are taken over instead of
        ending the run with UnknownJobsError or StoreCorruptError. Raises ConfigurationError, DataError.
        """
        if isinstance(config, str | Path):
            config = RunConfig.from_yaml(config)
        elif not isinstance(config, RunConfig):
            config = RunConfig.from_mapping(dict(config))
        for path in (config.data.train, config.data.test, config.data.validation):
            if path is not None and path.exists() and not (path.is_file() or path.is_dir()):
                raise ConfigurationError(f"{path} is not a regular file, and examples are read more than once.")
        columns = config.data.columns
        train, test = (Dataset.from_file(path, columns) for path in (config.data.train, config.data.test))
        if adopt:
            RunStore.make_room(config.run_dir)
        return cls.of(config, train, test, adopts=adopt)

    @classmethod
    def of(cls, config: RunConfig, train: Dataset, test: Dataset, **design: Any) -> Run:
        """From a config and examples that are read already; resumes what its folder holds. ``design``: further
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
        run._tokenizer_fingerprint = manifest.get("tokenizer")
        return run

    def __repr__(self) -> str:
        shape = f"{self.config.ensemble.members} members of {self.config.backend.model} at {self.config.backend.kind}"
        examples = f"{len(self.train)} training examples, {len(self.test)} questions"
        started = "" if RunStore.exists(self.run_dir) else ", not started"
        return f"Run({str(self.run_dir)!r}, {shape}, {examples}{started})"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed in the data and the config, and kept."""
        return self.train.warnings + self.questions.batches[0].examples.warnings + self._gone

    # -- the run --------------------------------------------------------------------------------------------------

    def execute(self, **options: Unpack[Options]) -> Attribution:
        """Train and score what is missing, then attribute; the same call again does only what is missing.

        ``options``: ``on_event`` and ``on_progress`` are called during the run; ``session`` records or replays the API
        traffic (:mod:`daunce_api.providers.replay`); ``clock`` waits; ``max_usd`` takes the place of
        ``budget.max_usd`` for this call, and is recorded. Whatever ends it, what was trained and scored is kept. Raises
        any :class:`~daunce_api.errors.DaunceError`; KeyboardInterrupt leaves a run that the same call resumes.
        """
        self.measure(**options)
        return self.attribution()

    async def execute_async(self, **options: Unpack[Options]) -> Attribution:
        """:meth:`execute` for programs that run an event loop of their own."""
        await Work(self, **options).run()
        return await asyncio.to_thread(self.attribution)

    def measure(self, **options: Unpack[Options]) -> None:
        """:meth:`execute` without an attribution: for designs that are scored on their questions alone."""
        run_blocking(Work(self, **options).run())

    # -- results --------------------------------------------------------------------------------------------------

    def attributions(self) -> tuple[Attribution, ...]:
        """One attribution for each group of questions that the same members answered; the largest group first.

        Usually there is one. Questions that were asked after some models were gone are answered by fewer members and
        form a group of their own, with its own quality. Also while another process works on the run; nothing is read
        again where nothing changed. Raises NotEnoughMembersError where no question has two members, StoreError where
        there is no run.
        """
        with RunStore.open(self.run_dir, read_only=True) as store:
            return self._groups(store)

    def _groups(self, store: RunStore) -> tuple[Attribution, ...]:
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
        self.check_attributed()
        groups = question_groups(store, self.material, self.questions)
        if not groups:
            raise too_few_members(len(self.trained_members(store)), self.material)
        return tuple(
            assemble(store, group, self.config, lambda: self.tokenizer, members=members) for group, members in groups
        )

    # -- further questions ----------------------------------------------------------------------------------------

    def ask(
        self,
        questions: Dataset | None = None,
        *,
        prompt: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        verdict: Verdict | None = None,
        **options: Unpack[Options],
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
        plan = self.asking(questions, max_usd=options.get("max_usd"))
        plan.check()
        run_blocking(Work(self, **options).ask(questions, plan, verdict))
        return replace(self.attribution(questions.ids[0]), focus=tuple(questions.ids))

    def question(self, messages: Sequence[Mapping[str, Any]], answer: str | None = None) -> Dataset:
        """One question as a data set: the messages before the answer, and the answer.

        Without an answer it is the last message where that is the assistant's, and otherwise what the target model
        generates. A run of prompt/completion examples gets such a question where there is a single user message.
        Raises DataError; CapabilityError where there is no target, or its endpoint does not generate.
        """
        turns, plain = [dict(message) for message in messages], not self.train[0].is_chat
        if answer is None and (not turns or turns[-1].get("role") != "assistant"):
            _example({"messages": [*turns, {"role": "assistant", "content": "?"}]})  # what is wrong is not sent
            prompt = turns[0]["content"] if plain and len(turns) == 1 else turns
            answer = run_blocking(Work(self).generate([prompt]))[0][0]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        record: dict[str, Any] = {"messages": turns}
        example = _example(record)
        if plain and len(turns) == 2 and all(isinstance(turn.get("content"), str) for turn in turns):
            record = {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
            example = _example(record)
        known = [e for batch in self.questions for e in batch.examples if e.content_hash == example.content_hash]
        if known:
            return Dataset(known[:1], name="question")
        return Dataset.from_records([{"id": f"ask-{example.content_hash[:8]}", **record}], name="question")

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
        found = store.scores.load_some(store.scores.find_ids([example]), member)
        if not found.ids.size:
            return None
        return float(segment_losses(found.logprobs, found.counts, self.config.attribution.loss)[0])

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

    # -- state ----------------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """How far the run is; also while another process works on it. Raises StoreError where there is no run."""
        with RunStore.open(self.run_dir, read_only=True) as store:
            try:
                groups = () if self.questions_only else self._groups(store)
            except NotEnoughMembersError:
                groups = ()
            scored = self.finished_members(store)
            retrained = {} if self.purpose == "retrain" else self.spent_elsewhere()
            return status_of(store, self.material, self.config, groups, scored, retrained)

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


def _example(record: Mapping[str, Any]) -> Example:
    """One question as it is read from a file. Raises DataError."""
    return Dataset.from_records([record], name="question")[0]


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
        data[side] = given if isinstance(given, Dataset) else Dataset.from_file(given)
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
