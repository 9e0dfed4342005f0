"""The server's persistent state: one SQLite file (WAL), and folders of uploaded files and adapters.

Committed changes survive any signal that ends the process. Used from one thread, the event loop's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ..errors import ConfigurationError, RunLockedError, StoreCorruptError

SCHEMA_VERSION = 1
UNFINISHED = ("validating_files", "queued", "running")
_UNFINISHED = f"status IN {UNFINISHED}"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, filename TEXT NOT NULL, bytes INTEGER NOT NULL,
    purpose TEXT NOT NULL, created_at INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, finished_at INTEGER,
    status TEXT NOT NULL, model TEXT NOT NULL, training_file TEXT NOT NULL, n_epochs INTEGER NOT NULL,
    batch_size INTEGER NOT NULL, learning_rate_multiplier REAL NOT NULL, seed INTEGER NOT NULL, suffix TEXT,
    metadata TEXT, error TEXT, fine_tuned_model TEXT, trained_tokens INTEGER, result_file TEXT,
    estimated_finish INTEGER, fault TEXT);
CREATE INDEX IF NOT EXISTS jobs_status ON jobs(status);
CREATE INDEX IF NOT EXISTS jobs_file ON jobs(training_file);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, created_at INTEGER NOT NULL,
    level TEXT NOT NULL, message TEXT NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_job ON events(job, seq);
CREATE TABLE IF NOT EXISTS models (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, checkpoint_id TEXT UNIQUE, job TEXT NOT NULL,
    base TEXT NOT NULL, created_at INTEGER NOT NULL, adapter TEXT NOT NULL, fingerprint TEXT NOT NULL, step INTEGER,
    train_loss REAL);
CREATE INDEX IF NOT EXISTS models_job ON models(job, seq);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, body TEXT NOT NULL);
"""
"""A folder of an earlier version gets the tables that it lacks when it is opened; that version can still read it."""

Row = sqlite3.Row
Table = Literal["files", "jobs", "events", "models", "batches"]


def new_id(prefix: str) -> str:
    """An identifier like OpenAI's: a prefix and 24 random hexadecimal digits."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since the epoch, as all the API's times are."""
    return int(time.time())


