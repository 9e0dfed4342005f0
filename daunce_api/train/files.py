"""What each member's job is submitted with: its training file, uploaded once however many share it, and its request."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from ..config import RunConfig
from ..data.dataset import Dataset
from ..data.subsets import Ensemble
from ..errors import TransientError
from ..providers.base import JobRequest, Trainer
from ..store import INTENT, TARGET, RunStore
from .events import Event, EventKind
from .patient import Patient

FILE_LOOK_SECONDS = 60.0
"""Longest search for an upload without an answer: unlike a second job, a second copy of a file costs nothing."""


@dataclass(frozen=True)
class TrainingFiles:
    """One run's training files; ``lag`` seconds until the provider lists what it has taken."""

    patient: Patient
    trainer: Trainer
    store: RunStore
    lag: float
    _uploads: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def id_of(self, content: bytes, *, verify: bool = False) -> str:
        """Id of the uploaded file with this content; it is uploaded where there is none.

        ``verify`` asks the provider whether a file that was uploaded before is still there.
        """
        jobs, (sha256, name) = self.store.jobs, self._named(content)
        async with self._uploads.setdefault(sha256, asyncio.Lock()):
            row = jobs.file(sha256)
            if row is not None and row.state == "uploaded" and row.file_id is not None:
                if not verify or await self.find(name, len(content)) is not None:
                    return row.file_id
                jobs.file_deleted(sha256)
            # An intent without an answer: an upload was under way when the run ended, and may have arrived.
            look = row is not None and row.state == INTENT
            jobs.file_intent(sha256, name, len(content))

            async def upload() -> str:
                nonlocal look
                found = await self.find(name, len(content)) if look else None
                if found is not None:
                    return found
                look = False
                try:
                    return await self.trainer.upload(name, content)
                except TransientError as error:
                    look = error.status != 429  # anything else may have been acted on
                    raise

            file_id = await self.patient.repeat(upload, f"upload {name}")
            jobs.file_uploaded(sha256, file_id)
            self.patient.emit(Event(EventKind.UPLOADED, f"{name} ({len(content):,} bytes) is {file_id}"))
            return file_id

    async def find(self, name: str, size: int) -> str | None:
        """Id of an uploaded file of this name and size, looked for until the provider must list it."""
        return await self.patient.search(
            lambda: self.trainer.find_file(name, size), f"look for {name}", min(self.lag, FILE_LOOK_SECONDS)
        )

    async def take_over(self, content: bytes, file_id: str) -> bool:
        """Record an uploaded file that the store does not know; False where it is not the one with this content."""
        sha256, name = self._named(content)
        if await self.find(name, len(content)) != file_id:
            return False
        self.store.jobs.file_intent(sha256, name, len(content))
        self.store.jobs.file_uploaded(sha256, file_id)
        return True

    async def delete(self, file_id: str) -> bool:
        """True where the file is gone now."""
        return await self.patient.repeat(lambda: self.trainer.delete_file(file_id), f"delete {file_id}")

    def _named(self, content: bytes) -> tuple[str, str]:
        sha256 = hashlib.sha256(content).hexdigest()
        return sha256, f"daunce-{self.store.run_key}-{sha256[:12]}.jsonl"


SUFFIX_CHARACTERS = 43
"""What a suffix of 64 characters leaves beside a mark of the key; the run key must not be cut off."""


@dataclass(frozen=True, eq=False)
class Recipes:
    """Training files and requests of a run's members and its target model (-1).

    ``protocol``: older recordings hold suffixes that were not shortened.
    """

    files: TrainingFiles
    ensemble: Ensemble
    dataset: Dataset
    config: RunConfig
    run_key: str
    protocol: int

    def _content(self, member: int) -> bytes:
        """The training file of a member: its subset; of the target: everything."""
        positions = range(len(self.dataset)) if member == TARGET else self.ensemble.subset(member).tolist()
        return self.dataset.training_file(positions, self.config.data.loss_on)

    @cached_property
    def _validation(self) -> bytes | None:
        """The validation file as the provider gets it; no member is trained on it, and it is never attributed."""
        data = self.config.data
        if data.validation is None:
            return None
        examples = Dataset.from_file(data.validation, data.columns)
        return examples.training_file(range(len(examples)), data.loss_on)

    async def file_id(self, member: int, *, verify: bool = False) -> str:
        """Id of a member's uploaded training file; see :meth:`TrainingFiles.id_of`."""
        return await self.files.id_of(self._content(member), verify=verify)

    async def is_of(self, member: int, file_id: str) -> bool:
        """Whether a file at the provider is the member's training file; then it is recorded as uploaded."""
        return await self.files.take_over(self._content(member), file_id)

    async def uploaded(self, member: int, base: str, key: str) -> JobRequest:
        """The request for a member's job, once the provider has its files."""
        file_id = await self.file_id(member)
        validation = None if self._validation is None else await self.files.id_of(self._validation)
        return self.request(member, base, key, file_id, validation)

    def request(self, member: int, base: str, key: str, file_id: str, validation: str | None = None) -> JobRequest:
        """The request for a member's job, with ids of its files."""
        training = self.config.training
        hyperparameters = training.of_target if member == TARGET else training.hyperparameters
        named = f"{self.run_key}-{'target' if member == TARGET else f'm{member}'}"
        room = SUFFIX_CHARACTERS - len(named) - 1 if self.protocol >= 2 else None
        return JobRequest(
            key=key,
            model=base,
            file_id=file_id,
            seed=self.ensemble.target_seed if member == TARGET else int(self.ensemble.seeds_K[member]),
            hyperparameters=dict(hyperparameters),
            suffix=f"{self.config.name[:room]}-{named}",
            validation_file_id=validation,
        )
