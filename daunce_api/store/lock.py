"""One writer a run: a lock of the operating system whose file names the holder."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from .._util.files import writing
from ..errors import RunLockedError


class RunLock:
    """Exclusive lock on ``RUN/lock``.

    The kernel drops it when its holder ends in whatever way, so a lock file left by a dead process bars nobody. The
    file stays; its content (the process id) only serves the message.
    """

    def __init__(self, path: Path) -> None:
        """Raises RunLockedError with the pid of the holder, StoreError where the file cannot be written."""
        # Never a lock by existence alone: that one would outlive its holder.
        self._lock = FileLock(path, timeout=0, mode=0o600, thread_local=False, fallback_to_soft=False)
        with writing(path):
            try:
                self._lock.acquire()
                with path.open("r+b", buffering=0) as file:
                    file.write(f"{os.getpid()}\n".encode())
            except Timeout as error:
                pid = _pid_in(path)
                holder = f"process {pid}" if pid else "another process"
                raise RunLockedError(
                    f"{holder} is working on {path.parent}; nothing was changed. Wait for it, or stop it and run the "
                    "same command again. `daunce status` reads the run meanwhile.",
                    pid,
                ) from error
            except OSError:
                self.release()
                raise

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        self._lock.release()


def _pid_in(path: Path) -> int | None:
    try:
        text = path.read_bytes()[:32].strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
