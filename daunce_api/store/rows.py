"""What the store hands out, and how scores become bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import StoreCorruptError, StoreError
from ..providers.base import JobStatus, TokenScores

TARGET = -1
"""The member number of the target model."""

INTENT = "intent"
"""State of a job whose submit may or may not have reached the provider; every other state is a ``JobStatus``."""

FINAL = frozenset(status.value for status in JobStatus if status.final)
"""States of a job to which nothing more happens, as far as the store knows."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A training file. ``state`` is ``intent``, ``uploaded`` or ``deleted``; ``size`` in bytes."""

    sha256: str
    name: str
    size: int
    state: str
    file_id: str | None


@dataclass(frozen=True, slots=True)
class JobRow:
    """One attempt at one member (-1: the target model).

    ``status`` is ``intent`` or a value of ``JobStatus``; ``model_deleted`` says that clean-up removed the model.
    """

    key: str
    member: int
    attempt: int
    request_json: str
    status: str
    job_id: str | None = None
    model: str | None = None
    error: str | None = None
    trained_tokens: int | None = None
    model_deleted: bool = False


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of state; ``time`` is ISO 8601 in UTC."""

    time: str
    subject: str
    before: str
    after: str
    detail: str


def pack(scores: TokenScores) -> tuple[bytes, bytes | None]:
    """Log-probabilities as little-endian float64, censoring as one byte a token (None where nothing is censored).

    Raises StoreError for values that no model can give, so that a mean is never poisoned by them.
    """
    values = np.asarray(scores.logprobs, dtype="<f8")
    if not np.isfinite(values).all():
        raise StoreError("a log-probability is not finite; nothing of this batch was stored.")
    if scores.censored and len(scores.censored) != len(values):
        raise StoreError("censoring flags and log-probabilities differ in number; nothing of this batch was stored.")
    flags = np.asarray(scores.censored, dtype=np.uint8).tobytes() if scores.any_censored else None
    return values.tobytes(), flags


def unpack(logprobs: bytes, censored: bytes | None) -> TokenScores:
    """Inverse of :func:`pack`; scores without censoring come back with an empty ``censored``."""
    if len(logprobs) % 8 or (censored is not None and len(censored) * 8 != len(logprobs)):
        raise StoreCorruptError("a stored score has an impossible length. Restore the run folder from a copy.")
    values: list[float] = np.frombuffer(logprobs, dtype="<f8").tolist()
    return TokenScores(tuple(values), tuple(bool(b) for b in censored or b""))
