"""``store.history``: when a run worked, and why it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from ..errors import StoreError
from .part import LAST_RESULT_AT, STARTED_AT, Part
from .rows import Stop, Times


class History(Part):
    """Executions of a run, as columns."""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A process works on the run inside the block. One that is killed counts up to the last thing it stored."""
        with self._db.transaction():
            time = self._now()
            rows = self._db.execute("INSERT INTO spans (started, seen) VALUES (?, ?) RETURNING id", (time, time))
            self._db.span = int(rows[0][0])
        try:
            yield
        finally:
            with suppress(StoreError), self._db.transaction():  # what ended the block is what has to be said
                self._seen()
            self._db.span = None

    def stopped(self, kind: str, reason: str) -> None:
        """The run ends before it is complete; see :class:`Stop` for the kinds. It holds until :meth:`cleared`."""
        with self._db.transaction():
            ((last,),) = self._db.execute("SELECT COALESCE(MAX(id), 0) FROM stops")
            self._db.put("stops", (last + 1, kind, reason, self._now(), None))
            self._log(kind, "", "note", reason)

    def cleared(self) -> None:
        """The run is complete, or resumed: earlier stops no longer hold."""
        with self._db.transaction():
            rows = self._db.rows("stops", "WHERE cleared_at IS NULL")
            self._db.put("stops", *[(*row[:-1], self._now()) for row in rows])

    def stop(self) -> Stop | None:
        """The last reason that still holds, or None."""
        for _, kind, reason, *_ in self._db.rows("stops", "WHERE cleared_at IS NULL ORDER BY id DESC LIMIT 1"):
            return Stop(kind, reason)
        return None

    def times(self) -> Times:
        """When the run worked."""
        started, last = self._meta(STARTED_AT) or "", self._meta(LAST_RESULT_AT) or ""
        spans = self._db.execute("SELECT started, seen FROM spans ORDER BY id")
        jobs = self._db.execute("SELECT submitted_at, ended_at FROM jobs WHERE submitted_at < ended_at")
        return Times(
            started,
            last,
            _between(started, last) if last else 0.0,
            sum(_between(a, b) for a, b in spans),
            sum(_between(a, b) for a, b in jobs),
        )


def _between(one: str, other: str) -> float:
    return max(0.0, (datetime.fromisoformat(other) - datetime.fromisoformat(one)).total_seconds())
