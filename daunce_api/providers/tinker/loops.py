"""The training loop of one member, and the record in the run folder from which a later process takes it up again."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..._util.files import replacing
from ...data.tokenizers import EncodedExample
from ...errors import StoreError
from ..base import JobEcho
from .paths import EPOCH, FINAL, STATE, epoch_name, path_of
from .recipe import Recipe, batches_of, datum
from .service import Service

IN_FLIGHT = 2
"""Optimiser steps that are sent before the first of them is awaited, so that the service never waits for us."""
STATE_DAYS = 7
"""Days that the optimiser's state after an epoch is kept: it is for taking up a loop that was interrupted."""
DAY = 86_400


@dataclass
class LoopRecord:
    """What is known of a member's loop. ``runs`` are its training runs at the service, the present one last: loading a
    state makes a new one. ``epochs`` are models before the end, by epoch; ``state`` is the latest optimiser state."""

    key: str
    model: str
    file_id: str
    seed: int
    hyperparameters: dict[str, Any]
    runs: list[str]
    epoch: int = 0
    state: str | None = None
    epochs: dict[str, str] = field(default_factory=dict)
    final: str | None = None
    tokens: int = 0
    cancelled: bool = False

    @property
    def run(self) -> str:
        return self.runs[-1]

    @property
    def echo(self) -> JobEcho:
        return JobEcho(key=self.key, file_id=self.file_id)

    @property
    def job_id(self) -> str:
        """The first training run's id stands for the job."""
        return self.runs[0]


class LoopRecords:
    """The records of a run's loops, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, record: LoopRecord) -> None:
        with replacing(self._path(record.job_id)) as part:
            part.write_text(json.dumps(asdict(record)), encoding="utf-8")

    def load(self, job_id: str) -> LoopRecord | None:
        """Raises StoreError where the record is damaged."""
        path = self._path(job_id)
        try:
            return LoopRecord(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}). Delete it to train that member again.") from error

    def all(self) -> list[LoopRecord]:
        loaded = [self.load(path.name.removesuffix(".loop.json")) for path in sorted(self._folder.glob("*.loop.json"))]
        return [record for record in loaded if record is not None]

    def _path(self, job_id: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in job_id)
        return self._folder / f"{safe}.loop.json"


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a member's loop saves: ``models`` of it that are scored, their seconds at the service (None: until they are
    deleted), and whether the final training state is kept too."""

    models: int = 1
    seconds: int | None = None
    state: bool = False


class Loop:
    """The steps of one member at a training client."""

    def __init__(
        self,
        service: Service,
        record: LoopRecord,
        keeping: Keeping,
        save: Callable[[LoopRecord], None],
        examples: list[EncodedExample],
    ) -> None:
        self._service = service
        self._record = record
        self._keeping = keeping
        self._save = save
        self._examples = examples
        self._recipe = Recipe.of(record.hyperparameters)
        self._batches = batches_of(len(examples), self._recipe, record.seed)
        self.step = 0

    @property
    def progress(self) -> float:
        return self.step / len(self._batches)

    async def train(self, training: Any) -> str:
        """Run from the record's epoch to the end: the path of the sampler's weights."""
        import tinker

        record, recipe, service = self._record, self._recipe, self._service
        per_epoch = len(self._batches) // recipe.n_epochs
        begin = record.epoch * per_epoch
        in_flight: deque[tuple[int, Any, Any]] = deque()

        async def settle() -> None:
            step, gradients, update = in_flight.popleft()
            await service.result(gradients, doing=f"step {step + 1} of {record.key}")
            await service.result(update, doing=f"step {step + 1} of {record.key}")
            self.step = step + 1

        for step, batch in enumerate(self._batches[begin:], start=begin):
            data = [datum(tinker, self._examples[i], 1.0 / len(batch)) for i in batch]
            params = tinker.AdamParams(
                learning_rate=recipe.learning_rate * (1.0 - step / len(self._batches)),
                weight_decay=recipe.weight_decay,
                grad_clip_norm=recipe.grad_clip_norm,
            )
            in_flight.append((step, training.forward_backward(data, "cross_entropy"), training.optim_step(params)))
            epoch, rest = divmod(step + 1, per_epoch)
            while len(in_flight) >= (1 if rest == 0 else IN_FLIGHT):
                await settle()
            if rest == 0 and epoch < recipe.n_epochs:
                await self._save_epoch(training, epoch)
        keeping = self._keeping
        if keeping.state:
            await self._saved(training.save_state, FINAL, keeping.seconds)
        await self._saved(training.save_weights_for_sampler, FINAL, keeping.seconds)
        record.final = path_of(record.run, "sampler_weights", FINAL)
        self._save(record)
        return record.final

    async def _save_epoch(self, training: Any, epoch: int) -> None:
        record, keeping = self._record, self._keeping
        is_model, state_seconds = epoch > self._recipe.n_epochs - keeping.models, STATE_DAYS * DAY
        if is_model:
            name = epoch_name(EPOCH, epoch)
            await self._saved(training.save_weights_for_sampler, name, keeping.seconds)
            record.epochs[str(epoch)] = path_of(record.run, "sampler_weights", name)
        name = epoch_name(STATE, epoch)
        # Where models are forgotten, one of an epoch is loaded from this state for as long as it is kept.
        await self._saved(training.save_state, name, keeping.seconds if is_model and keeping.state else state_seconds)
        record.epoch, record.state = epoch, path_of(record.run, "weights", name)
        self._save(record)

    async def _saved(self, save: Callable[..., Any], name: str, seconds: int | None) -> None:
        kept = {} if seconds is None else {"ttl_seconds": seconds}
        await self._service.start(lambda: save(name, **kept), doing=f"saving {self._record.key}")
