"""Files and jobs: intents before the request leaves, answers after they arrive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import StoreError
from ..providers.base import JobStatus
from .database import seal
from .records import Records
from .rows import INTENT, FileRow, JobRow


class JobRecords(Records):
    """The part of the store that the orchestrator writes to."""

    def file_intent(self, sha256: str, name: str, size: int) -> None:
        """To be written before an upload is asked for; ``size`` in bytes. A file that is there already stays."""
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
        return self._files("ORDER BY sha256")

    def _files(self, clause: str, *values: Any) -> list[FileRow]:
        rows = self._db.execute(f"SELECT sha256, name, size, state, file_id, seal FROM files {clause}", values)
        for *content, expected in rows:
            self._db.check(expected, *content)
        return [FileRow(*row[:-1]) for row in rows]

    def file(self, sha256: str) -> FileRow | None:
        """The file with this content, if an upload of it was ever intended."""
        for row in self._files("WHERE sha256 = ?", sha256):
            return row
        return None

    def _file(self, sha256: str) -> FileRow:
        row = self.file(sha256)
        if row is None:
            raise StoreError(f"no intent was recorded for the file {sha256[:12]}")
        return row

    def _write_file(self, row: FileRow) -> None:
        values = (row.sha256, row.name, row.size, row.state, row.file_id)
        with self._db.transaction():
            old = self.file(row.sha256)
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (*values, seal(*values)))
            self._log(f"file {row.name}", old.state if old else "", row.state, row.file_id or "")

    def job_intent(self, key: str, member: int, attempt: int, request_json: str) -> None:
        """To be written before a job is submitted. Raises StoreError where this attempt exists already."""
        with self._db.transaction():
            if self._jobs("WHERE key = ? OR (member = ? AND attempt = ?)", key, member, attempt):
                raise StoreError(f"attempt {attempt} of member {member} exists already; it is not submitted again")
            self._write_job(JobRow(key, member, attempt, request_json, INTENT), "")

    def job_submitted(self, key: str, job_id: str) -> None:
        """The provider's id of a job, after it answered (or after the job was found again)."""
        self._change_job(key, job_id, status=JobStatus.QUEUED.value, job_id=job_id)

    def job_state(
        self,
        key: str,
        status: JobStatus,
        model: str | None = None,
        error: str | None = None,
        trained_tokens: int | None = None,
    ) -> None:
        """What the provider says of a job. Written only where something changed; None keeps what is known."""
        old = self._job(key)
        self._change_job(
            key,
            error or model or "",
            status=status.value,
            model=model or old.model,
            error=error,
            trained_tokens=old.trained_tokens if trained_tokens is None else trained_tokens,
        )

    def model_deleted(self, key: str) -> None:
        """The provider no longer has the model of this job."""
        self._change_job(key, "model deleted", model_deleted=True)

    def jobs(self, member: int | None = None) -> list[JobRow]:
        """All jobs, or one member's, by member and attempt."""
        if member is None:
            return self._jobs("ORDER BY member, attempt")
        return self._jobs("WHERE member = ? ORDER BY attempt", member)

    def _jobs(self, clause: str, *values: Any) -> list[JobRow]:
        rows = self._db.execute(
            "SELECT key, member, attempt, request_json, status, job_id, model, error, trained_tokens, model_deleted, "
            f"seal FROM jobs {clause}",
            values,
        )
        for *content, expected in rows:
            self._db.check(expected, *content)
        fields = [(*row[:-2], bool(row[-2])) for row in rows]
        return [JobRow(*f) for f in fields]

    def ready_models(self) -> dict[int, str]:
        """Model of each member that has one (-1: the target model); those deleted since are left out."""
        return {
            j.member: j.model
            for j in self.jobs()
            if j.status == JobStatus.SUCCEEDED and j.model and not j.model_deleted
        }

    def _job(self, key: str) -> JobRow:
        for row in self._jobs("WHERE key = ?", key):
            return row
        raise StoreError(f"no intent was recorded for the job {key}")

    def _change_job(self, key: str, detail: str, **changes: Any) -> None:
        with self._db.transaction():
            old = self._job(key)
            new = replace(old, **changes)
            if new != old:
                self._write_job(new, old.status, detail)

    def _write_job(self, row: JobRow, before: str, detail: str = "") -> None:
        values = (
            *(row.key, row.member, row.attempt, row.request_json, row.status, row.job_id, row.model, row.error),
            *(row.trained_tokens, int(row.model_deleted)),
        )
        with self._db.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, seal(*values))
            )
            self._log(f"job {row.key}", before, row.status, detail)