class State:
    """Everything that outlives the process. One server at a time: the folder is locked while it is open."""

    def __init__(self, folder: Path, *, lock_timeout: float = 20.0) -> None:
        """Raises RunLockedError where another server uses the folder, StoreCorruptError where the database is not
        one of ours, ConfigurationError where the folder cannot be written."""
        self.files_dir, self.adapters_dir = folder / "files", folder / "adapters"
        try:
            for part in (folder, self.files_dir, self.adapters_dir):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(folder / "lock", lock_timeout)
        except OSError as error:
            raise ConfigurationError(f"the state folder {folder} cannot be used: {error.strerror}") from error
        database = folder / "state.sqlite"
        try:
            self._db = sqlite3.connect(database, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"it has schema {version}, this version writes {SCHEMA_VERSION}")
            self._db.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
            if version == 0:
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._sweep()
        except (sqlite3.OperationalError, OSError) as error:
            self._lock.release()
            raise ConfigurationError(f"the state folder {folder} cannot be used: {error}") from None
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise StoreCorruptError(f"{database} cannot be read: {error}. Start with another state_dir.") from None

    def close(self) -> None:
        self._db.close()
        self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the changes inside, or none."""
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            yield

    def insert(self, table: Table, **values: Any) -> None:
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))

    def one(self, table: Table, identity: str) -> Row | None:
        """The row with this id (a deleted file's too)."""
        row: Row | None = self._db.execute(f"SELECT * FROM {table} WHERE id=?", (identity,)).fetchone()
        return row

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        return self._db.execute(query, tuple(parameters)).fetchall()

    # --- files ---------------------------------------------------------------------------------------------------

    def file(self, identity: str) -> Row | None:
        row = self.one("files", identity)
        return None if row is None or row["deleted"] else row

    def file_path(self, identity: str) -> Path:
        """Where the content of a file is. Ids are made here, never taken from a request."""
        return self.files_dir / identity

    def add_file(self, identity: str, filename: str, purpose: str) -> Row:
        """Make the content at :meth:`file_path` a file."""
        size = self.file_path(identity).stat().st_size
        self.insert("files", id=identity, filename=filename, bytes=size, purpose=purpose, created_at=now())
        return self.rows("SELECT * FROM files WHERE id=?", [identity])[0]

    def delete_file(self, identity: str) -> None:
        """Hide a file; its bytes are removed when no unfinished job needs them."""
        self._db.execute("UPDATE files SET deleted=1 WHERE id=?", (identity,))
        self.drop_unused_bytes(identity)

    def drop_unused_bytes(self, identity: str) -> None:
        """Remove the bytes of a deleted file that no unfinished job needs."""
        row = self.one("files", identity)
        if row is not None and row["deleted"] and not self._needed(identity):
            self.file_path(identity).unlink(missing_ok=True)

    def _needed(self, identity: str) -> bool:
        return bool(self.rows(f"SELECT 1 FROM jobs WHERE training_file=? AND {_UNFINISHED} LIMIT 1", [identity]))

    # --- jobs ----------------------------------------------------------------------------------------------------

    def update_job(self, identity: str, **values: Any) -> bool:
        """Change an unfinished job; False, and nothing changed, where it is finished already."""
        names = ", ".join(f"{name}=?" for name in values)
        query = f"UPDATE jobs SET {names} WHERE id=? AND {_UNFINISHED}"
        return self._db.execute(query, (*values.values(), identity)).rowcount > 0

    def job(self, identity: str) -> Row:
        """Raises KeyError where there is none."""
        row = self.one("jobs", identity)
        if row is None:
            raise KeyError(identity)
        return row

    def unfinished_jobs(self) -> list[Row]:
        return self.rows(f"SELECT * FROM jobs WHERE {_UNFINISHED} ORDER BY seq")

    def event(
        self, job: str, message: str, *, level: str = "info", type: str = "message", data: dict[str, Any] | None = None
    ) -> None:
        self.insert(
            "events",
            id=new_id("ftevent"),
            job=job,
            created_at=now(),
            level=level,
            message=message,
            type=type,
            data=json.dumps(data or {}),
        )

    # --- models --------------------------------------------------------------------------------------------------

    def adapter_path(self, row: Row) -> Path:
        return self.adapters_dir / str(row["adapter"])

    def models_of_job(self, job: str) -> list[Row]:
        return self.rows("SELECT * FROM models WHERE job=? ORDER BY seq", (job,))

    def delete_models(self, rows: Sequence[Row]) -> None:
        """Remove fine-tunes or checkpoints, and the weights that no other model shares."""
        for row in rows:
            self._db.execute("DELETE FROM models WHERE id=?", (row["id"],))
            if not self.rows("SELECT 1 FROM models WHERE adapter=? LIMIT 1", [row["adapter"]]):
                shutil.rmtree(self.adapter_path(row), ignore_errors=True)

    def delete_models_of_job(self, job: str) -> None:
        """Remove everything that a job made."""
        self.delete_models(self.models_of_job(job))
        self._drop_unused_adapters(job)

    def _drop_unused_adapters(self, job: str) -> None:
        """Remove the weights in a job's folder that no model has."""
        used = {r["adapter"] for r in self.rows("SELECT adapter FROM models WHERE adapter LIKE ?", [f"{job}/%"])}
        folder = self.adapters_dir / job
        for path in folder.glob("*"):
            if f"{job}/{path.name}" not in used:
                shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # it is not empty, or not there
            folder.rmdir()

    # --- batches -------------------------------------------------------------------------------------------------

    def update_batch(self, batch: dict[str, Any]) -> None:
        self._db.execute("UPDATE batches SET body=? WHERE id=?", (json.dumps(batch), batch["id"]))

    def _sweep(self) -> None:
        """Remove what a killed process left half done: files without a row, adapters that no model has."""
        known = {
            r["id"] for r in self.rows("SELECT id, deleted FROM files") if not r["deleted"] or self._needed(r["id"])
        }
        for path in self.files_dir.iterdir():
            if path.name not in known:
                path.unlink(missing_ok=True)
        for folder in self.adapters_dir.iterdir():
            self._drop_unused_adapters(folder.name)


def _locked(path: Path, timeout: float) -> FileLock:
    """An exclusive lock that ends with the process. A server that is shutting down gets ``timeout`` seconds."""
    lock = FileLock(path, timeout=timeout, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        pid = path.read_text().strip()
        raise RunLockedError(
            f"another server (process {pid or 'unknown'}) uses {path.parent}. Stop it, or give another state_dir.",
            int(pid) if pid.isdigit() else None,
        ) from None
    path.write_text(str(os.getpid()))
    return lock
