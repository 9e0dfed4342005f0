"""Tasks for worker processes, in a module of their own: what unpickles them imports no PyTorch."""

from __future__ import annotations

import os
import time

from daunce_api.providers.local.engines import report


def visible(_: None) -> tuple[str | None, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OPENAI_API_KEY")


def counts(most: int) -> int:
    """Reports each number, slowly."""
    for k in range(most):
        report(k)
        time.sleep(0.01)
    return os.getpid()


def ends(how: int) -> None:
    os.kill(os.getpid(), how)
