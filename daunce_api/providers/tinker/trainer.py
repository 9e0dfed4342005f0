"""Members trained on Tinker's wire: the loop runs here, its forward, backward and optimizer steps run there.

Subset, order, seed and the weight of every token are the run's own. Each example counts by its mean loss, as it is
measured. A loop ends with its process; the next process resumes it after the last epoch whose optimizer state was
saved, and trains a member without one again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import Field

from ..._util.files import replacing
from ...config import RunConfig
from ...data.dataset import Dataset
from ...data.tokenizers import EncodedExample, Tokenizer, encode_example
from ...errors import RejectedError, TransientError
from ..base import Closing, EchoField, Job, JobEcho, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..calls import gone_already
from ..identity import of_run
from ..options import Options
from ..registry import Context
from ..tokenizers import tokenizer_of
from .loops import (
    EPOCH,
    FINAL,
    HYPERPARAMETERS,
    INTERRUPTED,
    SCHEME,
    Loop,
    LoopRecord,
    LoopRecords,
    Recipe,
    is_sampler,
    listed_name,
    parts_of,
    path_of,
    state_path,
)
from .service import DAY, Service, is_tinker, name_of, open_service

ECHOES: frozenset[EchoField] = frozenset(("key", "file_id"))
MOST_CHECKPOINTS = 100
MOST_RESUMES = 3
"""Times that a process resumes one loop that fails, before the job counts as failed and is paid for from its start."""
KEY_FIELD, FILE_FIELD, SEQUENCE_FIELD = "daunce_key", "daunce_file", "daunce_seq"
"""In the metadata of a training run."""
FILES_FOLDER = "tinker"
"""Inside the run folder."""
NOTES = (
    "the training loop runs in this process: an interrupted one resumes after its last complete epoch",
    "an optimizer step takes at least one of the service's clock cycles, however small the batch",
)


class TinkerOptions(Options):
    """``backend.options`` of the Tinker trainer."""

    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = Field(True, description="some servers train attention and MLP alone, whatever is asked")
    models_persist: bool | None = Field(
        None,
        description="sampler weights outlive the session that made them; default: true at Tinker, false at other "
        "servers, where each member's training state is kept too and loaded again to be scored",
    )


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Any subset, seed and recipe; no network."""
    options = TinkerOptions.of(config)
    address = config.backend.base_url
    persist = is_tinker(address) if options.models_persist is None else options.models_persist
    notes = list(NOTES)
    if not persist:
        notes.append("this server may forget a model when its session ends: training states are kept and loaded again")
    return TrainerCapabilities(
        provider=name_of(address),
        max_concurrent_jobs=config.backend.max_concurrent_jobs or 4,
        hyperparameters=HYPERPARAMETERS,
        epochs=Recipe().n_epochs,
        echoes=ECHOES,
        checkpoints=MOST_CHECKPOINTS,
        models_persist=persist,
        models_expire=True,
        notes=tuple(notes),
    )


def open_trainer(context: Context) -> TinkerTrainer:
    """A trainer that keeps the members' files in the run folder."""
    return TinkerTrainer(open_service(context), context.config)


