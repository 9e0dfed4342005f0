"""What the store knows about itself outside its file, so that a file that lost its end is noticed."""

from __future__ import annotations

from pathlib import Path

from .._util.files import overwrite

FILE_NAME = "sequence"


class Guard:
    """``RUN/sequence``: the run's key and how many transactions its store has taken.

    It is written after each transaction. A store with fewer transactions than its guard has lost some (a write-ahead
    log that was lost or torn, a file that was emptied or replaced by an older copy): going on would pay for them again.
    """

    def __init__(self, folder: Path, run_key: str) -> None:
        self._path = folder / FILE_NAME
        self._run_key = run_key

    def write(self, sequence: int) -> None:
        """Note the number of transactions. Raises StoreError where the file cannot be written."""
        overwrite(self._path, f"{self._run_key} {sequence:020d}\n".encode())

    @staticmethod
    def read(folder: Path) -> tuple[str, int] | None:
        """Run key and number of transactions that were noted; None where nothing legible is."""
        try:
            words = (folder / FILE_NAME).read_text().split()
            return (words[0], int(words[1])) if len(words) == 2 else None
        except (OSError, ValueError):
            return None
