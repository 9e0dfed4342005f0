"""One writer a run: an advisory lock of the operating system that carries the holder's process id."""

from __future__ import annotations

import os
from pathlib import Path

from .._util.files import WHAT_TO_DO
from ..errors import RunLockedError, StoreError


class RunLock:
    """Exclusive lock on ``RUN/lock``.

    The kernel drops it when its holder ends in whatever way, so a lock file left by a dead process does not bar
    anybody. The file itself stays; its content (the process id) only serves the message.
    """

    def __init__(self, path: Path) -> None:
        """Raises RunLockedError with the pid of the holder, StoreError where the file cannot be made."""
        try:
            import fcntl
        except ImportError as error:
            raise StoreError(
                "runs can be written on Linux and macOS only: this system has no flock. Reading them works."
            ) from error
        try:
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {error.strerror}. Nothing was changed. {WHAT_TO_DO}"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = _read_pid(self._fd)
            self._close()
            holder = f"process {pid}" if pid else "another process"
            raise RunLockedError(
                f"{holder} is working on {path.parent}; nothing was changed. Wait for it, or stop it and run the same "
                "command again. `daunce status` reads the run meanwhile.",
                pid,
            ) from error
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self._close()
            raise StoreError(
                f"{path} cannot be written: {error.strerror}. Nothing was changed. {WHAT_TO_DO}"
            ) from error

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._fd is not None:
            import fcntl

            # Explicitly, since a forked child may hold a copy of the descriptor.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None
