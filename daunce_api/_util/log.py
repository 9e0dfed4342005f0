"""The log of a run: one file in its folder, one line an event, with everything that looks like a key taken out.

The same messages, redacted, go to the standard library's logger ``daunce_api``, for the host program to show or not: its
levels and handlers are left alone. Which file a message goes to depends on the context (``contextvars``), so that two
runs in one process do not write into each other's log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from .secrets import redacted

_HOST = logging.getLogger("daunce_api")
_HOST.addHandler(logging.NullHandler())  # without it, Python prints warnings where the host has no logging

_file: ContextVar[Path | None] = ContextVar("daunce_api_log_file", default=None)


class _Log:
    """What modules of this package log with. Arguments are inserted as by the standard library (``%s``)."""

    def info(self, message: str, *arguments: object) -> None:
        self._write(logging.INFO, message, arguments)

    def warning(self, message: str, *arguments: object) -> None:
        self._write(logging.WARNING, message, arguments)

    def _write(self, level: int, message: str, arguments: tuple[object, ...]) -> None:
        text = redacted(message % arguments if arguments else message)
        _HOST.log(level, "%s", text, stacklevel=3)
        path = _file.get()
        if path is None:
            return
        time = datetime.now().isoformat(sep=" ", timespec="milliseconds")
        with suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time} {logging.getLevelName(level)} {text}\n")  # a full disk only ends the log


logger = _Log()


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append the messages of this context, and of tasks and threads that are started in it, to a file."""
    token = _file.set(path)
    try:
        yield
    finally:
        _file.reset(token)
