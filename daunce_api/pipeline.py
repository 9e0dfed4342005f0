"""``Run``: plan, train, score, attribute, in that order. The only module that knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property, reduce
from html import escape
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .assembly import Material, assemble, complete_members
from .attribution import Attribution
from .backends.base import ScorerCapabilities, within_scope
from .backends.registry import Backend, capabilities_of, open_backend, open_tokenizer
from .blocking import run_blocking
from .budget import Plan, make_plan
from .clock import Clock
from .config import RunConfig, StopConfig
from .core import SelfLDS
from .core.quality import MINIMUM_MEMBERS
from .core.stopping import AtLeast, Condition, Plateau, Reached
from .dataset import Dataset
from .display import terminal_text
from .ensemble import plan_ensemble
from .errors import ConfigurationError, DataError, DaunceError, StoreCorruptError
from .noise import check_members_differ
from .orchestrator import CancelReport, CleanReport, Event, OnEvent, Orchestrator
from .replay import Session
from .runlog import logger, logging_to
from .scored_cache import open_cache
from .scoring import PROBED_MEMBER, Progress, ScoringClient
from .status import RunStatus, status_of
from .store import TARGET, RunStore
from .tokens import EncodedExample, Tokenizer, encode_example

DATA_FOLDER, ATTRIBUTION_FOLDER, LOG_NAME = "data", "attribution", "daunce.log"
"""Inside the run folder: the examples as they were read, the saved attribution, and the log."""

T = TypeVar("T")


class Run:
    """One run: a config, its data, and the folder that keeps everything that was bought and measured.

    ``Run.create`` makes or takes up a run, ``Run.open`` looks at an existing one. Nothing is written before
    :meth:`execute`.
    """

    def __init__(self, config: RunConfig, train: Dataset, test: Dataset) -> None:
        self.config = config
        self.train = train
        self.test = test

    @classmethod
    def create(cls, config: RunConfig | Mapping[str, Any] | str | Path) -> Run:
        """From a config, a mapping of its keys, or the path of a YAML file; reads and checks the data.

        Raises ConfigurationError, DataError.
        """
        if isinstance(config, str | Path):
            config = RunConfig.from_yaml(config)
        elif not isinstance(config, RunConfig):
            config = RunConfig.from_mapping(dict(config))
        return cls(config, Dataset.from_jsonl(config.data.train), Dataset.from_jsonl(config.data.test))

    @classmethod
    def open(cls, run_dir: str | Path) -> Run:
        """An existing run folder, as it was started; the original data files are not needed.

        Raises StoreError where there is no run, StoreCorruptError where the kept examples are not those of the run.
        """
        run_dir = Path(run_dir)
        with RunStore.open(run_dir, read_only=True) as store:
            manifest = store.manifest
        content = {**manifest["config"], "run_dir": str(run_dir.resolve())}
        data = {side: Dataset.from_jsonl(_data_file(run_dir, side)) for side in ("train", "test")}
        for side, dataset in data.items():
            if dataset.digest != manifest[f"{side}_digest"]:
                raise StoreCorruptError(
                    f"{_data_file(run_dir, side)} does not hold the examples that the run was started with: it was "
                    "edited or damaged. Nothing was changed. `daunce run` with the original data writes it anew."
                )
        return cls(RunConfig.from_mapping(content), data["train"], data["test"])

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.config.run_dir

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed in the data and kept."""
        return self.train.warnings + self.test.warnings

    # -- before anything is spent ---------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config's model."""
        return open_tokenizer(self.config)

    def plan(self) -> Plan:
        """Jobs, tokens, dollars and time of the whole run. No network, no key, nothing is written.

        Raises DataError, ConfigurationError, and what the plan refuses (:meth:`Plan.check`) is in it as text.
        """
        trainer, scorer = capabilities_of(self.config)
        return make_plan(self.config, self.train, self.test, self.tokenizer, trainer, scorer)

    @cached_property
    def material(self) -> Material:
        """The examples as token ids, and the ensemble. Raises DataError for examples that cannot be encoded and
        CapabilityError for those that the scorer cannot measure."""
        trainer, scorer = capabilities_of(self.config)
        return Material(
            self.train,
            self.test,
            scorer.measured,
            self._encoded(self.train, scorer),
            self._encoded(self.test, scorer),
            plan_ensemble(
                len(self.train),
                self.config.ensemble.members,
                self.config.ensemble.subset_ratio,
                self.config.ensemble.seed,
                min_subset=trainer.min_examples,
            ),
        )

    def _encoded(self, dataset: Dataset, scorer: ScorerCapabilities) -> tuple[EncodedExample, ...]:
        encoded, problems = [], []
        for position, example in enumerate(dataset):
            try:
                encoded.append(within_scope(encode_example(example, self.tokenizer, self.config.data.loss_on), scorer))
            except DataError as error:
                problems.append(f"{dataset.where(position)}: {error}")
        if problems:
            raise DataError(f"{dataset.name} cannot be encoded; nothing was sent. Mend these lines:", problems)
        return tuple(encoded)

    # -- the run --------------------------------------------------------------------------------------------------

    def execute(
        self,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
    ) -> Attribution:
        """Train and score what is missing, then attribute; the same call again does only what is missing.

        ``on_event`` and ``on_progress`` are told what happens; ``session`` records or replays the API traffic
        (:mod:`daunce_api.replay`). Whatever ends it, what was trained and scored is kept, and an attribution of the
        members that are complete is saved in the run folder. Raises any :class:`~daunce_api.errors.DaunceError`;
        KeyboardInterrupt leaves a run that the same call takes up.
        """
        return run_blocking(
            self.execute_async(on_event=on_event, on_progress=on_progress, session=session, clock=clock)
        )

    async def execute_async(
        self,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
    ) -> Attribution:
        """:meth:`execute` for programs that run an event loop of their own."""
        plan = self.plan()
        plan.check()
        run_key = None if session is None else session.run_key
        with RunStore.create_or_open(self.run_dir, self._manifest(), run_key=run_key) as store:
            if session is not None:
                session.check_run(store.run_key)
            self._keep_data()
            with logging_to(self.run_dir / LOG_NAME):
                work = _Work(self, store, plan, on_event, on_progress, session, clock)
                try:
                    await work.train_and_score()
                except BaseException:
                    with suppress(DaunceError):  # what ended the run is what has to be said
                        self._save(store)
                    raise
                self._save(store)
                attribution = assemble(store, self.material, self.config, self.tokenizer)
                _check_differ(store, attribution)
                return attribution

    def attribution(self) -> Attribution:
        """The attribution of the members that are complete by now; also while another process works on the run.

        Raises NotEnoughMembersError with fewer than two, StoreError where there is no run.
        """
        with RunStore.open(self.run_dir, read_only=True) as store:
            return assemble(store, self.material, self.config, self.tokenizer)

    def status(self) -> RunStatus:
        """How far the run is; also while another process works on it. Raises StoreError where there is no run."""
        with RunStore.open(self.run_dir, read_only=True) as store:
            return status_of(store, self.material, self.config)

    def cancel(self) -> CancelReport:
        """Stop the jobs of the run that are not final; what is trained and scored is kept."""
        return self._at_provider(lambda orchestrator: orchestrator.cancel())

    def clean(self) -> CleanReport:
        """Delete what the run created at the provider: its jobs' models and its files, and nothing else."""
        return self._at_provider(lambda orchestrator: orchestrator.clean())

    def _at_provider(self, action: Callable[[Orchestrator], Coroutine[Any, Any, T]]) -> T:
        async def act() -> T:
            with RunStore.open(self.run_dir) as store:
                async with open_backend(self.config) as backend:
                    return await action(self._orchestrator(backend, store, self.plan(), None))

        return run_blocking(act())

    def _orchestrator(self, backend: Backend, store: RunStore, plan: Plan, clock: Clock | None) -> Orchestrator:
        return Orchestrator(
            backend.trainer,
            store,
            ensemble=self.material.ensemble,
            dataset=self.train,
            config=self.config,
            costs=plan.costs,
            clock=clock,
        )

    def _repr_html_(self) -> str:
        state = self.status()
        shown = {
            "run": f"{state.name} in {state.run_dir}",
            "model": f"{state.model} at {state.provider}",
            "members": f"{state.members_scored} of {state.members_asked} scored",
            "self_lds": "-" if state.self_lds is None else f"{state.self_lds.value:.2f}",
            "spent": f"${state.usd:,.2f}",
        }
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in shown.items())
        return f"<table>{rows}</table>"

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _manifest(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "train_digest": self.train.digest,
            "test_digest": self.test.digest,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def _keep_data(self) -> None:
        """Copies of the examples, so that the run folder stands alone; written before anything is bought."""
        for side, dataset in (("train", self.train), ("test", self.test)):
            path = _data_file(self.run_dir, side)
            if not _holds(path, dataset):
                dataset.to_jsonl(path)

    def _save(self, store: RunStore) -> None:
        if len(complete_members(store, self.material)) >= 2:
            assemble(store, self.material, self.config, self.tokenizer).save(self.run_dir / ATTRIBUTION_FOLDER)


class _Work:
    """One execution of a run: the objects that live only while it trains and scores."""

    def __init__(
        self,
        run: Run,
        store: RunStore,
        plan: Plan,
        on_event: OnEvent | None,
        on_progress: Progress | None,
        session: Session | None,
        clock: Clock | None,
    ) -> None:
        self._run = run
        self._store = store
        self._plan = plan
        self._on_event = on_event
        self._on_progress = on_progress
        self._session = session
        self._clock = session.clock if session is not None and clock is None else clock
        self._stop = run.config.ensemble.stop
        self._history: dict[int, SelfLDS] = {}

    async def train_and_score(self) -> None:
        """Everything that is missing; opens no backend where nothing is."""
        run, store = self._run, self._store
        finished = complete_members(store, run.material)
        if len(finished) == run.material.ensemble.members or self._enough(finished) is not None:
            return
        recording: AbstractContextManager[Any] = self._session or nullcontext()
        replaying = self._session is not None and self._session.replaying
        # A recording holds every request, so nothing may be answered from elsewhere while one is made or replayed.
        cache = None if self._session is not None else open_cache(run.config)
        with recording, cache or nullcontext():
            async with open_backend(run.config, replaying=replaying) as backend:
                self._client = ScoringClient(
                    backend.scorer,
                    store,
                    concurrency=run.config.scoring.concurrency,
                    clock=self._clock,
                    on_progress=self._on_progress,
                    cache=cache,
                )
                self._orchestrator = run._orchestrator(backend, store, self._plan, self._clock)
                self._plan.check_model(await self._orchestrator.model_info(run.config.backend.model))
                await self._orchestrator.run(self._score, self._tell, finished=finished)

    def _tell(self, event: Event) -> None:
        logger.info("%s", terminal_text(event.message))
        if self._on_event is not None:
            self._on_event(event)

    async def _score(self, member: int, model: str) -> None:
        """Everything that is asked of one model, as soon as it is there."""
        run = self._run
        if member == TARGET and not run.config.scoring.target:
            return
        subject = f"scoring of member {member}"
        self._store.reserve(subject, self._plan.scoring_usd_per_model or 0.0, cap=run.config.budget.max_usd)
        if member == PROBED_MEMBER:
            await self._client.probe(model, min(run.material.encoded, key=lambda e: (e.ids, e.targets)))
        if member != TARGET:
            # Before the scores: a member that has them all is complete, and never asked again.
            await self._client.probe_noise(member, model, run.material.encoded_train, run.config.scoring.noise_probe)
        await self._client.score_member(member, model, run.material.encoded)
        self._store.settle(subject, self._plan.scoring_usd_per_model or 0.0)
        reason = self._enough(complete_members(self._store, run.material))
        if reason is not None:
            self._orchestrator.halt(reason)

    def _enough(self, members: list[int]) -> str | None:
        """Why no further member is needed, by ``ensemble.stop``; looks at every ``check_every``-th complete member."""
        if self._stop is None:
            return None
        every = self._stop.check_every
        latest = len(members) // every * every
        for count in (latest - every, latest):
            if count >= MINIMUM_MEMBERS and count not in self._history:
                attribution = assemble(self._store, self._run.material, self._run.config)
                quality = attribution.first(count).self_lds
                if quality is not None:
                    self._history[count] = quality
        return stop_condition(self._stop).met([self._history[count] for count in sorted(self._history)])


def stop_condition(stop: StopConfig) -> Condition:
    """The condition that ``ensemble.stop`` describes. Raises ConfigurationError where it names none."""
    conditions: list[Condition] = []
    if stop.self_lds is not None:
        conditions.append(Reached(stop.self_lds))
    if stop.plateau is not None:
        conditions.append(Plateau(stop.plateau))
    if not conditions:
        raise ConfigurationError("ensemble.stop needs self_lds, plateau, or both.")
    return reduce(or_, conditions) & AtLeast(stop.min_members)


def _check_differ(store: RunStore, attribution: Attribution) -> None:
    """Raises ContractError where the members' answers show that the endpoint does not serve the fine-tunes."""
    models = store.ready_models()
    loss_KX = np.concatenate([attribution.test_loss_KM, attribution.train_loss_KN], axis=1)
    names = [models.get(k, f"member {k}") for k in attribution.members]
    check_members_differ(loss_KX, names, sigma=attribution.noise or 0.0)


def _data_file(run_dir: Path, side: str) -> Path:
    return run_dir / DATA_FOLDER / f"{side}.jsonl"


def _holds(path: Path, dataset: Dataset) -> bool:
    """Whether a file holds these examples; a torn or edited one does not."""
    try:
        return path.exists() and Dataset.from_jsonl(path).digest == dataset.digest
    except DataError:
        return False


def attribute(
    train: Dataset | str | Path,
    test: Dataset | str | Path,
    *,
    backend: Mapping[str, Any] | str = "embedded",
    members: int = 32,
    run_dir: str | Path = "runs/attribute",
    **sections: Any,
) -> Attribution:
    """Fine-tune ``members`` models on random halves of ``train`` and attribute the answers in ``test``: one call.

    ``backend`` is the name of a kind or the ``backend:`` section of a config; ``sections`` are further sections
    (``ensemble={"subset_ratio": 0.3}``, ``training=...``, ``budget={"max_usd": 20}``). The run lives in ``run_dir``;
    the same call again does only what is missing. Raises what :meth:`Run.execute` raises.
    """
    run_dir = Path(run_dir).expanduser().resolve()
    paths: dict[str, str] = {}
    data: dict[str, Dataset] = {}
    for side, given in (("train", train), ("test", test)):
        data[side] = given if isinstance(given, Dataset) else Dataset.from_jsonl(given)
        paths[side] = str(_data_file(run_dir, side) if isinstance(given, Dataset) else given)
    ensemble = {"members": members, **sections.pop("ensemble", {})}
    config = RunConfig.from_mapping(
        {
            "run_dir": str(run_dir),
            "data": {**paths, **sections.pop("data", {})},
            "backend": {"kind": backend} if isinstance(backend, str) else dict(backend),
            "ensemble": ensemble,
            **sections,
        }
    )
    return Run(config, data["train"], data["test"]).execute()
