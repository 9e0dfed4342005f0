"""Training files at the provider: each distinct one is uploaded once, however many members share it."""

from __future__ import annotations

import asyncio
import hashlib

from ..errors import TransientError
from ..providers.base import Trainer
from ..store import INTENT, RunStore
from .events import Event, EventKind
from .patient import Patient

FILE_LOOK_SECONDS = 60.0
"""Longest search for an upload without an answer: unlike a second job, a second copy of a file costs nothing."""


class TrainingFiles:
    """One run's training files; ``lag`` seconds until the provider lists what it has taken."""

    def __init__(self, patient: Patient, trainer: Trainer, store: RunStore, lag: float) -> None:
        self._patient = patient
        self._trainer = trainer
        self._store = store
        self._lag = min(lag, FILE_LOOK_SECONDS)
        self._uploads: dict[str, asyncio.Lock] = {}

    async def id_of(self, content: bytes, *, verify: bool = False) -> str:
        """Id of the uploaded file with this content; it is uploaded where there is none.

        ``verify`` asks the provider whether a file that was uploaded before is still there.
        """
        jobs, (sha256, name) = self._store.jobs, self._named(content)
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
                    return await self._trainer.upload(name, content)
                except TransientError as error:
                    look = error.status != 429  # anything else may have been acted on
                    raise

            file_id = await self._patient.repeat(upload, f"upload {name}")
            jobs.file_uploaded(sha256, file_id)
            self._patient.emit(Event(EventKind.UPLOADED, f"{name} ({len(content):,} bytes) is {file_id}"))
            return file_id

    async def find(self, name: str, size: int) -> str | None:
        """Id of an uploaded file of this name and size, looked for until the provider must list it."""
        return await self._patient.search(lambda: self._trainer.find_file(name, size), f"look for {name}", self._lag)

    async def take_over(self, content: bytes, file_id: str) -> bool:
        """Record an uploaded file that the store does not know; False where it is not the one with this content."""
        sha256, name = self._named(content)
        if await self.find(name, len(content)) != file_id:
            return False
        self._store.jobs.file_intent(sha256, name, len(content))
        self._store.jobs.file_uploaded(sha256, file_id)
        return True

    async def delete(self, file_id: str) -> bool:
        """True where the file is gone now."""
        return await self._patient.repeat(lambda: self._trainer.delete_file(file_id), f"delete {file_id}")

    def _named(self, content: bytes) -> tuple[str, str]:
        sha256 = hashlib.sha256(content).hexdigest()
        return sha256, f"daunce-{self._store.run_key}-{sha256[:12]}.jsonl"
