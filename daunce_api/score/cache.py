"""Log-probabilities that were paid for once, kept for every later run of this user.

One SQLite file in the user's cache folder. A row's key is a hash of the endpoint, what the scorer measures, the model
and the example's token ids and targets; no text and no secret is in it. Only remote, paid endpoints use it, where a
model's name stands for the same weights for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from platformdirs import user_cache_path

from .._util.log import logger
from ..config import RunConfig
from ..errors import StoreCorruptError
from ..providers.base import TokenScores
from ..providers.registry import scoring_address

FILE_NAME = "scores.sqlite"
_BUSY_SECONDS = 30.0
_LOOKUP = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    key BLOB PRIMARY KEY, logprobs BLOB NOT NULL, censored BLOB, checksum BLOB NOT NULL
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
    """Scores of one endpoint in a file that several processes may use. A damaged file is set aside, not used, and one
    that can no longer be read or written (a full disk) costs the run nothing but what it would have saved."""

    def __init__(self, folder: Path, address: str) -> None:
        self._address = address
        self.path = folder / FILE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._database = self._connect()
        except sqlite3.DatabaseError:
            with contextlib.suppress(OSError):
                self.path.replace(self.path.with_suffix(".damaged"))
            self._database = self._connect()
        self.hits = 0
        """Examples that were found instead of asked for."""

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(_SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def lookup(self, fingerprint: str, model: str, keys: Iterable[str]) -> dict[str, TokenScores]:
        """What is known of these examples (by ``EncodedExample.key``); damaged rows count as not known."""
        names = {self._key(fingerprint, model, key): key for key in keys}
        hashes = list(names)
        found: dict[str, TokenScores] = {}
        for start in range(0, len(hashes), _LOOKUP):
            part = hashes[start : start + _LOOKUP]
            marks = ",".join("?" * len(part))
            try:
                rows = self._database.execute(
                    f"SELECT key, logprobs, censored, checksum FROM scores WHERE key IN ({marks})", part
                ).fetchall()
            except sqlite3.DatabaseError as error:
                logger.warning("the cache of scores could not be read: %s", error)
                break
            for name, logprobs, censored, checksum in rows:
                if checksum == _checksum(name, logprobs, censored):
                    with contextlib.suppress(StoreCorruptError):
                        found[names[name]] = unpack(logprobs, censored)
        self.hits += len(found)
        return found

    def save(self, fingerprint: str, model: str, scores: Mapping[str, TokenScores]) -> None:
        """Keep the scores of these examples, in one transaction."""
        rows = []
        for key, score in scores.items():
            name = self._key(fingerprint, model, key)
            logprobs, censored = pack(score)
            rows.append((name, logprobs, censored, _checksum(name, logprobs, censored)))
        try:
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            logger.warning("the cache of scores could not be written: %s", error)

    def discard(self, fingerprint: str, model: str, keys: Iterable[str]) -> None:
        """Forget the scores of these examples: another model answered."""
        names = [(self._key(fingerprint, model, key),) for key in keys]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                self._database.executemany("DELETE FROM scores WHERE key = ?", names)
        except sqlite3.DatabaseError as error:
            logger.warning("the cache of scores could not be written: %s", error)

    def _key(self, fingerprint: str, model: str, key: str) -> bytes:
        parts = "\0".join((self._address, fingerprint, model, key))
        return hashlib.sha256(parts.encode()).digest()

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pack(scores: TokenScores) -> tuple[bytes, bytes | None]:
    """Log-probabilities as little-endian float64, censoring as one byte a token (None where nothing is censored)."""
    flags = np.asarray(scores.censored, dtype=np.uint8).tobytes() if scores.any_censored else None
    return np.asarray(scores.logprobs, dtype="<f8").tobytes(), flags


def unpack(logprobs: bytes, censored: bytes | None) -> TokenScores:
    """Inverse of :func:`pack`; scores without censoring come back with an empty ``censored``."""
    if len(logprobs) % 8 or (censored is not None and len(censored) * 8 != len(logprobs)):
        raise StoreCorruptError("a cached score has an impossible length.")
    values: list[float] = np.frombuffer(logprobs, dtype="<f8").tolist()
    return TokenScores(tuple(values), tuple(bool(b) for b in censored or b""))


def _checksum(name: bytes, logprobs: bytes, censored: bytes | None) -> bytes:
    return hashlib.sha256(name + logprobs + b"\0" + (censored or b"")).digest()[:16]
