"""The training loop of one member: its recipe, the checkpoints that it saves, and the record in the run folder from
which a later process resumes it.

Checkpoint paths are written in the one form that every service accepts, ``tinker://RUN/KIND/NAME``. Servers differ in
what they return: the path of a saved sampler may lack ``sampler_weights/``, and the id of a listed checkpoint too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass as checked

from ..._util.files import replacing
from ...data.tokenizers import EncodedExample
from ...errors import RejectedError, StoreError
from ..base import Job, JobEcho, JobStatus
from .service import DAY, Service

IN_FLIGHT = 2
"""Optimizer steps that are sent before the first of them is awaited, so that the service never waits for us."""
STATE_SECONDS = 7 * DAY
"""How long the optimizer's state after an epoch is kept: it is for resuming a loop that was interrupted."""
INTERRUPTED = "its training loop ended with the process that ran it"
Kind = Literal["weights", "sampler_weights"]
SCHEME = "tinker://"
FINAL, EPOCH, STATE, AGAIN = "daunce-final", "daunce-epoch-", "daunce-state-", "daunce-again"
"""Names of checkpoints: a member's final weights, its models and optimizer states by epoch, and weights that were
reloaded to be scored."""


def path_of(run: str, kind: Kind, name: str) -> str:
    """The path of a checkpoint of a training run."""
    return f"{SCHEME}{run}/{kind}/{name}"


def parts_of(path: str) -> tuple[str, str]:
    """Training run and name in a path of either form. Raises RejectedError for anything else."""
    run, _, rest = path.removeprefix(SCHEME).partition("/")
    name = rest.rsplit("/", 1)[-1]
    if not path.startswith(SCHEME) or not run or not name:
        raise RejectedError(f"model {path!r} is no path of a checkpoint (tinker://RUN/sampler_weights/NAME)")
    return run, name


def state_path(path: str) -> str:
    """The path of the training state that was saved beside a sampler's weights, final ones or an epoch's."""
    run, name = parts_of(path)
    return path_of(run, "weights", name.replace(EPOCH, STATE, 1) if name.startswith(EPOCH) else name)


def epoch_name(prefix: str, epoch: int) -> str:
    """Name of a checkpoint after an epoch, counted from 1 and zero-padded so that names sort as epochs do."""
    return f"{prefix}{epoch:04}"


def is_sampler(checkpoint: Any) -> bool:
    """Whether a listed checkpoint is a sampler's weights."""
    kind = getattr(checkpoint, "checkpoint_type", None)
    return str(kind) == "sampler" if kind is not None else str(checkpoint.checkpoint_id).startswith("sampler_weights/")


def listed_name(checkpoint: Any) -> str:
    """The name of a listed checkpoint."""
    return str(checkpoint.checkpoint_id).rsplit("/", 1)[-1]


@checked(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Recipe:
    """Hyperparameters of a member's training: AdamW, the learning rate falling linearly to 0."""

    n_epochs: PositiveInt = 3
    batch_size: PositiveInt = 8
    learning_rate: NonNegativeFloat = 1e-4
    rank: PositiveInt = 32
    weight_decay: NonNegativeFloat = 0.0
    grad_clip_norm: NonNegativeFloat = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Recipe:
        """Raises RejectedError for unknown names and unusable values."""
        try:
            return cls(**given)
        except ValidationError as error:
            wrong = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
            raise RejectedError(f"hyperparameters cannot be used: {wrong}.") from error


HYPERPARAMETERS = frozenset(Recipe.__dataclass_fields__)


def batches_of(n_examples: int, recipe: Recipe, seed: int) -> list[list[int]]:
    """Example indices of every optimizer step: a fresh order each epoch, from the seed; the last batch may be short."""
    random = np.random.default_rng(np.random.SeedSequence(seed))
    batches = []
    for _ in range(recipe.n_epochs):
        order = random.permutation(n_examples).tolist()
        batches += [order[i : i + recipe.batch_size] for i in range(0, n_examples, recipe.batch_size)]
    return batches


def datum(tinker: Any, example: EncodedExample, share: float) -> Any:
    """An example for Tinker's ``cross_entropy``, which sums weight x negative log-likelihood (nats): the weights make
    it ``share`` times the mean over the example's targets."""
    weights = np.zeros(len(example.ids) - 1, dtype=np.float32)
    weights[[t - 1 for t in example.targets]] = share / len(example.targets)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(example.ids[:-1])),
        loss_fn_inputs={"target_tokens": np.asarray(example.ids[1:], dtype=np.int64), "weights": weights},
    )


