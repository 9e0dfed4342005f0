"""What the store knows about itself outside its file, so that a file that lost its end is noticed."""

from __future__ import annotations

import os
from pathlib import Path

from .._util.files import WHAT_TO_DO
from ..errors import StoreError

FILE_NAME = "sequence"


class Guard:
    """``RUN/sequence``: the run's key and how many transactions its store has taken.

    It is written after each transaction. A store with fewer transactions than its guard has lost some (a write-ahead
    log that was lost or torn, a file that was emptied or replaced by an older copy): going on would pay for them again.
    """

    def __init__(self, folder: Path, run_key: str) -> None:
        """Raises StoreError where the file cannot be written."""
        self._path = folder / FILE_NAME
        self._run_key = run_key
        try:
            self._fd: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, sequence: int) -> None:
        """Note the number of transactions."""
        if self._fd is not None:
            try:
                os.pwrite(self._fd, f"{self._run_key} {sequence:020d}\n".encode(), 0)
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"{self._path} cannot be written: {error.strerror}. {WHAT_TO_DO}")

    @staticmethod
    def read(folder: Path) -> tuple[str, int] | None:
        """Run key and number of transactions that were noted; None where nothing legible is."""
        try:
            words = (folder / FILE_NAME).read_text().split()
            return (words[0], int(words[1])) if len(words) == 2 else None
        except (OSError, ValueError):
            return None
