"""The run store: one SQLite file a run, and the only code that writes to it."""

from __future__ import annotations

from .ledger import Purpose
from .rows import (
    BASE,
    FINAL,
    INTENT,
    TARGET,
    Ids,
    JobRow,
    LossRow,
    ScoreBatch,
    TokenColumns,
    name_of,
)
from .run import RunStore

__all__ = [
    "BASE",
    "FINAL",
    "INTENT",
    "TARGET",
    "Ids",
    "JobRow",
    "LossRow",
    "Purpose",
    "RunStore",
    "ScoreBatch",
    "TokenColumns",
    "name_of",
]