class LoopRecord(BaseModel):
    """State of a member's loop. ``runs`` are its training runs at the service, the current one last (loading a state
    creates a new run). ``epochs`` are the models before the final one, by epoch; ``state`` is the latest optimizer
    state."""

    model_config = ConfigDict(extra="forbid")

    key: str
    model: str
    file_id: str
    seed: int
    hyperparameters: dict[str, Any]
    runs: list[str]
    epoch: int = 0
    state: str | None = None
    epochs: dict[str, str] = {}
    final: str | None = None
    tokens: int = 0
    cancelled: bool = False

    @property
    def run(self) -> str:
        return self.runs[-1]

    @property
    def job_id(self) -> str:
        """The first training run's id stands for the job."""
        return self.runs[0]

    def job(self, status: JobStatus, **more: Any) -> Job:
        """The job in this state."""
        return Job(self.job_id, status, echo=JobEcho(key=self.key, file_id=self.file_id), **more)

    def left(self) -> Job:
        """The job while no loop of this process is running it."""
        if self.final is not None:
            return self.job(JobStatus.SUCCEEDED, model=self.final, trained_tokens=self.tokens)
        if self.cancelled:
            return self.job(JobStatus.CANCELLED)
        return self.job(JobStatus.FAILED, error=f"{INTERRUPTED}, before its first epoch was saved")


class LoopRecords:
    """The records of a run's loops, one file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, record: LoopRecord) -> None:
        with replacing(self._path(record.job_id)) as part:
            part.write_text(record.model_dump_json(), encoding="utf-8")

    def load(self, job_id: str) -> LoopRecord | None:
        """Raises StoreError where the record is damaged."""
        path = self._path(job_id)
        try:
            return LoopRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StoreError(f"{path} cannot be read or is damaged. Delete it to train that member again.") from error

    def all(self) -> list[LoopRecord]:
        loaded = [self.load(path.name.removesuffix(".loop.json")) for path in sorted(self._folder.glob("*.loop.json"))]
        return [record for record in loaded if record is not None]

    def _path(self, job_id: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in job_id)
        return self._folder / f"{safe}.loop.json"


@dataclass(frozen=True, slots=True)
class Loop:
    """The steps of one member at a training client.

    ``models`` of it are scored and saved for ``seconds`` (None: until they are deleted); ``keeps_state``: their
    training states are too.
    """

    service: Service
    records: LoopRecords
    record: LoopRecord
    examples: list[EncodedExample]
    models: int
    seconds: int | None
    keeps_state: bool

    async def train(self, training: Any) -> str:
        """Train from the record's epoch to the end; returns the path of the sampler's weights."""
        import tinker

        record, recipe, service = self.record, Recipe.of(self.record.hyperparameters), self.service
        batches = batches_of(len(self.examples), recipe, record.seed)
        per_epoch = len(batches) // recipe.n_epochs
        begin = record.epoch * per_epoch
        in_flight: deque[tuple[int, Any, Any]] = deque()

        async def settle() -> None:
            step, gradients, update = in_flight.popleft()
            for sent in (gradients, update):
                await service.result(sent, doing=f"step {step + 1} of {record.key}")

        for step, batch in enumerate(batches[begin:], start=begin):
            data = [datum(tinker, self.examples[i], 1.0 / len(batch)) for i in batch]
            params = tinker.AdamParams(
                learning_rate=recipe.learning_rate * (1.0 - step / len(batches)),
                weight_decay=recipe.weight_decay,
                grad_clip_norm=recipe.grad_clip_norm,
            )
            in_flight.append((step, training.forward_backward(data, "cross_entropy"), training.optim_step(params)))
            epoch, rest = divmod(step + 1, per_epoch)
            while len(in_flight) >= (1 if rest == 0 else IN_FLIGHT):
                await settle()
            if rest == 0 and epoch < recipe.n_epochs:
                await self._save_epoch(training, epoch, recipe)
        if self.keeps_state:
            await self._saved(training.save_state, FINAL, self.seconds)
        await self._saved(training.save_weights_for_sampler, FINAL, self.seconds)
        record.final = path_of(record.run, "sampler_weights", FINAL)
        self.records.save(record)
        return record.final

    async def _save_epoch(self, training: Any, epoch: int, recipe: Recipe) -> None:
        record, is_model = self.record, epoch > recipe.n_epochs - self.models
        if is_model:
            name = epoch_name(EPOCH, epoch)
            await self._saved(training.save_weights_for_sampler, name, self.seconds)
            record.epochs[str(epoch)] = path_of(record.run, "sampler_weights", name)
        name = epoch_name(STATE, epoch)
        # Where models are forgotten, one of an epoch is loaded from this state for as long as it is kept.
        await self._saved(training.save_state, name, self.seconds if is_model and self.keeps_state else STATE_SECONDS)
        record.epoch, record.state = epoch, path_of(record.run, "weights", name)
        self.records.save(record)

    async def _saved(self, save: Callable[..., Any], name: str, seconds: int | None) -> None:
        kept = {} if seconds is None else {"ttl_seconds": seconds}
        await self.service.start(lambda: save(name, **kept), doing=f"saving {self.record.key}")
