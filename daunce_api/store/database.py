"""SQLite under the store: opening, transactions, sealed rows, and errors in the package's own classes."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .._util.files import overwrite
from ..errors import StoreCorruptError, StoreError
from .migrate import copy_tables
from .schema import SEALED, VERSION, create

Row = tuple[Any, ...]

_WAL_PAGES = 256
"""Pages (1 MB) after which what was written is copied from the write-ahead log into the file itself."""


GUARD_NAME = "sequence"


def noted(folder: Path) -> tuple[str, int] | None:
    """Run key and number of transactions that were noted beside the store, after each of them; None where nothing
    legible is.

    A store with fewer transactions has lost some (a write-ahead log that was lost or torn, a file that was emptied or
    replaced by an older copy): going on would pay for them again.
    """
    try:
        words = (folder / GUARD_NAME).read_text().split()
        return (words[0], int(words[1])) if len(words) == 2 else None
    except (OSError, ValueError):
        return None


def seal(*values: Any) -> bytes:
    """Checksum of a row: SHA-256 over its values, each with its type and length."""
    digest = hashlib.sha256()
    for value in values:
        raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        digest.update(f"{type(value).__name__}:{len(raw)}:".encode())
        digest.update(raw)
    return digest.digest()


class Database:
    """One connection, usable from several threads, one at a time.

    A file of an earlier version is rewritten in this version's tables when it is opened for writing, and read through
    a copy in memory otherwise.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Open or create. Raises StoreError where that is not possible or a newer version wrote it, StoreCorruptError
        for what is no run store."""
        self.path = path
        self.lock = threading.RLock()
        """Held while no other thread may use the database."""
        self._depth = 0
        self._guarded: str | None = None
        self.span: int | None = None
        """Number of the period in which this process works on the run, while it does."""
        with self._translated("opened"):
            self._connection = self._open(read_only)
        self.writable = not read_only
        self._inode = None if read_only else path.stat().st_ino

    def _open(self, read_only: bool) -> sqlite3.Connection:
        connection = _connect(self.path, read_only)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version > VERSION:
                raise StoreError(
                    f"{self.path} was written by a newer version (schema {version}, this one knows {VERSION}). "
                    "Nothing was changed. Upgrade daunce-api."
                )
            if version == 0 and (tables or read_only):
                raise StoreCorruptError(f"{self.path} is not a run store (schema {version}). Nothing was changed.")
            if 0 < version < VERSION:
                connection = self._migrated(connection, read_only)
            elif not read_only:
                _for_writing(connection)
                if version == 0:
                    connection.execute("BEGIN IMMEDIATE")
                    create(connection)
                    connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrated(self, old: sqlite3.Connection, read_only: bool) -> sqlite3.Connection:
        """The same run in the tables of this version: in memory, or in place of the old file once it is whole."""
        if read_only:
            copy = _connect(None, False)
            try:
                copy_tables(old, copy, seal)
            except BaseException:
                copy.close()
                raise
            copy.execute("PRAGMA query_only = 1")
            old.close()
            return copy
        part = self.path.with_name(self.path.name + ".part")
        part.unlink(missing_ok=True)
        try:
            copy = _connect(part, False)
            try:
                copy.execute("PRAGMA synchronous = FULL")
                copy_tables(old, copy, seal)
            finally:
                copy.close()
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            old.close()
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            os.replace(part, self.path)
        except OSError as error:
            raise StoreError(
                f"{self.path} could not be rewritten for this version: {error}. It is as it was."
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        connection = _connect(self.path, False)
        _for_writing(connection)
        return connection

    def guard(self, run_key: str) -> None:
        """Note the run's key and the number of transactions in a file of its own from now on; see :func:`noted`."""
        self._guarded = run_key
        self._note(self.sequence)

    def _note(self, sequence: int) -> None:
        if self._guarded is not None:
            overwrite(self.path.with_name(GUARD_NAME), f"{self._guarded} {sequence:020d}\n".encode())

    @property
    def sequence(self) -> int:
        """Transactions so far."""
        ((n,),) = self.execute("SELECT n FROM counter")
        return int(n)

    def close(self) -> None:
        """Close; a second call does nothing."""
        with self.lock, self._translated("closed"):
            self._connection.close()

    def checkpoint(self) -> None:
        """Copy what was written from the write-ahead log into the file: losing the log loses nothing after this."""
        with self.lock, self._translated("written"):
            if self._depth == 0:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nested ones are part of the outer one."""
        with self.lock, self._translated("written"):
            if self._depth == 0:
                self._stands()
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    ((sequence,),) = self._connection.execute("UPDATE counter SET n = n + 1 RETURNING n").fetchall()
                    self._connection.execute("COMMIT")
                    self._note(sequence)
            except BaseException:
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def _stands(self) -> None:
        """Raises StoreError where the file was deleted or moved: what is written to it would be lost."""
        try:
            here = self.path.stat().st_ino
        except OSError:
            here = None
        if self._inode is not None and here != self._inode:
            raise StoreError(
                f"{self.path} was deleted or moved while the run was using it. Nothing more was sent. Put the folder "
                "back, or run from where it is now."
            )

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Run one statement and return its rows."""
        with self.lock, self._translated("read or written"):
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def reading(self, sql: str, values: Sequence[Any] = ()) -> Iterator[Iterator[Row]]:
        """The rows of a statement, read one by one inside the block: for who may stop early."""
        with self.lock, self._translated("read"):
            yield self._connection.execute(sql, values)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for every row."""
        with self.lock, self._translated("written"):
            self._connection.executemany(sql, rows)

    def put(self, table: str, *rows: Row) -> None:
        """Write rows of a sealed table, over those with the same key."""
        marks = ", ".join("?" * (1 + len(SEALED[table])))
        self.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", [(*row, seal(*row)) for row in rows])

    def rows(self, table: str, clause: str = "", *values: Any) -> list[Row]:
        """Rows of a sealed table. Raises StoreCorruptError where one does not match its checksum."""
        columns = ", ".join(SEALED[table])
        found = []
        for *content, expected in self.execute(f"SELECT {columns}, seal FROM {table} {clause}", values):
            self.check(expected, *content)
            found.append(tuple(content))
        return found

    def check(self, expected: bytes, *values: Any) -> None:
        """Raises StoreCorruptError where a row does not match its seal."""
        if seal(*values) != expected:
            raise self.damaged(f"the row {values[:2]} does not match its checksum")

    def damaged(self, what: str) -> StoreCorruptError:
        """The error for content that was damaged or edited."""
        return StoreCorruptError(
            f"{self.path}: {what}: the file was damaged or edited. Nothing was changed. Restore the run folder from a "
            "copy, or start a new run."
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
        except UnicodeDecodeError as error:
            raise self.damaged("text in it is no text any more") from error


def _connect(path: Path | None, read_only: bool) -> sqlite3.Connection:
    """Open a file, or a database in memory where there is none."""
    try:
        uri = ":memory:" if path is None else f"file:{quote(str(path))}?mode={'ro' if read_only else 'rwc'}"
    except UnicodeEncodeError as error:
        raise StoreError(
            f"{path} cannot be used: this path is not UTF-8. Rename the folder, or set a UTF-8 locale (LC_ALL=C.UTF-8)."
        ) from error
    options: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False, "timeout": 10.0}
    connection: sqlite3.Connection = sqlite3.connect(uri, **options)
    if read_only and path is not None:
        try:
            connection.execute("SELECT 1 FROM sqlite_master")
        except sqlite3.OperationalError:
            # On a read-only disk WAL cannot even be looked at; without a -wal file the main file is all there is.
            connection.close()
            if path.with_name(path.name + "-wal").exists():
                raise
            connection = sqlite3.connect(uri + "&immutable=1", **options)
    # Damaged text becomes text that does not match its row's checksum.
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    return connection


def _for_writing(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
