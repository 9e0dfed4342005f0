"""What the trainer and the scorer of one run share (its folder, its workers, its family of models), and the scorer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ...config import RunConfig
from ...data.tokenizers import EncodedExample, LocalTokenizer, Tokenizer
from ...errors import DaunceError, RejectedError, TransientError
from ..base import ScorerCapabilities, TokenScores
from ..registry import Context
from .engines import Engine, ProcessEngine, RayEngine, ThreadEngine, WorkerLostError
from .models import check_device, context_of, is_full, resolve_model
from .options import (
    CLASSIFIER_HYPERPARAMETERS,
    HYPERPARAMETERS,
    ClassifierSettings,
    LocalOptions,
    classifier_settings_of,
    objective_of,
    options_of,
    settings_of,
)
from .store import Files, JobFolder, MemberTask

if TYPE_CHECKING:
    from .worker import ScoreTask, TrainTask

FOLDER = "local"
"""Inside the run folder."""
# What a run gains from larger groups, against later results: tests/benchmarks/RESULTS-local.md.
_ADAPTERS = 8
_CLASSIFIERS = 32
_MOST_KILLED = 6
"""Times that a worker may be killed while it scores, each followed by passes of half the size."""


class Family(Protocol):
    """Language models, or a task's classifier."""

    hyperparameters: frozenset[str]
    prompts_per_request: int
    fingerprint: str
    members_at_a_time: int
    """Of a group, where the options do not say."""
    writes_folders: bool
    """Whether workers that share this machine's folders write a fine-tune themselves, because it is large."""
    epochs: int
    """Of a job whose hyperparameters do not say."""

    @property
    def context_tokens(self) -> int | None: ...

    def tokenizer(self) -> Tokenizer: ...

    async def check_base(self, run: LocalRun) -> None:
        """Raises ConfigurationError where the base model cannot be used."""
        ...

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        """Raises RejectedError where they cannot be used."""
        ...

    def is_model(self, folder: Path) -> bool:
        """Whether a folder of the user's holds a fine-tune."""
        ...

    def train_task(self, hyperparameters: Mapping[str, Any], members: Sequence[MemberTask], cuts: int) -> TrainTask:
        """The members agree in where they start."""
        ...

    def score_task(self, tuned: Path | Files | None, batch: Sequence[EncodedExample], cuts: int) -> ScoreTask: ...


