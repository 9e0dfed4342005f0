"""``Run``: plan, train, score, attribute, in that order. The only module that knows all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ._util.blocking import run_blocking
from ._util.clock import Clock
from ._util.log import logging_to
from .attribution import Attribution
from .attribution.from_store import Material, assemble, complete_members
from .config import RunConfig
from .data.dataset import Dataset
from .data.subsets import plan_ensemble
from .data.tokenizers import EncodedExample, Tokenizer, encode_dataset
from .errors import ConfigurationError, DataError, DaunceError, StoreCorruptError
from .execution import Execution
from .plan import Missing, Plan, make_plan, plan_of_missing
from .providers.base import Deferred, within_scope
from .providers.registry import Backend, capabilities_of, open_backend, open_tokenizer
from .providers.replay import Session
from .score.client import Progress
from .score.leftovers import take_off, take_off_before
from .status import RunStatus, status_of
from .store import FINAL, TARGET, RunStore
from .train import CancelReport, CleanReport, JobClient, OnEvent, cancel_jobs, clean_up

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
        self._encoded: dict[Dataset, tuple[EncodedExample, ...]] = {}
        self._plan: Plan | None = None

    @classmethod
    def create(cls, config: RunConfig | Mapping[str, Any] | str | Path) -> Run:
        """From a config, a mapping of its keys, or the path of a YAML file; reads and checks the data.

        Raises ConfigurationError, DataError.
        """
        if isinstance(config, str | Path):
            config = RunConfig.from_yaml(config)
        elif not isinstance(config, RunConfig):
            config = RunConfig.from_mapping(dict(config))
        columns = config.data.columns
        return cls(config, Dataset.from_file(config.data.train, columns), Dataset.from_file(config.data.test, columns))

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

    def encoded(self, dataset: Dataset) -> tuple[EncodedExample, ...]:
        """A data set as token ids of the run's tokenizer, the turns that are measured as targets; encoded once.

        Raises DataError that lists every line that cannot be encoded.
        """
        if dataset not in self._encoded:
            one_turn = capabilities_of(self.config)[1].one_turn
            data = self.config.data
            turns = data.measured(one_turn=one_turn) if dataset is self.train else data.asked
            self._encoded[dataset] = encode_dataset(dataset, self.tokenizer, turns)
        return self._encoded[dataset]

    def plan(self, *, max_usd: float | None = None) -> Plan:
        """Jobs, tokens, dollars and time of what is missing: of the whole run before it is started. No network, no key,
        nothing is written. ``max_usd`` takes the place of ``budget.max_usd``.

        Raises DataError or ConfigurationError. Reasons not to start are in ``Plan.refusals``; :meth:`Plan.check` raises
        the first.
        """
        config = with_cap(self.config, max_usd)
        if not RunStore.exists(self.run_dir):
            return plan_of_missing(config, self._whole_plan(), None)
        with RunStore.open(self.run_dir, read_only=True) as store:
            return plan_of_missing(config, self._whole_plan(), self._missing(store))

    def _whole_plan(self) -> Plan:
        """Cached per UTC day: provider shutdown dates depend on it."""
        today = datetime.now(UTC).date()
        if self._plan is None or self._plan.today != today:
            trainer, scorer = capabilities_of(self.config)
            self._plan = make_plan(self.config, self.train, self.test, self.encoded, trainer, scorer, today=today)
        return self._plan

    def _missing(self, store: RunStore) -> Missing:
        finished, ready = set(complete_members(store, self.material)), store.jobs.ready_models()
        live = {job.member for job in store.jobs.rows() if job.status not in FINAL}
        members = self.material.ensemble.members
        training = {k for k in range(members) if k not in finished and k not in ready}
        models = sum(
            not self.material.is_scored(store, k, n)
            for k in set(range(members)) - finished
            for n in range(self.material.models)
        )
        shape = self.config.ensemble
        target_unscored = self.config.scoring.target and not self.material.is_scored(store, TARGET)
        models += target_unscored
        made_here = shape.start_from == "target" and shape.target_model is None
        if made_here and TARGET not in ready and (training or target_unscored):
            training.add(TARGET)
        return Missing(frozenset(training - live), frozenset(training), models, store.ledger.spent())

    @cached_property
    def material(self) -> Material:
        """The examples as token ids, and the ensemble. Raises DataError for examples that cannot be encoded and
        CapabilityError for those that the scorer cannot measure."""
        trainer, scorer = capabilities_of(self.config)
        return Material(
            self.train,
            self.test,
            scorer.measured,
            tuple(within_scope(e, scorer) for e in self.encoded(self.train)),
            tuple(within_scope(e, scorer) for e in self.encoded(self.test)),
            plan_ensemble(
                len(self.train),
                self.config.ensemble.members,
                self.config.ensemble.subset_ratio,
                self.config.ensemble.seed,
                min_subset=trainer.min_examples,
            ),
            self.config.ensemble.checkpoints,
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
        adopt: bool = False,
    ) -> Attribution:
        """Train and score what is missing, then attribute; the same call again does only what is missing.

        ``on_event`` and ``on_progress`` are told what happens; ``session`` records or replays the API traffic
        (:mod:`daunce_api.providers.replay`). Whatever ends it, what was trained and scored is kept, and an attribution
        of the members that are complete is saved in the run folder. ``adopt`` takes over jobs of this run that the
        provider has and the run folder does not know, instead of raising UnknownJobsError. Raises any
        :class:`~daunce_api.errors.DaunceError`; KeyboardInterrupt leaves a run that the same call takes up.
        """
        return run_blocking(
            self.execute_async(
                on_event=on_event,
                on_progress=on_progress,
                session=session,
                clock=clock,
                max_usd=max_usd,
                adopt=adopt,
            )
        )

    async def execute_async(
        self,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        session: Session | None = None,
        clock: Clock | None = None,
        max_usd: float | None = None,
        adopt: bool = False,
    ) -> Attribution:
        """:meth:`execute` for programs that run an event loop of their own."""
        plan = self.plan(max_usd=max_usd)
        plan.check()
        run_key = None if session is None else session.run_key
        with RunStore.create_or_open(self.run_dir, self._manifest(), run_key=run_key) as store:
            if session is not None:
                session.check_run(store.run_key)
            self._keep_data()
            with logging_to(self.run_dir / LOG_NAME):
                if session is None:
                    await take_off_before(self.config, store)
                if max_usd is not None:
                    store.note("budget", f"max_usd {max_usd:g} for this command")
                work = Execution(
                    with_cap(self.config, max_usd),
                    self.material,
                    store,
                    plan,
                    on_event=on_event,
                    on_progress=on_progress,
                    clock=clock,
                    adopt=adopt,
                )
                try:
                    await work.train_and_score(session)
                except BaseException:
                    with suppress(DaunceError):  # what ended the run is what has to be said
                        self._save(store)
                    raise
                self._save(store)
                return assemble(store, self.material, self.config, self.tokenizer)

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
        """Stop the jobs of the run that are not final; what is trained and scored is kept. Needs the run folder and
        the provider, and neither the tokenizer nor the original data."""
        return self._at_provider(lambda client, _: cancel_jobs(client))

    def clean(self) -> CleanReport:
        """Delete what the run created at the provider: its jobs' models and its files, and nothing else. What it left
        on the scoring server (deployments, adapters) is unloaded first. Needs as little as :meth:`cancel`."""
        return self._at_provider(clean_everything)

    def _at_provider(self, action: Callable[[JobClient, Backend], Coroutine[Any, Any, T]]) -> T:
        async def act() -> T:
            with RunStore.open(self.run_dir) as store:
                async with open_backend(self.config) as backend:
                    return await action(JobClient(backend.trainer, store), backend)

        return run_blocking(act())

    def _repr_html_(self) -> str:
        from .attribution.notebook import rows_html

        try:
            if RunStore.exists(self.run_dir):
                return rows_html("Run", self.status().rows())
            return rows_html("Run, not started", [("Folder", str(self.run_dir)), *self.plan().rows()])
        except DaunceError as error:  # a notebook shows what can be said, no traceback
            return rows_html("Run", [("folder", str(self.run_dir)), (type(error).__name__, str(error))])

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


async def clean_everything(client: JobClient, backend: Backend) -> CleanReport:
    """Delete what a run created at its provider: models and files of its jobs, batches of its scoring; what it left on
    the scoring server is unloaded first."""
    store, scorer = client.store, backend.scorer
    hosted = store.hosted.models()
    kept = await take_off(scorer, store)
    report = await clean_up(client)
    report.unloaded = [model for model in hosted if model not in kept]
    report.kept.update({f"{model} on the scoring server": why for model, why in kept.items()})
    if isinstance(scorer, Deferred):
        swept = await scorer.sweep(store.jobs.models())
        report.files += swept.files
        report.kept |= swept.kept
    return report


def _data_file(run_dir: Path, side: str) -> Path:
    return run_dir / DATA_FOLDER / f"{side}.jsonl"


def _holds(path: Path, dataset: Dataset) -> bool:
    """Whether a file holds these examples; a torn or edited one does not."""
    try:
        return path.exists() and Dataset.from_jsonl(path).digest == dataset.digest
    except DataError:
        return False


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
        data[side] = given if isinstance(given, Dataset) else Dataset.from_file(given)
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
