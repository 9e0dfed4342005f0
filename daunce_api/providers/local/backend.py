"""What the trainer and the scorer of one run share (its folder, its workers, its kind of model), and the scorer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from ...config import RunConfig
from ...data.tokenizers import EncodedExample, LocalTokenizer, Tokenizer
from ...errors import DaunceError, RejectedError, TransientError
from ..base import Closing, ScorerCapabilities, TokenScores
from ..registry import Context
from .engines import Engine, ProcessEngine, RayEngine, ThreadEngine, WorkerLostError
from .models import check_device, context_of, model_class, resolve_model
from .options import LocalOptions, TaskSpec, options_of
from .store import JobFolder

FOLDER = "local"
"""Inside the run folder."""
_MOST_CUTS = 6
"""Times that memory may run out while scoring, each followed by passes of half the size."""


class LocalRun:
    """What the trainer and the scorer of one run share: the folder, the workers, and what they train.

    That is a language model, by LoRA or full fine-tuning, or a classifier of the user's own: nothing of it is imported
    here, only in workers.
    """

    def __init__(self, config: RunConfig, engine: Engine | None = None) -> None:
        """``engine`` replaces the one that the options name; the caller closes it."""
        self.config, self.model = config, config.backend.model
        self.options = options = options_of(config)
        self.spec, self.settings = options.spec(config), options.settings
        self.folder = JobFolder(config.run_dir / FOLDER)
        self._engine, self._own = engine, engine is None
        self._users = 0
        self._starting = asyncio.Lock()

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence of a language model, from its configuration."""
        return None if self.options.task else context_of(self.model)

    def tokenizer(self) -> Tokenizer:
        if isinstance(self.spec, TaskSpec):
            from .task import TaskTokenizer

            return TaskTokenizer(self.spec)
        return LocalTokenizer(self.config.backend.tokenizer or resolve_model(self.model, weights=False)[1])

    async def check_base(self) -> None:
        """Raises ConfigurationError where the base model cannot be used."""
        if isinstance(self.spec, TaskSpec):
            from .worker import check_task

            await asyncio.to_thread(self.spec.digest)
            await self.work(check_task, self.spec)
        elif self.options.engine != "ray":  # the machines of a cluster have devices and files of their own
            folder = (await asyncio.to_thread(resolve_model, self.model))[1]
            await asyncio.to_thread(model_class, folder)
            await asyncio.to_thread(check_device, self.options.device)

    async def engine(self) -> Engine:
        """The workers, started at first use. Raises ConfigurationError or MissingExtraError where they cannot be."""
        async with self._starting:
            if self._engine is None:
                self._engine = await asyncio.to_thread(_start_engine, self.options)
            return self._engine

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns in a worker."""
        return await asyncio.wrap_future((await self.engine()).submit(function, *arguments))

    def enter(self) -> None:
        self._users += 1

    async def leave(self) -> None:
        """The last one to leave stops the workers."""
        self._users -= 1
        if self._users == 0 and self._own and self._engine is not None:
            engine, self._engine = self._engine, None
            await asyncio.shield(asyncio.to_thread(engine.close))

    def adapter(self, model: str) -> Path | None:
        """Folder of a fine-tune's model id, an adapter or a whole model; None for the base model. Raises RejectedError
        for an unknown id."""
        if model == self.model:
            return None
        if (folder := self.folder.adapter(model)) is not None:
            return folder
        if any(Path(model).glob("*.safetensors")):
            return Path(model)
        raise RejectedError(
            f"model {model!r} is neither {self.model}, a model of this run, nor the folder of an adapter or a model"
        )


def _start_engine(options: LocalOptions) -> Engine:
    if options.engine == "ray":
        ray = options.ray  # an actor takes one GPU, and the cluster hides all others from it
        gpus = float(options.device.startswith("cuda")) if ray.gpus is None else ray.gpus
        return RayEngine(address=ray.address, cpus=ray.cpus, gpus=gpus, workers=options.workers)
    if options.engine == "thread":
        return ThreadEngine()
    return ProcessEngine(options.worker_count, gpus=options.device == "cuda")


def run_of(context: Context) -> LocalRun:
    """The one that the trainer and the scorer of a context share."""
    if FOLDER not in context.shared:
        context.shared[FOLDER] = LocalRun(context.config)
    run: LocalRun = context.shared[FOLDER]
    return run


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the model."""
    return LocalRun(config).tokenizer()


def open_scorer(context: Context) -> LocalScorer:
    """The scorer of a run; it shares workers and adapters with the run's trainer."""
    return LocalScorer(run_of(context))


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Exact log-probabilities of any completion."""
    run = LocalRun(config)
    return ScorerCapabilities(
        provider="this machine",
        scope="any",
        max_context_tokens=run.context_tokens,
        max_prompts_per_request=4096 if run.options.task else 256,
        max_concurrent_requests=2 * run.options.worker_count,
    )


class LocalScorer(Closing):
    """Exact log-probabilities from this machine's workers, several examples of one member in a padded pass.

    The same request gives the same bits on a CPU; an example in other company differs by float32 round-off (see
    :meth:`daunce_api.providers.local.language.LanguageModel.target_logprobs`).
    """

    def __init__(self, run: LocalRun) -> None:
        self._run = run
        self.capabilities = scorer_capabilities(run.config)
        options, device = run.options, run.options.device.partition(":")[0]
        held = f"{run.model}:{device}:{options.precision}:{options.quantisation or 'plain'}"
        self.fingerprint = f"local:{options.task}:{device}" if options.task else f"local:{held}"
        self._cuts = 0

    async def __aenter__(self) -> Self:
        self._run.enter()
        return self

    async def close(self) -> None:
        await self._run.leave()

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Raises RejectedError for an unknown model, an example that the model cannot read, or one that does not fit
        into memory; WorkerLostError, with smaller passes from then on, where memory ran out."""
        from .worker import run_score

        tuned = self._run.adapter(model)
        task = self._run.options.task
        rows = [(e.example.prompt, e.example.completion) if task else (e.ids, e.targets) for e in batch]
        cuts = self._cuts
        try:
            answers = await self._run.work(run_score, self._run.spec, tuned, rows, cuts)
        except WorkerLostError as error:
            if error.out_of_memory:  # several workers may run out in the same moment, which counts once
                self._cuts = max(self._cuts, cuts + 1)
            if self._cuts > _MOST_CUTS:
                raise RejectedError(
                    f"{error}. Memory ran out {self._cuts} times while scoring. Set "
                    "backend.options.quantisation, dtype: bfloat16 or fewer workers; what is scored is kept."
                ) from error
            raise
        except DaunceError as error:
            if isinstance(error, TransientError):
                raise
            raise RejectedError(f"{model} could not score the batch: {error}") from error
        return [TokenScores(answer) for answer in answers]
