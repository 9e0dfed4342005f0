"""Members trained on Tinker: the loop runs here, its forward, backward and optimiser steps run there.

Subset, order, seed and the weight of every token are the run's own. Each example counts by its mean loss, as it is
measured. A loop ends with the process that runs it; its job is then failed and is trained again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..._util.files import replacing
from ...config import RunConfig
from ...data.dataset import Dataset
from ...data.tokenizers import EncodedExample, Tokenizer, encode_example
from ...errors import DaunceError, ProviderError, RejectedError, StopError
from ..base import Job, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..options import Options, parse_options
from ..registry import Context
from ..tokenizers import tokenizer_of
from .recipe import HYPERPARAMETERS, Recipe, batches_of, datum
from .service import Service, open_service

KEY_FIELD = "daunce_key"
CHECKPOINT = "daunce-final"
EPOCH_CHECKPOINT = "daunce-epoch-"
"""Before the number of an epoch, from 1; with leading zeros, so that names sort as epochs do."""
MOST_CHECKPOINTS = 100
FILES_FOLDER = "tinker"
"""Inside the run folder."""
NOTES = (
    "the training loop runs in this process: a member whose loop was interrupted is trained again",
    "one optimiser step takes at least one of Tinker's clock cycles, however small the batch",
)
_PAGE = 100


class TinkerOptions(Options):
    """``backend.options`` of the Tinker trainer."""

    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Any subset, seed and recipe; no network."""
    parse_options(TinkerOptions, config.backend.options, "backend.options")
    return TrainerCapabilities(
        provider="Tinker",
        max_concurrent_jobs=config.backend.max_concurrent_jobs or 4,
        hyperparameters=HYPERPARAMETERS,
        checkpoints=MOST_CHECKPOINTS,
        notes=NOTES,
    )


def open_trainer(context: Context) -> TinkerTrainer:
    """A trainer that keeps the members' files in the run folder."""
    config = context.config
    return TinkerTrainer(
        open_service(context),
        trainer_capabilities(config),
        parse_options(TinkerOptions, config.backend.options, "backend.options"),
        tokenizer=tokenizer_of(config),
        folder=config.run_dir / FILES_FOLDER,
        base_model=config.backend.model,
        scored=config.ensemble.checkpoints,
    )


@dataclass
class _Progress:
    key: str
    step: int = 0
    steps: int = 1


@dataclass(frozen=True, slots=True)
class _Loop:
    progress: _Progress
    task: asyncio.Task[str]
    tokens: int