class TinkerTrainer(Closing):
    """``Trainer`` on Tinker's wire, ``Checkpointing``. Closing it stops the loops that still run."""

    def __init__(self, service: Service, config: RunConfig) -> None:
        self._service = service.enter()
        self.capabilities = trainer_capabilities(config)
        self._layers = TinkerOptions.of(config).model_dump(exclude={"models_persist"})
        self._config = config
        self._folder = config.run_dir / FILES_FOLDER
        self._records = LoopRecords(self._folder)
        self._loops: dict[str, asyncio.Task[str]] = {}
        self._resumes: Counter[str] = Counter()

    async def model_info(self, model: str) -> ModelInfo:
        """Raises RejectedError where the service does not train this model."""
        if model.startswith(SCHEME):
            return ModelInfo(model)
        known = [m for m in await self._service.models() if getattr(m, "trainable", None) is not False]
        names = sorted(str(m.model_name) for m in known if getattr(m, "model_name", None))
        if not names:
            raise RejectedError(
                f"the list of models of {self._service.name} cannot be read: it names none. Use the version of the "
                "package tinker that this server was made for."
            )
        if model not in names:
            raise RejectedError(f"{self._service.name} does not train {model!r}. It trains {', '.join(names)}.")
        return ModelInfo(model)

    async def upload(self, name: str, content: bytes) -> str:
        """Keep a training file in the run folder; returns its name."""
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
        metadata = {KEY_FIELD: request.key, FILE_FIELD: request.file_id}
        if request.sequence is not None:
            metadata[SEQUENCE_FIELD] = str(request.sequence)
        client = await self._service.client()
        doing = f"creating the training run of {request.key}"
        if request.model == self._config.backend.model:
            create = partial(
                client.create_lora_training_client,
                base_model=request.model,
                rank=recipe.rank,
                seed=request.seed,
                user_metadata=metadata,
                **self._layers,
            )
        else:
            create = partial(
                client.create_training_client_from_state, state_path(request.model), user_metadata=metadata
            )
        training = await self._service.start(create, doing=doing, submit=True)
        record = LoopRecord(
            key=request.key,
            model=request.model,
            file_id=request.file_id,
            seed=request.seed,
            hyperparameters=dict(request.hyperparameters),
            runs=[str(training.model_id)],
            tokens=recipe.n_epochs * sum(len(e.ids) for e in examples),
        )
        self._records.save(record)
        self._run(record, training, examples)
        return record.job(JobStatus.RUNNING)

    def _run(self, record: LoopRecord, training: Any = None, examples: list[EncodedExample] | None = None) -> None:
        """Start a loop, from the record's saved state where there is no training client."""
        ensemble = self._config.ensemble
        # Members start from the target's training state; its models from before the end are not scored.
        is_target = ensemble.start_from == "target" and record.model == self._config.backend.model

        async def run() -> str:
            # Not before: whoever cancels a loop that was interrupted needs neither its file nor the tokenizer.
            own = self._examples(record.file_id) if examples is None else examples
            loop = Loop(
                self._service,
                self._records,
                record,
                own,
                models=1 if is_target else ensemble.checkpoints,
                seconds=None if ensemble.keep_days is None else ensemble.keep_days * DAY,
                keeps_state=is_target or not self.capabilities.models_persist,
            )
            if training is None:  # what was sent after the saved state is trained again, at most an epoch
                record.tokens += sum(len(e.ids) for e in own)
            return await loop.train(await self._resumed(record) if training is None else training)

        self._loops[record.job_id] = asyncio.create_task(run())

    async def _resumed(self, record: LoopRecord) -> Any:
        """A training client at the record's saved state, with its optimizer."""
        client = await self._service.client()
        create = partial(
            client.create_training_client_from_state_with_optimizer,
            record.state,
            user_metadata={KEY_FIELD: record.key, FILE_FIELD: record.file_id},
        )
        training = await self._service.start(create, doing=f"resuming {record.key} after epoch {record.epoch}")
        record.runs.append(str(training.model_id))
        self._records.save(record)
        return training

    async def find_job(self, key: str) -> Job | None:
        """The job with this key: one whose loop this run folder knows, or a training run that carries the key in its
        metadata; of two of those, one that is finished."""
        for record in self._records.all():
            if record.key == key:
                return await self.get(record.job_id)
        jobs = [ended(run) for run in await self._service.training_runs(f"looking up {key}") if key_of(run) == key]
        return next((job for job in jobs if job.status is JobStatus.SUCCEEDED), jobs[-1] if jobs else None)

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job of a run: those whose loops this run folder knows, and other training runs that carry one of its
        keys. A run without a checkpoint beside another of the same key comes from a request that the SDK repeated."""
        records = [record for record in self._records.all() if of_run(record.key, run_key)]
        alive = {job_id for job_id, task in self._loops.items() if not task.done()}
        jobs = [record.job(JobStatus.RUNNING) if record.job_id in alive else record.left() for record in records]
        keys = {record.key for record in records}
        ours = {run for record in records for run in record.runs}
        runs: list[Any] = []
        with gone_already():  # a server without such a list
            runs = await self._service.training_runs("listing this run's jobs")
        for run in runs:
            key = key_of(run)
            if key is None or not of_run(key, run_key) or str(run.training_run_id) in ours:
                continue
            if key not in keys or run.last_checkpoint is not None or run.last_sampler_checkpoint is not None:
                jobs.append(ended(run))
            keys.add(key)
        return jobs

    async def get(self, job_id: str) -> Job:
        """The job's state. A loop that an earlier process left after a whole epoch is resumed from there, and so is one
        that failed, up to ``MOST_RESUMES`` times."""
        record, task = self._records.load(job_id), self._loops.get(job_id)
        if record is None:
            rest = await self._service.rest()
            return ended(
                await self._service.start(lambda: rest.get_training_run(job_id), doing=f"reading run {job_id}")
            )
        if record.final is not None or record.cancelled or (task is None and record.state is None):
            return record.left()
        if task is None:
            self._run(record)
        if task is None or not task.done():
            return record.job(JobStatus.RUNNING)
        error = task.exception()
        if error is not None and not isinstance(error, TransientError | RejectedError):
            raise error
        if record.state is None or self._resumes[job_id] == MOST_RESUMES:
            return record.job(JobStatus.FAILED, error=str(error), trained_tokens=record.tokens)
        self._resumes[job_id] += 1
        self._run(record)
        return record.job(JobStatus.RUNNING)

    async def checkpoints(self, job_id: str) -> list[str]:
        """Paths of the sampler's weights after the epochs before the last, in order."""
        record = self._records.load(job_id)
        if record is not None:
            return [record.epochs[epoch] for epoch in sorted(record.epochs, key=int)]
        return [
            path_of(job_id, "sampler_weights", name)
            for name in sorted(listed_name(c) for c in await self._listed(job_id) if is_sampler(c))
            if name.startswith(EPOCH)
        ]

    async def _listed(self, run: str) -> list[Any]:
        rest = await self._service.rest()
        answer = await self._service.start(lambda: rest.list_checkpoints(run), doing=f"listing models of {run}")
        return list(answer.checkpoints)

    async def cancel(self, job_id: str) -> Job:
        """Stop the loop; what was trained so far stays at the service for some days, or until `daunce clean`."""
        task = self._loops.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        record = self._records.load(job_id)
        if record is not None and record.final is None:
            record.cancelled = True
            self._records.save(record)
        return await self.get(job_id)

    async def delete_file(self, file_id: str) -> bool:
        self._path(file_id).unlink(missing_ok=True)
        return True

    async def delete_model(self, model: str) -> bool:
        """Deletes the weights at this path; with a member's final ones, everything that its loop saved."""
        try:
            run, name = parts_of(model)
        except RejectedError:
            return False
        paths = [path_of(run, "sampler_weights", name)]
        if name == FINAL:
            known = next((r for r in self._records.all() if run in r.runs), None)
            for each in known.runs if known is not None else [run]:
                with gone_already():
                    for c in await self._listed(each):
                        kept = path_of(each, "sampler_weights" if is_sampler(c) else "weights", listed_name(c))
                        if not listed_name(c).startswith(EPOCH) and kept not in paths:
                            paths.append(kept)
        rest, service = await self._service.rest(), self._service
        gone = []
        for path in paths:
            doing = f"deleting {path}"
            call = service.start(partial(rest.delete_checkpoint_from_tinker_path, path), doing=doing)
            gone.append(await service.calls.delete(call, doing=doing))
        return all(gone)

    def _path(self, name: str) -> Path:
        return self._folder / Path(name).name

    def _examples(self, file_id: str) -> list[EncodedExample]:
        # Turns without loss carry weight 0 in the file, so that "all" is what is measured.
        dataset = Dataset.from_jsonl(self._path(file_id))
        return [encode_example(example, self._tokenizer, "all") for example in dataset]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_of(self._config)

    async def close(self) -> None:
        for task in self._loops.values():
            task.cancel()
        await asyncio.gather(*self._loops.values(), return_exceptions=True)
        await self._service.leave()


def ended(run: Any) -> Job:
    """The job of a training run that neither a loop of this process nor a record knows."""
    run_id, checkpoint = str(run.training_run_id), run.last_sampler_checkpoint
    echo = JobEcho(key=key_of(run), file_id=(run.user_metadata or {}).get(FILE_FIELD))
    if checkpoint is not None and listed_name(checkpoint) == FINAL:
        return Job(run_id, JobStatus.SUCCEEDED, model=path_of(run_id, "sampler_weights", FINAL), echo=echo)
    return Job(run_id, JobStatus.FAILED, error=INTERRUPTED, echo=echo)


def key_of(run: Any) -> str | None:
    """The key that a training run carries in its metadata."""
    key: str | None = (run.user_metadata or {}).get(KEY_FIELD)
    return key