class LanguageFamily:
    """Causal language models, by LoRA or full fine-tuning."""

    def __init__(self, config: RunConfig, options: LocalOptions) -> None:
        self._config, self._options = config, options
        own = config.backend.kind == "local"  # otherwise the tokenizer belongs to whoever trains
        self._spec = spec = options.spec(config.backend.model, config.backend.tokenizer if own else None)
        self.hyperparameters = HYPERPARAMETERS[options.fine_tuning]
        self.prompts_per_request = 256
        self.fingerprint = (
            f"local:{spec.path}:{spec.device.partition(':')[0]}:{spec.dtype}:{spec.quantisation or 'plain'}"
        )
        self.members_at_a_time = 1 if options.fine_tuning == "full" else _ADAPTERS
        self.writes_folders = options.fine_tuning == "full"
        self.epochs = settings_of({}, options.fine_tuning).n_epochs

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence of the model, from its configuration."""
        return context_of(self._config.backend.model)

    def tokenizer(self) -> Tokenizer:
        own = self._config.backend.tokenizer
        return LocalTokenizer(own or resolve_model(self._config.backend.model, weights=False)[1])

    async def check_base(self, run: LocalRun) -> None:
        if self._options.engine != "ray":  # the machines of a cluster have devices and files of their own
            await asyncio.to_thread(resolve_model, self._config.backend.model)
            await asyncio.to_thread(check_device, self._options.device)

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        settings_of(hyperparameters, self._options.fine_tuning)

    def is_model(self, folder: Path) -> bool:
        return (folder / "adapter_config.json").is_file() or is_full(folder)

    def train_task(self, hyperparameters: Mapping[str, Any], members: Sequence[MemberTask], cuts: int) -> TrainTask:
        from .worker import TrainTask

        options = self._options
        return TrainTask(
            self._spec,
            settings_of(hyperparameters, options.fine_tuning),
            objective_of(options, from_base=members[0].start is None),
            tuple(members),
            memory_limit=options.memory_limit,
            workers=options.worker_count,
            checkpoints=_kept_epochs(self._config, members),
            tokens=options.tokens_per_pass,
            cuts=cuts,
        )

    def score_task(self, tuned: Path | Files | None, batch: Sequence[EncodedExample], cuts: int) -> ScoreTask:
        from .worker import ScoreTask

        return ScoreTask(self._spec, tuned, sequences=tuple((e.ids, e.targets) for e in batch), cuts=cuts)


class TaskFamily:
    """A classifier of the user's own. Nothing of it is imported here, only in workers."""

    def __init__(self, config: RunConfig, options: LocalOptions) -> None:
        self._config, self._options = config, options
        self._spec = options.task_spec(config)
        self.hyperparameters = CLASSIFIER_HYPERPARAMETERS
        self.prompts_per_request = 4096
        self.fingerprint = f"local:{self._spec.task}:{options.device.partition(':')[0]}"
        self.members_at_a_time = _CLASSIFIERS
        self.writes_folders = False
        self.epochs = ClassifierSettings().n_epochs

    @property
    def context_tokens(self) -> None:
        return None

    def tokenizer(self) -> Tokenizer:
        from .task import TaskTokenizer

        return TaskTokenizer(self._spec)

    async def check_base(self, run: LocalRun) -> None:
        from .worker import check_task

        await asyncio.to_thread(self._spec.digest)
        await run.work(check_task, self._spec)

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        classifier_settings_of(hyperparameters)

    def is_model(self, folder: Path) -> bool:
        return (folder / "model.safetensors").is_file()

    def train_task(self, hyperparameters: Mapping[str, Any], members: Sequence[MemberTask], cuts: int) -> TrainTask:
        from .worker import TrainTask

        options = self._options
        return TrainTask(
            self._spec,
            classifier_settings_of(hyperparameters),
            objective_of(options, from_base=members[0].start is None),
            tuple(members),
            memory_limit=options.memory_limit,
            checkpoints=_kept_epochs(self._config, members),
            cuts=cuts,
        )

    def score_task(self, tuned: Path | Files | None, batch: Sequence[EncodedExample], cuts: int) -> ScoreTask:
        from .worker import ScoreTask

        records = tuple((e.example.prompt, e.example.completion) for e in batch)
        return ScoreTask(self._spec, tuned, records=records, cuts=cuts)


def _kept_epochs(config: RunConfig, members: Sequence[MemberTask]) -> int:
    """Epochs before the last one whose models are kept: none of the target's, which is not scored epoch by epoch."""
    is_target = config.ensemble.start_from == "target" and members[0].start is None
    return 0 if is_target else config.ensemble.checkpoints - 1


