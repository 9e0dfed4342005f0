"""What the store hands out: plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..providers.base import JobStatus, TokenScores

TARGET, BASE = -1, -2
"""The member numbers of the target model, and of the base model, which is scored on questions alone."""

INTENT = "intent"
"""State of a job whose submit may or may not have reached the provider; every other state is a ``JobStatus``."""

FINAL = frozenset(status.value for status in JobStatus if status.final)
"""States of a job to which nothing more happens, as far as the store knows."""


def name_of(member: int) -> str:
    """A member in a sentence."""
    return {TARGET: "the target model", BASE: "the base model"}.get(member, f"member {member}")


Ids = NDArray[np.int32]
"""Integer ids of examples, as :meth:`ScoreTable.ids_of` gives them."""


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
    ``submitted_at`` and ``ended_at`` (ISO 8601, None before) are when this run learned of it.
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
    submitted_at: str | None = field(default=None, compare=False)
    ended_at: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run stopped before it was complete.

    ``kind``: ``halted`` (enough members), ``parked`` (limit of a day, budget), ``interrupted``, or ``error``.
    """

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Times:
    """When a run worked. ``started_at`` and ``last_result_at`` are ISO 8601, "" where there is none.

    ``seconds`` from the start to the last result (a job's end, a score); ``busy_seconds`` within it in which a
    process worked on the run; ``job_seconds`` of ended jobs at the provider, queues included, one after the other.
    """

    started_at: str
    last_result_at: str
    seconds: float
    busy_seconds: float
    job_seconds: float


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """Measurements of one model: ``ids`` (n,) of examples and their n ``scores``.

    ``replicate`` 0, or 1 where the same was measured again for its noise; ``checkpoint`` 0 for the member's final
    model, 1 for the last one before it, and so on.
    """

    member: int
    replicate: int
    checkpoint: int
    ids: Ids
    scores: Sequence[TokenScores]


@dataclass(frozen=True, slots=True, eq=False)
class TokenColumns:
    """Measurements of one model, stored end to end.

    ``ids`` (n,) examples, each once; ``counts`` (n,) tokens of each; ``logprobs`` (sum of counts,) in nats;
    ``censored`` (sum of counts,) bool, or None where no value is a bound.
    """

    ids: Ids
    counts: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    censored: NDArray[np.bool_] | None

    def starts(self) -> NDArray[np.int64]:
        """(n,) where each example's tokens begin."""
        return np.cumsum(self.counts, dtype=np.int64) - self.counts

    def scores(self) -> dict[int, TokenScores]:
        """The same by id, as the scorer gave it."""
        found = {}
        for i, start, count in zip(self.ids.tolist(), self.starts().tolist(), self.counts.tolist(), strict=True):
            part = slice(start, start + count)
            flags = () if self.censored is None else tuple(self.censored[part].tolist())
            found[i] = TokenScores(tuple(self.logprobs[part].tolist()), flags if any(flags) else ())
        return found


@dataclass(frozen=True, slots=True)
class Transition:
    """One line of the log of changes, for people; ISO 8601 in UTC."""

    time: str
    subject: str
    before: str
    after: str
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class LossRow:
    """What a complete model measured on the n examples of a group, one number each.

    ``loss`` (n,) sums over tokens (a mean for margins), a lower bound where ``censored`` (n,) says so (None: nowhere);
    ``counts`` (n,) tokens of each.
    """

    loss: NDArray[np.float64]
    counts: NDArray[np.int32]
    censored: NDArray[np.bool_] | None
