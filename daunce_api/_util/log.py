"""The log of a run: one file in its folder, one line an event, with everything that looks like a key taken out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("daunce_api")

# Shapes of keys of the providers, and whatever follows "Bearer". Values of *_KEY variables are taken out as well.
_KEY_SHAPES = re.compile(r"(?i)(bearer\s+)\S+|\b(sk|tml|fw|tgp|hf)[-_][A-Za-z0-9_-]{12,}")


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for name, value in os.environ.items():
            if name.endswith(("_KEY", "_TOKEN", "_SECRET")) and len(value) >= 8:
                text = text.replace(value, f"<{name}>")
        return _KEY_SHAPES.sub(lambda m: f"{m.group(1) or ''}<secret>", text)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append the package's log messages to a file while the block runs; a disk that is full only ends the log."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
