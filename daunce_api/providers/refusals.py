"""Refusals that are no failures: what was asked for is so already."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from ..errors import ProviderError, RejectedError
from .base import Job

NO_REASON = "the provider gave no reason"
"""Stands for what a provider did not say of a failed job."""


@contextmanager
def gone_already() -> Iterator[None]:
    """Around a request to take something away or to read it: that it is not there (404) is no error."""
    try:
        yield
    except ProviderError as error:
        if error.status != 404:
            raise


async def cancelled(call: Awaitable[Job], read: Callable[[], Awaitable[Job]]) -> Job:
    """The job after a request to cancel it; where that is refused because it is final already, as ``read`` gives it."""
    try:
        return await call
    except RejectedError:
        job = await read()
        if job.status.final:
            return job
        raise
