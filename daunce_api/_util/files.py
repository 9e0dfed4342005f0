"""Writing files that may not fit, or may not be written at all, with an error that says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreError

WHAT_TO_DO = "Check free space and permissions of the folder, then run the same command again."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises StoreError for whatever the operating system has against writing ``path``."""
    try:
        yield
    except OSError as error:
        elsewhere = isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError)
        advice = "Name another file." if elsewhere else WHAT_TO_DO
        raise StoreError(
            f"{path} could not be written: {error.strerror or error}. What was stored before is kept. {advice}"
        ) from error


def overwrite(path: Path, content: bytes) -> None:
    """Write a few bytes over those of a file of the same length: a process that is killed leaves the old or the new
    ones. The file is made where there is none. Raises StoreError as :func:`writing` does."""
    with writing(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, content, 0)
        finally:
            os.close(fd)


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file by :func:`replacing`; texts are UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end: no reader ever sees half of it.

    Folders above it are made. Whatever ends it early takes the half-written file away and leaves what was there. A
    link keeps pointing at the file it points at, and what is no plain file (``/dev/stdout``, a named pipe) is written
    to as it is: nothing may take its place. Raises StoreError for whatever the operating system has against it.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            yield path
            return
        path = path.resolve()
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
