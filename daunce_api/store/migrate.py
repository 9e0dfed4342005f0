"""Runs of earlier versions in the tables of this one. Every row's checksum is compared on the way."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from ..errors import StoreCorruptError
from .rows import FINAL, INTENT
from .schema import create

_ROWS_A_BLOB = 256
_KEPT = ("deleted", "changed", "note")
"""States in the log that are no result: something was taken away, settings changed, a remark."""

Seal = Callable[..., bytes]


def copy_tables(old: sqlite3.Connection, new: sqlite3.Connection, seal: Seal) -> None:
    """Fill the empty database ``new`` with the run in ``old`` (schema 1 or 2), in one transaction.

    Raises StoreCorruptError where a row of the old one is damaged.
    """
    new.execute("BEGIN IMMEDIATE")
    create(new)
    _Copy(old, new, seal).everything()
    new.execute("COMMIT")


@dataclass(frozen=True)
class _Copy:
    _old: sqlite3.Connection
    _new: sqlite3.Connection
    _seal: Seal

    def everything(self) -> None:
        log = self._old.execute("SELECT time, subject, before, after, detail FROM transitions ORDER BY id").fetchall()
        self._new.executemany(
            "INSERT INTO transitions (time, subject, before, after, detail) VALUES (?, ?, ?, ?, ?)", log
        )
        self._meta(log)
        for table in ("files", "checkpoints"):
            self._put(table, *self._rows(table))
        self._jobs(log)
        for subject, reserved, settled in self._rows("spend"):
            self._put("spend", (subject, "score" if subject.startswith("scoring of ") else "train", reserved, settled))
        self._fates(log)
        self._scores()

    def _rows(self, table: str) -> list[tuple[Any, ...]]:
        if not self._old.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchall():
            return []
        found = []
        for *content, expected in self._old.execute(f"SELECT * FROM {table}"):
            if self._seal(*content) != expected:
                raise StoreCorruptError(
                    f"a row of the table {table} does not match its checksum: the store was damaged or edited. Nothing "
                    "was changed. Restore the run folder from a copy, or start a new run."
                )
            found.append(tuple(content))
        return found

    def _put(self, table: str, *rows: tuple[Any, ...]) -> None:
        for row in rows:
            marks = ", ".join("?" * (1 + len(row)))
            self._new.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, self._seal(*row)))

    def _meta(self, log: list[Any]) -> None:
        values = dict(self._rows("meta"))
        for model in json.loads(values.pop("hosted", "[]")):
            self._put("hosted", (model, log[-1][0] if log else ""))
        for place, (examples, tokens) in json.loads(values.pop("cached", "{}")).items():
            member, checkpoint = place.split("/")
            self._put("cached", (int(member), int(checkpoint), examples, tokens))
        results = [time for time, _, before, after, _ in log if after not in (*_KEPT, before)]
        if log:
            values["started_at"] = json.dumps(log[0][0])
        if results:
            values["last_result_at"] = json.dumps(results[-1])
            # How long each execution took was not recorded; all of it counts as one.
            self._new.execute("INSERT INTO spans (started, seen) VALUES (?, ?)", (log[0][0], results[-1]))
        self._put("meta", *values.items())

    def _jobs(self, log: list[Any]) -> None:
        submitted: dict[str, str] = {}
        ended: dict[str, str] = {}
        for time, subject, _, after, _ in log:
            key = subject.removeprefix("job ")
            if subject.startswith("job ") and after in FINAL:
                ended.setdefault(key, time)
            elif subject.startswith("job ") and after != INTENT:
                submitted.setdefault(key, time)
        for row in self._rows("jobs"):
            self._put("jobs", (*row, submitted.get(row[0]), ended.get(row[0])))

    def _fates(self, log: list[Any]) -> None:
        """What the log said of members and of the run's end, as columns."""
        done = {
            member: at
            for member, status, at in self._new.execute("SELECT member, status, ended_at FROM jobs ORDER BY attempt")
            if status == "succeeded"
        }
        left: dict[int, tuple[Any, ...]] = {}
        for time, subject, _, _, detail in log:
            if subject.startswith("left out "):
                word = subject.split()[-1]
                member = int(word) if word.isdigit() else -1
                later = done.get(member) or ""
                taken_back = later and datetime.fromisoformat(later) > datetime.fromisoformat(time)
                left[member] = (member, detail, time, later if taken_back else None)
            elif subject in ("halted", "parked", "interrupted"):
                self._put("stops", (self._next("stops"), subject, detail, time, None))
        self._put("left_out", *left.values())

    def _next(self, table: str) -> int:
        ((last,),) = self._new.execute(f"SELECT COALESCE(MAX(id), 0) FROM {table}").fetchall()
        return int(last) + 1

    def _scores(self) -> None:
        numbers: dict[str, int] = {}
        places: dict[tuple[int, int, int], list[tuple[str, bytes, bytes | None]]] = defaultdict(list)
        for member, replicate, key, logprobs, censored in self._rows("scores"):
            places[member, replicate, 0].append((key, logprobs, censored))
        for member, replicate, checkpoint, key, logprobs, censored in self._rows("checkpoint_scores"):
            places[member, replicate, checkpoint].append((key, logprobs, censored))
        for place, answers in places.items():
            for start in range(0, len(answers), _ROWS_A_BLOB):
                part = answers[start : start + _ROWS_A_BLOB]
                ids = np.array([numbers.setdefault(key, len(numbers)) for key, _, _ in part], "<i4")
                counts = np.array([len(values) // 8 for _, values, _ in part], "<i4")
                flags = None
                if any(f for _, _, f in part):
                    flags = b"".join(f or bytes(len(values) // 8) for _, values, f in part)
                values = b"".join(values for _, values, _ in part)
                row = (self._next("blobs"), *place, len(part), None, ids.tobytes(), counts.tobytes(), values, flags)
                self._put("blobs", row)
        self._new.executemany("INSERT INTO examples VALUES (?, ?, NULL)", [(n, key) for key, n in numbers.items()])
