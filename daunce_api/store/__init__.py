"""The run store: one SQLite file a run, and the only code that writes to it."""

from __future__ import annotations

from .ledger import Purpose
from .rows import (
    FINAL,
    INTENT,
    TARGET,
    FileRow,
    Ids,
    JobRow,
    LeftOut,
    LossRow,
    ScoreBatch,
    SetAside,
    Stop,
    Times,
    TokenColumns,
    Transition,
)
from .run import RunStore

__all__ = [
    "FINAL",
    "INTENT",
    "TARGET",
    "FileRow",
    "Ids",
    "JobRow",
    "LeftOut",
    "LossRow",
    "Purpose",
    "RunStore",
    "ScoreBatch",
    "SetAside",
    "Stop",
    "Times",
    "TokenColumns",
    "Transition",
]
