"""The models that a job leaves beside its final one."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import StoreError
from ..providers.base import JobStatus
from .database import seal
from .jobs import JobRecords
from .rows import JobRow


class CheckpointRecords(JobRecords):
    """Which earlier models a job has, as far as the provider was asked.

    They are numbered from the end, as their scores are: 1 is the last one before the final model.
    """

    def trained_by(self, member: int) -> JobRow | None:
        """The job that made the member's model, be it deleted since; None where there is none."""
        done = [job for job in self.jobs(member) if job.status == JobStatus.SUCCEEDED and job.model]
        return done[-1] if done else None

    def checkpoints_found(self, key: str, models: Sequence[str | None]) -> None:
        """What a job left before its final model, ascending by step; empty where that is nothing."""
        with self._db.transaction():
            self._write_checkpoints(key, models)

    def checkpoint_gone(self, key: str, number: int, reason: str) -> None:
        """The provider no longer has this one."""
        with self._db.transaction():
            models = list(self.checkpoints(key) or ())
            if not 1 <= number <= len(models):
                raise StoreError(f"the job {key} has no checkpoint {number}")
            models[-number] = None
            self._write_checkpoints(key, models)
            self._log(f"checkpoint {number} of job {key}", "", "deleted", reason)

    def checkpoints(self, key: str) -> tuple[str | None, ...] | None:
        """Models of a job before its final one, ascending by step, None in place of one that is gone. None as a whole
        where the provider was not asked yet."""
        for models, expected in self._db.execute("SELECT models, seal FROM checkpoints WHERE key = ?", (key,)):
            self._db.check(expected, key, models)
            return tuple(json.loads(models))
        return None

    def models(self, member: int | None = None) -> list[str]:
        """Every model that the run's jobs made (or those of one member), earlier checkpoints included, be they deleted
        since."""
        found = [job.model for job in self.jobs(member)]
        for job in self.jobs(member):
            found += self.checkpoints(job.key) or ()
        return [model for model in found if model is not None]

    def wanted_checkpoints(self, member: int, models: int) -> tuple[int, ...] | None:
        """Numbers of the member's checkpoints that are scored where ``models`` of each job are asked for, final one
        included: those that there are. None where that is not known before the provider is asked."""
        if models == 1:
            return ()
        row = self.trained_by(member)
        found = None if row is None else self.checkpoints(row.key)
        if found is None:
            # Nobody can ask about a model that was cleaned up.
            return () if row is not None and row.model_deleted else None
        return tuple(n for n in range(1, min(models, len(found) + 1)) if found[-n] is not None)

    def _write_checkpoints(self, key: str, models: Sequence[str | None]) -> None:
        row = (key, json.dumps(list(models)))
        self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", (*row, seal(*row)))
