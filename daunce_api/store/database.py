"""SQLite under the store: opening, transactions, sealed rows, and errors in the package's own classes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import StoreCorruptError, StoreError

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, seal BLOB NOT NULL);
CREATE TABLE files (sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, size INTEGER NOT NULL, state TEXT NOT NULL,
                    file_id TEXT, seal BLOB NOT NULL);
CREATE TABLE jobs (key TEXT PRIMARY KEY, member INTEGER NOT NULL, attempt INTEGER NOT NULL, request_json TEXT NOT NULL,
                   status TEXT NOT NULL, job_id TEXT, model TEXT, error TEXT, trained_tokens INTEGER,
                   model_deleted INTEGER NOT NULL, seal BLOB NOT NULL, UNIQUE (member, attempt));
CREATE TABLE scores (member INTEGER NOT NULL, replicate INTEGER NOT NULL, example_key TEXT NOT NULL,
                     logprobs BLOB NOT NULL, censored BLOB, seal BLOB NOT NULL,
                     PRIMARY KEY (member, replicate, example_key)) WITHOUT ROWID;
CREATE TABLE spend (subject TEXT PRIMARY KEY, reserved INTEGER NOT NULL, settled INTEGER, seal BLOB NOT NULL);
CREATE TABLE transitions (id INTEGER PRIMARY KEY, time TEXT NOT NULL, subject TEXT NOT NULL, before TEXT NOT NULL,
                          after TEXT NOT NULL, detail TEXT NOT NULL);
"""

_CHECKPOINTS_SCHEMA = """
CREATE TABLE checkpoints (key TEXT PRIMARY KEY, models TEXT NOT NULL, seal BLOB NOT NULL);
CREATE TABLE checkpoint_scores (member INTEGER NOT NULL, replicate INTEGER NOT NULL, checkpoint INTEGER NOT NULL,
                                example_key TEXT NOT NULL, logprobs BLOB NOT NULL, censored BLOB, seal BLOB NOT NULL,
                                PRIMARY KEY (member, replicate, checkpoint, example_key)) WITHOUT ROWID
"""
"""What version 2 adds; empty in runs that were started before."""


def seal(*values: Any) -> bytes:
    """Checksum of a row: SHA-256 over its values, each with its type and length."""
    digest = hashlib.sha256()
    for value in values:
        raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        digest.update(f"{type(value).__name__}:{len(raw)}:".encode())
        digest.update(raw)
    return digest.digest()


class Database:
    """One connection, usable from several threads, one at a time."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Open or create. Raises StoreError where that is not possible, StoreCorruptError for another schema."""
        self.path = path
        self._mutex = threading.RLock()
        self._depth = 0
        with self._translated("opened"):
            self._connection = self._connect(read_only)
        try:
            with self._translated("opened"):
                if not read_only:
                    self._connection.execute("PRAGMA journal_mode = WAL")
                    self._connection.execute("PRAGMA synchronous = FULL")
                self._check_schema(read_only)
        except BaseException:
            self._connection.close()
            raise

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        uri = f"file:{quote(str(self.path))}?mode={'ro' if read_only else 'rwc'}"
        options: dict[str, Any] = {
            "uri": True, "isolation_level": None, "check_same_thread": False, "timeout": 10.0,
        }  # fmt: skip
        connection: sqlite3.Connection = sqlite3.connect(uri, **options)
        if read_only:
            try:
                connection.execute("SELECT 1 FROM sqlite_master")
            except sqlite3.OperationalError:
                # On a read-only disk WAL cannot even be looked at; without a -wal file the main file is all there is.
                connection.close()
                if self.path.with_name(self.path.name + "-wal").exists():
                    raise
                connection = sqlite3.connect(uri + "&immutable=1", **options)
        return connection

    def _check_schema(self, read_only: bool) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 0 and tables == 0 and not read_only:
            with self.transaction():
                for statement in (_SCHEMA + _CHECKPOINTS_SCHEMA).split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version == 1 and read_only:
            for statement in _CHECKPOINTS_SCHEMA.replace("CREATE TABLE", "CREATE TEMP TABLE").split(";"):
                self._connection.execute(statement)
        elif version == 1:
            with self.transaction():
                for statement in _CHECKPOINTS_SCHEMA.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version > SCHEMA_VERSION:
            raise StoreCorruptError(
                f"{self.path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION}). "
                "Nothing was changed. Upgrade daunce-api."
            )
        elif version != SCHEMA_VERSION:
            raise StoreCorruptError(f"{self.path} is not a run store (schema {version}). Nothing was changed.")

    def close(self) -> None:
        """Close; a second call does nothing."""
        with self._mutex, self._translated("closed"):
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nested ones are part of the outer one."""
        with self._mutex, self._translated("written"):
            if self._depth == 0:
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        with self._mutex, self._translated("read or written"):
            return self._connection.execute(sql, values).fetchall()

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for every row."""
        with self._mutex, self._translated("written"):
            self._connection.executemany(sql, rows)

    def check(self, expected: bytes, *values: Any) -> None:
        """Raises StoreCorruptError where a row does not match its seal."""
        if seal(*values) != expected:
            raise StoreCorruptError(
                f"{self.path}: the row {values[:2]} does not match its checksum: the file was damaged or edited. "
                "Nothing was changed. Restore the run folder from a copy, or start a new run."
            )

    @contextmanager
    def _translated(self, verb: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{self.path} could not be {verb}: {error}. What was stored before is intact. Check free space and "
                "permissions of the folder, then run the same command again."
            ) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise  # a mistake in the program, not in the file
            raise StoreCorruptError(
                f"{self.path} is damaged: {error}. Nothing was changed. Restore the run folder from a copy."
            ) from error
