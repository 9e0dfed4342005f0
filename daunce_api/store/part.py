"""What every part of the store needs: the file, the clock, named values and the log of transitions."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from ..errors import StoreCorruptError
from .database import Database

STARTED_AT, LAST_RESULT_AT = "started_at", "last_result_at"


class Part:
    """One part of the store. Its methods write within one transaction each, and log what changed."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def _now(self) -> str:
        return utc_now().isoformat(timespec="milliseconds")

    def _required(self, key: str) -> Any:
        value = self._meta(key)
        if value is None:
            raise StoreCorruptError(f"{self._db.path} has lost its {key}. Restore the run folder from a copy.")
        return value

    def _meta(self, key: str) -> Any:
        for _, value in self._db.rows("meta", "WHERE key = ?", key):
            return json.loads(value)
        return None

    def _set_meta(self, key: str, value: Any) -> None:
        self._db.put("meta", (key, json.dumps(value)))

    def _result(self) -> None:
        """Something was learned: a job ended, scores arrived. Part of a transaction."""
        self._set_meta(LAST_RESULT_AT, self._seen())

    def _seen(self) -> str:
        """The time; a process that is at work on the run was seen then."""
        time = self._now()
        if self._db.span is not None:
            self._db.execute("UPDATE spans SET seen = ? WHERE id = ?", (time, self._db.span))
        return time

    def _log(self, subject: str, before: str, after: str, detail: str) -> None:
        self._db.execute(
            "INSERT INTO transitions (time, subject, before, after, detail) VALUES (?, ?, ?, ?, ?)",
            (self._seen(), subject, before, after, detail),
        )


def utc_now() -> datetime:
    return datetime.now(UTC)
