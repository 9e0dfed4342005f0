"""What every part of the store needs: the file, the clock, named values and the log of transitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ..errors import StoreCorruptError
from .database import Database, seal


class Records:
    """Base of the store's parts. Subclasses write within one transaction a method, and log what changed."""

    def __init__(self, database: Database, now: Callable[[], datetime] | None) -> None:
        self._db = database
        self._now = now or _utc_now

    def _required(self, key: str) -> Any:
        value = self._meta(key)
        if value is None:
            raise StoreCorruptError(f"{self._db.path} has lost its {key}. Restore the run folder from a copy.")
        return value

    def _meta(self, key: str) -> Any:
        for value, expected in self._db.execute("SELECT value, seal FROM meta WHERE key = ?", (key,)):
            self._db.check(expected, key, value)
            return json.loads(value)
        return None

    def _set_meta(self, key: str, value: Any) -> None:
        text = json.dumps(value)
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (key, text, seal(key, text)))

    def _log(self, subject: str, before: str, after: str, detail: str) -> None:
        time = self._now().astimezone(UTC).isoformat(timespec="milliseconds")
        self._db.execute(
            "INSERT INTO transitions (time, subject, before, after, detail) VALUES (?, ?, ?, ?, ?)",
            (time, subject, before, after, detail),
        )


def _utc_now() -> datetime:
    return datetime.now(UTC)
