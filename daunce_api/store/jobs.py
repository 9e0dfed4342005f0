"""``store.jobs``: files, jobs, their checkpoints, and which members were given up; ``store.hosted``: what stands on a
scoring server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from ..errors import StoreError
from ..providers.base import JobStatus
from .part import Part
from .rows import FINAL, INTENT, FileRow, JobRow, name_of


class Jobs(Part):
    """What the run has at the provider: intents before the request leaves, answers after they arrive."""

    # -- files ----------------------------------------------------------------------------------------------------

    def file_intent(self, sha256: str, name: str, size: int) -> None:
        """Write this before an upload is sent; ``size`` in bytes. A file that is known already stays."""
        row = self.file(sha256)
        if row is None or row.state == "deleted":
            self._write_file(FileRow(sha256, name, size, INTENT, None))

    def file_uploaded(self, sha256: str, file_id: str) -> None:
        """The provider's id of a file, after it answered."""
        self._write_file(replace(self._file(sha256), state="uploaded", file_id=file_id))

    def file_deleted(self, sha256: str) -> None:
        """The provider no longer has the file."""
        self._write_file(replace(self._file(sha256), state="deleted"))

    def files(self) -> list[FileRow]:
        """All files, in the order of their hashes."""
        return [FileRow(*row) for row in self._db.rows("files", "ORDER BY sha256")]

    def file(self, sha256: str) -> FileRow | None:
        """The file with this content, if an upload of it was ever intended."""
        for row in self._db.rows("files", "WHERE sha256 = ?", sha256):
            return FileRow(*row)
        return None

    def _file(self, sha256: str) -> FileRow:
        row = self.file(sha256)
        if row is None:
            raise StoreError(f"no intent was recorded for the file {sha256[:12]}")
        return row

    def _write_file(self, row: FileRow) -> None:
        with self._db.transaction():
            old = self.file(row.sha256)
            self._db.put("files", astuple(row))
            self._log(f"file {row.name}", old.state if old else "", row.state, row.file_id or "")
        self._db.checkpoint()

    # -- jobs -----------------------------------------------------------------------------------------------------

    def intent(self, key: str, member: int, attempt: int, request_json: str) -> None:
        """Write this before a job is submitted. A member that was left out is being tried again: that is taken back.

        Raises StoreError where this attempt exists already.
        """
        with self._db.transaction():
            if self._jobs("WHERE key = ? OR (member = ? AND attempt = ?)", key, member, attempt):
                raise StoreError(f"attempt {attempt} of member {member} exists already; it is not submitted again")
            self._write_job(JobRow(key, member, attempt, request_json, INTENT), "")
        self._db.checkpoint()

    def submitted(self, key: str, job_id: str) -> None:
        """The provider's id of a job, after it answered (or after the job was found again)."""
        self._change_job(key, job_id, status=JobStatus.QUEUED.value, job_id=job_id)

    def state(
        self,
        key: str,
        status: JobStatus,
        model: str | None = None,
        error: str | None = None,
        trained_tokens: int | None = None,
    ) -> None:
        """What the provider says of a job. Written only where something changed; None keeps what is known.

        A member with a model is not left out any more.
        """
        known: dict[str, Any] = {"model": model} if model else {}
        if trained_tokens is not None:
            known["trained_tokens"] = trained_tokens
        self._change_job(key, error or model or "", status=status.value, error=error, **known)

    def model_deleted(self, key: str) -> None:
        """The provider no longer has the model of this job."""
        self._change_job(key, "model deleted", model_deleted=True)

    def rows(self, member: int | None = None) -> list[JobRow]:
        """All jobs, or one member's, by member and attempt."""
        if member is None:
            return self._jobs("ORDER BY member, attempt")
        return self._jobs("WHERE member = ? ORDER BY attempt", member)

    def ready_models(self) -> dict[int, str]:
        """Model of each member that has one (-1: the target model); those deleted since are left out."""
        return {
            j.member: j.model
            for j in self.rows()
            if j.status == JobStatus.SUCCEEDED and j.model and not j.model_deleted
        }

    def trained_by(self, member: int) -> JobRow | None:
        """The job that made the member's model, deleted since or not; None where there is none."""
        done = [job for job in self.rows(member) if job.status == JobStatus.SUCCEEDED and job.model]
        return done[-1] if done else None

    def _jobs(self, clause: str, *values: Any) -> list[JobRow]:
        rows = self._db.rows("jobs", clause, *values)
        fields: list[tuple[Any, ...]] = [(*row[:9], bool(row[9]), *row[10:]) for row in rows]
        return [JobRow(*f) for f in fields]

    def _job(self, key: str) -> JobRow:
        for row in self._jobs("WHERE key = ?", key):
            return row
        raise StoreError(f"no intent was recorded for the job {key}")

    def _change_job(self, key: str, detail: str, **changes: Any) -> None:
        with self._db.lock:
            old = self._job(key)
            new = replace(old, **changes)
            if new == old:
                return
            self._write_job(new, old.status, detail)
        self._db.checkpoint()

    def _write_job(self, row: JobRow, before: str, detail: str = "") -> None:
        with self._db.transaction():
            if row.submitted_at is None and row.status != INTENT:
                row = replace(row, submitted_at=self._now())
            if row.ended_at is None and row.status in FINAL:
                row = replace(row, ended_at=self._now())
                self._result()
            values = astuple(row)
            self._db.put("jobs", (*values[:9], int(row.model_deleted), *values[10:]))
            self._log(f"job {row.key}", before, row.status, detail)
            if row.status != before and row.status in (INTENT, JobStatus.SUCCEEDED):
                self.take_back(row.member)

    # -- members that were given up -------------------------------------------------------------------------------

    def leave_out(self, member: int, reason: str) -> None:
        """The run gives a member up. It holds until a new attempt is made or the member has a model."""
        with self._db.transaction():
            self._db.put("left_out", (member, reason, self._now(), None))
            self._log(f"left out {name_of(member)}", "", "note", reason)

    def take_back(self, member: int) -> None:
        """The member is not left out any more; nothing happens where it was not."""
        with self._db.transaction():
            rows = self._db.rows("left_out", "WHERE member = ? AND taken_back_at IS NULL", member)
            self._db.put("left_out", *[(*row[:-1], self._now()) for row in rows])

    def left_out(self) -> dict[int, str]:
        """Members that are left out now, and why."""
        rows = self._db.rows("left_out", "WHERE taken_back_at IS NULL ORDER BY member")
        return {member: reason for member, reason, *_ in rows}

    # -- checkpoints: the models that a job leaves beside its final one, numbered from the end as their scores are -----

    def checkpoints_found(self, key: str, models: Sequence[str | None]) -> None:
        """What a job left before its final model, ascending by step; empty where that is nothing."""
        with self._db.transaction():
            self._db.put("checkpoints", (key, json.dumps(list(models))))

    def checkpoint_gone(self, key: str, number: int, reason: str) -> None:
        """The provider no longer has this one."""
        with self._db.transaction():
            models = list(self.checkpoints(key) or ())
            if not 1 <= number <= len(models):
                raise StoreError(f"the job {key} has no checkpoint {number}")
            models[-number] = None
            self.checkpoints_found(key, models)
            self._log(f"checkpoint {number} of job {key}", "", "deleted", reason)

    def checkpoints(self, key: str) -> tuple[str | None, ...] | None:
        """Models of a job before its final one, ascending by step, None in place of one that is gone. None as a whole
        where the provider was not asked yet."""
        for _, models in self._db.rows("checkpoints", "WHERE key = ?", key):
            return tuple(json.loads(models))
        return None

    def models(self) -> list[str]:
        """Every model that the run's jobs made, earlier checkpoints included, deleted since or not."""
        found = [(job.model, *(self.checkpoints(job.key) or ())) for job in self.rows()]
        return [model for models in found for model in models if model is not None]

    def earlier_models(self, member: int, models: int) -> dict[int, str] | None:
        """The member's checkpoints that are scored where ``models`` of each job are, final one included, by their
        numbers: those that exist. None where that is not known before the provider is asked."""
        if models == 1:
            return {}
        row = self.trained_by(member)
        found = None if row is None else self.checkpoints(row.key)
        if found is None:
            # Nobody can ask about a model that was cleaned up.
            return {} if row is not None and row.model_deleted else None
        return {n: model for n, model in enumerate(reversed(found), start=1) if n < models and model is not None}


class Hosted(Part):
    """What a run put on its scoring server (adapters, deployments) and has not taken off, as far as is known."""

    def load_intent(self, model: str) -> None:
        """Write this before a model is loaded. Idempotent."""
        with self._db.transaction():
            if model not in self.models():
                self._db.put("hosted", (model, self._now()))
                self._log(f"hosted {model}", "", "intent", "")

    def unloaded(self, model: str) -> None:
        """The server no longer holds the model."""
        with self._db.transaction():
            if model in self.models():
                self._db.execute("DELETE FROM hosted WHERE model = ?", (model,))
                self._log(f"hosted {model}", "intent", "unloaded", "")

    def models(self) -> list[str]:
        """Models that may still be loaded, oldest first."""
        return [str(model) for model, _ in self._db.rows("hosted", "ORDER BY rowid")]