class TinkerTrainer:
    """``Trainer`` on Tinker, ``Checkpointing``. Closing it stops the loops that still run.

    ``scored`` models of each job are kept: the final one and those after the epochs before it.
    """

    def __init__(
        self,
        service: Service,
        capabilities: TrainerCapabilities,
        options: TinkerOptions,
        *,
        tokenizer: Tokenizer,
        folder: Path,
        base_model: str,
        scored: int = 1,
    ) -> None:
        self._service = service
        self._capabilities = capabilities
        self._options = options
        self._tokenizer = tokenizer
        self._folder = folder
        self._base_model = base_model
        self._scored = scored
        self._loops: dict[str, _Loop] = {}

    @property
    def capabilities(self) -> TrainerCapabilities:
        return self._capabilities

    async def model_info(self, model: str) -> ModelInfo:
        """Raises RejectedError where Tinker does not train this model."""
        if model.startswith("tinker://"):
            return ModelInfo(model)
        rest = await self._service.rest()
        answer = await self._service.start(rest.get_server_capabilities, doing="listing models")
        names = sorted(str(m.model_name) for m in answer.supported_models if m.trainable is not False)
        if model not in names:
            raise RejectedError(f"Tinker does not train {model!r}. It trains {', '.join(names)}.")
        return ModelInfo(model)

    async def upload(self, name: str, content: bytes) -> str:
        """Keep a training file in the run folder; its name."""
        with replacing(self._path(name)) as part:
            part.write_bytes(content)
        return name

    async def find_file(self, name: str, size: int) -> str | None:
        path = self._path(name)
        return name if path.is_file() and path.stat().st_size == size else None

    async def submit(self, request: JobRequest) -> Job:
        """Create the training run and start its loop. Raises AmbiguousSubmitError when no answer tells whether the
        run was created."""
        recipe = Recipe.of(request.hyperparameters)
        examples = self._examples(request.file_id)
        metadata = {KEY_FIELD: request.key}
        client = await self._service.client()
        doing = f"creating the training run of {request.key}"
        if request.model == self._base_model:
            training = await self._service.start(
                lambda: client.create_lora_training_client(
                    base_model=request.model,
                    rank=recipe.rank,
                    seed=request.seed,
                    user_metadata=metadata,
                    **self._options.model_dump(),
                ),
                doing=doing,
                submit=True,
            )
        else:
            path = request.model.replace("/sampler_weights/", "/weights/")
            training = await self._service.start(
                lambda: client.create_training_client_from_state(path, user_metadata=metadata),
                doing=doing,
                submit=True,
            )
        job_id = str(training.get_info().model_id)
        tokens = recipe.n_epochs * sum(len(e.ids) for e in examples)
        progress = _Progress(request.key)
        task = asyncio.create_task(self._train(training, examples, recipe, request.seed, progress))
        self._loops[job_id] = _Loop(progress, task, tokens)
        return Job(job_id, JobStatus.RUNNING)

    async def _train(
        self, training: Any, examples: list[EncodedExample], recipe: Recipe, seed: int, progress: _Progress
    ) -> str:
        """Run the loop to its end: the path of the sampler's weights."""
        import tinker

        batches = batches_of(len(examples), recipe, seed)
        progress.steps = len(batches)
        per_epoch = len(batches) // recipe.n_epochs
        call = self._service.calls.call
        for progress.step, batch in enumerate(batches):
            data = [datum(tinker, examples[i], 1.0 / len(batch)) for i in batch]
            rate = recipe.learning_rate * (1.0 - progress.step / len(batches))
            params = tinker.AdamParams(
                learning_rate=rate, weight_decay=recipe.weight_decay, grad_clip_norm=recipe.grad_clip_norm
            )
            # Both are sent before either is awaited, so that they share a clock cycle.
            gradients = training.forward_backward(data, "cross_entropy")
            update = training.optim_step(params)
            await call(gradients, doing=f"step {progress.step + 1} of {progress.key}")
            await call(update, doing=f"step {progress.step + 1} of {progress.key}")
            epoch, rest = divmod(progress.step + 1, per_epoch)
            if rest == 0 and recipe.n_epochs - self._scored < epoch < recipe.n_epochs:
                name = f"{EPOCH_CHECKPOINT}{epoch:04}"
                await call(training.save_weights_for_sampler(name), doing=f"saving {progress.key}")
        progress.step = progress.steps
        await call(training.save_state(CHECKPOINT), doing=f"saving {progress.key}")
        saved = await call(training.save_weights_for_sampler(CHECKPOINT), doing=f"saving {progress.key}")
        return str(saved.path)

    async def find_job(self, key: str) -> Job | None:
        """The training run that carries this key in its metadata; of two, one that is running here or finished."""
        for job_id, loop in self._loops.items():
            if loop.progress.key == key:
                return await self.get(job_id)
        rest = await self._service.rest()
        found: list[Any] = []
        offset, total = 0, 1
        while offset < total:
            page = await self._service.start(
                partial(rest.list_training_runs, limit=_PAGE, offset=offset), doing=f"looking up {key}"
            )
            found += [run for run in page.training_runs if (run.user_metadata or {}).get(KEY_FIELD) == key]
            total = page.cursor.total_count
            offset += _PAGE
        jobs = [_ended(run) for run in found]
        return next((job for job in jobs if job.status is JobStatus.SUCCEEDED), jobs[-1] if jobs else None)

    async def get(self, job_id: str) -> Job:
        loop = self._loops.get(job_id)
        if loop is None:
            rest = await self._service.rest()
            run = await self._service.start(lambda: rest.get_training_run(job_id), doing=f"reading run {job_id}")
            return _ended(run)
        if not loop.task.done():
            return Job(job_id, JobStatus.RUNNING, progress=loop.progress.step / loop.progress.steps)
        if loop.task.cancelled():
            return Job(job_id, JobStatus.CANCELLED)
        error = loop.task.exception()
        if isinstance(error, StopError) or (error is not None and not isinstance(error, DaunceError)):
            raise error
        if error is not None:
            return Job(job_id, JobStatus.FAILED, error=str(error))
        return Job(job_id, JobStatus.SUCCEEDED, model=loop.task.result(), trained_tokens=loop.tokens, progress=1.0)

    async def checkpoints(self, job_id: str) -> list[str]:
        """Paths of the sampler's weights after the epochs before the last, in order."""
        rest = await self._service.rest()
        answer = await self._service.start(lambda: rest.list_checkpoints(job_id), doing=f"listing models of {job_id}")
        prefix = f"sampler_weights/{EPOCH_CHECKPOINT}"
        kept = [c for c in answer.checkpoints if str(c.checkpoint_id).startswith(prefix)]
        return [str(c.tinker_path) for c in sorted(kept, key=lambda c: str(c.checkpoint_id))]

    async def cancel(self, job_id: str) -> Job:
        """Stop the loop; what was trained so far stays on Tinker without a checkpoint."""
        loop = self._loops.get(job_id)
        if loop is not None:
            loop.task.cancel()
            await asyncio.wait([loop.task])
        return await self.get(job_id)

    async def delete_file(self, file_id: str) -> bool:
        self._path(file_id).unlink(missing_ok=True)
        return True

    async def delete_model(self, model: str) -> bool:
        """Deletes both checkpoints of a finished member."""
        rest = await self._service.rest()
        gone = True
        for path in {model, model.replace("/sampler_weights/", "/weights/")}:
            try:
                await self._service.start(
                    partial(rest.delete_checkpoint_from_tinker_path, path), doing=f"deleting {path}"
                )
            except ProviderError as error:
                if error.status == 401:
                    raise
                gone = gone and error.status == 404
        return gone

    def _path(self, name: str) -> Path:
        return self._folder / Path(name).name

    def _examples(self, file_id: str) -> list[EncodedExample]:
        # Turns without loss carry weight 0 in the file, so that "all" is what is measured.
        dataset = Dataset.from_jsonl(self._path(file_id))
        return [encode_example(example, self._tokenizer, "all") for example in dataset]

    async def __aenter__(self) -> Self:
        self._service.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [loop.task for loop in self._loops.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._service.leave()


def _ended(run: Any) -> Job:
    """A training run that no loop of this process works on."""
    checkpoint = run.last_sampler_checkpoint
    if checkpoint is not None and str(checkpoint.checkpoint_id).endswith(CHECKPOINT):
        return Job(str(run.training_run_id), JobStatus.SUCCEEDED, model=str(checkpoint.tinker_path))
    reason = "its training loop ended with the process that ran it"
    return Job(str(run.training_run_id), JobStatus.FAILED, error=reason)
