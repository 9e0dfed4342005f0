"""The run store: one SQLite file a run, and the only code that writes to it."""

from __future__ import annotations

from .rows import FINAL, INTENT, TARGET, FileRow, JobRow, Transition
from .run import RunStore
from .scores import Batch as ScoreBatch

__all__ = ["FINAL", "INTENT", "TARGET", "FileRow", "JobRow", "RunStore", "ScoreBatch", "Transition"]