class LocalRun:
    """What the trainer and the scorer of one run share: the folder and the workers."""

    def __init__(self, config: RunConfig, engine: Engine | None = None) -> None:
        """``engine`` replaces the one that the options name; the caller closes it."""
        self.config = config
        self.options = options_of(config)
        self.model = config.backend.model
        self.family: Family = (TaskFamily if self.options.task else LanguageFamily)(config, self.options)
        self._engine = engine
        self._own = engine is None
        self._users = 0
        self._starting = threading.Lock()

    @cached_property
    def folder(self) -> JobFolder:
        """Made at first use: a plan makes none."""
        return JobFolder(self.config.run_dir / FOLDER)

    @property
    def engine(self) -> Engine:
        """The workers, started at first use. Raises ConfigurationError or MissingExtraError where they cannot be."""
        with self._starting:  # the trainer and the scorer ask from threads of their own
            if self._engine is None:
                self._engine = _start_engine(self.options)
            return self._engine

    async def work(self, function: Callable[[Any], Any], task: Any) -> Any:
        """What a worker makes of a task."""
        engine = await asyncio.to_thread(lambda: self.engine)
        return await asyncio.wrap_future(engine.submit(function, task))

    def enter(self) -> None:
        self._users += 1

    def leave(self) -> None:
        """The last one to leave stops the workers."""
        self._users -= 1
        if self._users == 0 and self._own and self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()

    def adapter(self, model: str) -> Path | None:
        """Folder of a fine-tune's model id, an adapter or a whole model; None for the base model. Raises RejectedError
        for an unknown id."""
        if model == self.model:
            return None
        folder = self.folder.adapter(model)
        if folder is not None:
            return folder
        if self.family.is_model(Path(model)):
            return Path(model)
        raise RejectedError(
            f"model {model!r} is neither {self.model}, a model of this run, nor the folder of an adapter or a model"
        )


def _start_engine(options: LocalOptions) -> Engine:
    if options.engine == "ray":
        ray, gpus = options.ray, options.gpus_per_actor
        return RayEngine(address=ray.address, cpus=ray.cpus, gpus=gpus, retries=ray.retries, workers=options.workers)
    if options.engine == "thread":
        return ThreadEngine()
    return ProcessEngine(options.worker_count, gpus=options.device == "cuda")


def adapter_files(folder: Path | None) -> Files | None:
    """Content of a fine-tune's folder."""
    return None if folder is None else {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def run_of(context: Context) -> LocalRun:
    """The one that the trainer and the scorer of a context share."""
    run = context.shared.get("local")
    if not isinstance(run, LocalRun):
        run = context.shared["local"] = LocalRun(context.config)
    return run


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the model."""
    return LocalRun(config).family.tokenizer()


def open_scorer(context: Context) -> LocalScorer:
    """The scorer of a run; it shares workers and adapters with the run's trainer."""
    return LocalScorer(run_of(context))


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Exact log-probabilities of any completion."""
    run = LocalRun(config)
    return ScorerCapabilities(
        provider="this machine",
        scope="any",
        max_context_tokens=run.family.context_tokens,
        max_prompts_per_request=run.family.prompts_per_request,
        max_concurrent_requests=2 * run.options.worker_count,
    )


class LocalScorer:
    """Exact log-probabilities from this machine's workers, several examples of one member in a padded pass.

    The same request gives the same bits on a CPU; an example in other company differs by float32 round-off (see
    :class:`daunce_api.providers.local.score.Passes`).
    """

    def __init__(self, run: LocalRun) -> None:
        self._run = run
        self._killed = 0

    @cached_property
    def capabilities(self) -> ScorerCapabilities:
        return scorer_capabilities(self._run.config)

    @property
    def fingerprint(self) -> str:
        return self._run.family.fingerprint

    async def __aenter__(self) -> Self:
        self._run.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.to_thread(self._run.leave)

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Raises RejectedError for an unknown model, an example that the model cannot read, or one that does not fit
        into memory; WorkerLostError, with smaller passes from then on, where a worker was killed."""
        from .worker import run_score

        folder = self._run.adapter(model)
        engine = await asyncio.to_thread(lambda: self._run.engine)
        tuned = folder if engine.shares_files else await asyncio.to_thread(adapter_files, folder)
        try:
            answers = await self._run.work(run_score, self._run.family.score_task(tuned, batch, self._killed))
        except WorkerLostError as error:
            self._killed += error.killed
            if self._killed > _MOST_KILLED:
                raise RejectedError(
                    f"{error}. {self._killed} workers were killed while they scored. Set "
                    "backend.options.quantisation, dtype: bfloat16 or fewer workers; what is scored is kept."
                ) from error
            raise
        except DaunceError as error:
            if isinstance(error, TransientError):
                raise
            raise RejectedError(f"{model} could not score the batch: {error}") from error
        return [TokenScores(answer) for answer in answers]
