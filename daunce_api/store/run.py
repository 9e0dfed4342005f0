"""``RunStore``: everything a run knows, in one file that survives a crash at any moment."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ..errors import RunChangedError, StoreCorruptError, StoreError
from .database import Database, noted
from .history import History
from .jobs import Hosted, Jobs
from .ledger import Ledger
from .lock import RunLock
from .manifest import differences
from .part import STARTED_AT, Part
from .rows import Transition
from .scores import Scores

FILE_NAME = "run.sqlite"
LOCK_NAME = "lock"


class RunStore(Part):
    """One SQLite file a run (``RUN/run.sqlite``; WAL, synchronous=FULL), one writer at a time (``RUN/lock``).

    Its parts are ``jobs``, ``scores``, ``ledger``, ``hosted`` and ``history``. Every method is one transaction, on
    disk when it returns. Rows carry checksums: what was paid for and then damaged or edited raises StoreCorruptError
    instead of entering a result. Keys and tokens of providers have no place in it. All methods raise StoreError where
    the file cannot be read or written.
    """

    def __init__(self, run_dir: Path, database: Database, lock: RunLock | None) -> None:
        """Use :meth:`create_or_open` or :meth:`open`."""
        super().__init__(database)
        self.run_dir = run_dir
        self.jobs = Jobs(database)
        self.scores = Scores(database)
        self.ledger = Ledger(database)
        self.hosted = Hosted(database)
        self.history = History(database)
        self._lock = lock

    @classmethod
    def create_or_open(
        cls,
        run_dir: str | Path,
        manifest: Mapping[str, Any],
        *,
        run_key: str | None = None,
        accept_loss: bool = False,
    ) -> RunStore:
        """Take up a run, or start it.

        ``manifest`` is plain data: ``config`` (a RunConfig as JSON), digests of the data, the tokenizer's
        fingerprint. ``run_key`` names a new run at the provider (default: random; a replay gives the recorded one).
        ``accept_loss``: what the store has lost is to be taken over from the provider, under the same run key.

        Raises RunLockedError where another process works on the run, RunChangedError that names each difference
        between ``manifest`` and the one the run was started with, and StoreCorruptError where the store has lost what
        it held. Keys that may change are listed in :data:`daunce_api.store.manifest.MAY_CHANGE`.
        """
        path = Path(run_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be made: {error.strerror}. Set run_dir to a folder to write to."
            ) from error
        plain: dict[str, Any] = json.loads(json.dumps(manifest))
        lost = noted(path) if accept_loss else None
        store = cls._locked(path, accept_loss=accept_loss)
        try:
            if store._meta("run_key") is None:
                with store._db.transaction():
                    store._set_meta("run_key", run_key or (secrets.token_hex(6) if lost is None else lost[0]))
                    store._set_meta("manifest", plain)
                    store._set_meta(STARTED_AT, store._now())
                    store._log("run", "", "created", "")
                store._db.guard(store.run_key)
            else:
                store._continue_with(plain)
        except BaseException:
            store.close()
            raise
        return store

    @staticmethod
    def exists(run_dir: str | Path) -> bool:
        """Whether a run was begun in this folder."""
        return (Path(run_dir) / FILE_NAME).is_file()

    @classmethod
    def open(cls, run_dir: str | Path, *, read_only: bool = False) -> RunStore:
        """Open an existing run as it is. ``read_only`` takes no lock: for looking at a run that is going on.

        Raises StoreError where there is no run, RunLockedError where another process works on it.
        """
        path = Path(run_dir)
        if not cls.exists(path):
            if path.is_file():
                raise StoreError(
                    f"{path} is a file, and a run is a folder: the one that run_dir names in its config, runs/NAME "
                    "where it names none."
                )
            raise StoreError(f"{path} holds no run. `daunce run` starts one; check the folder's name.")
        store = cls(path, _database(path, read_only=True), None) if read_only else cls._locked(path)
        try:
            if store._meta("run_key") is None:
                raise StoreError(f"{path} holds a run that was never started. `daunce run` starts it.")
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def make_room(cls, run_dir: str | Path) -> None:
        """Move a store aside that was emptied or torn, so that :meth:`create_or_open` with ``accept_loss`` can begin
        it anew; one that can be read stays."""
        path = Path(run_dir)
        if not cls.exists(path):
            return
        lock = RunLock(path / LOCK_NAME)
        try:
            Database(path / FILE_NAME, read_only=True).close()
        except StoreCorruptError:
            number = 1
            while (aside := path / f"{FILE_NAME}.damaged-{number}").exists():
                number += 1
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    (path / (FILE_NAME + suffix)).rename(path / (aside.name + suffix))
        finally:
            lock.release()

    @classmethod
    def _locked(cls, path: Path, *, accept_loss: bool = False) -> RunStore:
        lock = RunLock(path / LOCK_NAME)
        try:
            guard = None if accept_loss else noted(path)
            if guard is not None and not (path / FILE_NAME).exists():
                raise _lost(path, guard[0])
            store = cls(path, _database(path, read_only=False), lock)
        except BaseException:
            lock.release()
            raise
        try:
            run_key = store._meta("run_key")
            if guard is not None and (run_key != guard[0] or store._db.sequence < guard[1]):
                raise _lost(path, guard[0])
            if run_key is not None:
                store._db.guard(run_key)
        except BaseException:
            store.close()
            raise
        return store

    def _continue_with(self, manifest: dict[str, Any]) -> None:
        forbidden, allowed = differences(self.manifest, manifest)
        if forbidden:
            raise RunChangedError(
                f"{self.run_dir} was started with other settings or data; nothing was changed. Set run_dir to a new "
                "folder, or go back to what the run was started with:\n" + "\n".join(f"  {d}" for d in forbidden)
            )
        if allowed:
            with self._db.transaction():
                self._set_meta("manifest", manifest)
                for line in allowed:
                    self._log("run", "", "changed", line)

    def close(self) -> None:
        """Close the file and give the lock back; a second call does nothing."""
        try:
            self._db.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the run itself -------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was started with (allowed changes included), as plain data."""
        value: dict[str, Any] = self._required("manifest")
        return value

    @property
    def run_key(self) -> str:
        """Random hexadecimal digits that name this run at the provider."""
        return str(self._required("run_key"))

    @property
    def sequence(self) -> int:
        """Transactions so far: of two copies of a run, the one with more is further."""
        return self._db.sequence

    def set_value(self, key: str, value: Any) -> None:
        """Keep a small JSON value under a name."""
        with self._db.transaction():
            self._set_meta(f"value {key}", value)

    def get_value(self, key: str, default: Any = None) -> Any:
        """The value kept under a name, or ``default``."""
        value = self._meta(f"value {key}")
        return default if value is None else value

    def note(self, kind: str, detail: str) -> None:
        """Add a remark to the log of changes, for people."""
        with self._db.transaction():
            self._log(kind, "", "note", detail)

    def transitions(self) -> list[Transition]:
        """Every change of state so far, oldest first: for people, never to be parsed."""
        rows = self._db.execute("SELECT time, subject, before, after, detail FROM transitions ORDER BY id")
        return [Transition(*row) for row in rows]


def _database(path: Path, *, read_only: bool) -> Database:
    """The file of a run. One that is no store any more, where its guard says that it was one, has lost what it held."""
    try:
        return Database(path / FILE_NAME, read_only=read_only)
    except StoreCorruptError as error:
        guard = noted(path)
        raise error if guard is None else _lost(path, guard[0]) from error


def _lost(path: Path, run_key: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{path / FILE_NAME} has lost what was stored last of the run {run_key} (the file or its -wal was emptied, "
        "removed, damaged or replaced by an older copy). Nothing was changed and nothing was sent: going on would pay "
        "for it again. Restore the whole run folder from a copy, or let `daunce run CONFIG --adopt` take over the "
        "jobs that the provider lists for this run."
    )
