"""Where a model's log-probabilities are already: which runs of this user hold them.

One small SQLite file in the user's cache folder names, for each model of a paid endpoint, the run folder that holds its
scores. It keeps no scores itself: what a run holds is read from that run, with its checksums, and what was set aside
there is not found. Of endpoints and models it holds hashes, of runs their folders; no text and no secret. Only remote
endpoints use it, where a model's name stands for the same weights for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from platformdirs import user_cache_path

from .._util.log import logger
from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import StoreError
from ..providers.base import TokenScores
from ..providers.registry import scoring_address
from ..store import RunStore

FILE_NAME = "scored.sqlite"
_BUSY_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS scored (
    key BLOB NOT NULL, run_dir TEXT NOT NULL, member INTEGER NOT NULL, checkpoint INTEGER NOT NULL,
    PRIMARY KEY (key, run_dir)
) WITHOUT ROWID
"""


def open_cache(config: RunConfig, folder: Path | None = None) -> ScoredCache | None:
    """The user's cache for the config's endpoint, or None: it is off (``scoring.cache: false``), or the endpoint is
    this machine, where nothing is paid and a model's name may stand for other weights tomorrow, or its file cannot be
    opened."""
    address = scoring_address(config) if config.scoring.cache else None
    if address is None:
        return None
    try:
        return ScoredCache(folder or user_cache_path("daunce"), address)
    except (OSError, sqlite3.Error) as error:
        logger.warning("the cache of scores is not used: %s", error)
        return None


class ScoredCache:
    """Runs that hold scores of one endpoint's models, in a file that several processes may use.

    A damaged file is set aside. One that is locked, read-only or on a full disk stays as it is and costs the run
    nothing but what it would have saved.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self._address = address
        self.path = folder / FILE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._database = self._connect()
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # busy, read-only, full: nothing is wrong with the file
                raise
            self._set_aside()
            self._database = self._connect()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(_SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def _set_aside(self) -> None:
        """Move the damaged file away with its log, over no earlier one."""
        number = 1
        while (aside := self.path.with_name(f"{FILE_NAME}.damaged-{number}")).exists():
            number += 1
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                self.path.with_name(FILE_NAME + suffix).replace(aside.with_name(aside.name + suffix))

    def lookup(
        self, fingerprint: str, model: str, examples: Sequence[EncodedExample], *, besides: Path | None = None
    ) -> dict[str, TokenScores]:
        """What other runs than the one in ``besides`` hold of these examples, by ``EncodedExample.key``."""
        found: dict[str, TokenScores] = {}
        try:
            rows = self._database.execute(
                "SELECT run_dir, member, checkpoint FROM scored WHERE key = ?", (self._key(fingerprint, model),)
            ).fetchall()
        except sqlite3.DatabaseError as error:
            logger.warning("the cache of scores could not be read: %s", error)
            return found
        for run_dir, member, checkpoint in rows:
            if besides is not None and Path(run_dir) == besides.resolve():
                continue
            missing = [e for e in examples if e.key not in found]
            with contextlib.suppress(StoreError), RunStore.open(run_dir, read_only=True) as store:
                if missing and store.scores.scored_with == fingerprint:
                    ids = store.scores.find_ids(missing)
                    answers = store.scores.load_some(ids, member, 0, checkpoint).scores()
                    found |= {e.key: answers[i] for i, e in zip(ids.tolist(), missing, strict=True) if i in answers}
        return found

    def note(self, fingerprint: str, model: str, run_dir: Path, member: int, checkpoint: int) -> None:
        """A run holds scores of a model."""
        row = (self._key(fingerprint, model), str(run_dir.resolve()), member, checkpoint)
        try:
            self._database.execute("INSERT OR REPLACE INTO scored VALUES (?, ?, ?, ?)", row)
        except sqlite3.DatabaseError as error:
            logger.warning("the cache of scores could not be written: %s", error)

    def _key(self, fingerprint: str, model: str) -> bytes:
        return hashlib.sha256("\0".join((self._address, fingerprint, model)).encode()).digest()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
