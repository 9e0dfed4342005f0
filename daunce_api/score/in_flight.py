"""Tokens that were sent and whose answers are not stored, in a file that outlives the process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .._util.files import writing

FILE_NAME = "in_flight"
_DIGITS = 20


class InFlight:
    """``RUN/in_flight``: what a process that is killed has sent and may have been billed for.

    The next process sends it again, and books what this file holds: so the ledger is never less than the bill. Without
    a price (``counts`` False) nothing is written.
    """

    def __init__(self, folder: Path, *, counts: bool) -> None:
        self._path = folder / FILE_NAME
        self._counts = counts
        self._tokens = 0

    def left(self) -> int:
        """Tokens that an earlier process left in flight."""
        with suppress(OSError, ValueError):
            return max(0, int(self._path.read_text(encoding="ascii")))
        return 0

    def add(self, tokens: int) -> None:
        """Tokens are sent (or, where negative, answered and stored). Raises StoreError where that cannot be noted."""
        if not self._counts:
            return
        self._tokens += tokens
        with writing(self._path):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(fd, f"{self._tokens:0{_DIGITS}d}".encode(), 0)
            finally:
                os.close(fd)

    def clear(self) -> None:
        """What an earlier process left is booked."""
        self.add(0)
