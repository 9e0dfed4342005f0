"""What a run has used so far: tokens, money and time, from its store alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from .data.tokenizers import EncodedExample
from .store import FINAL, INTENT, RunStore, Transition


@dataclass(frozen=True)
class Usage:
    """Tokens, money and time of a run.

    Attributes:
        trained_tokens: as the provider counted them, the target model included.
        scored_tokens: of prompts and completions, over all models and repeated measurements that are kept.
        usd: reserved and settled; None where a price of the run is not known.
        started_at, finished_at: first and last change, ISO 8601; deleting remote models later is none. "" without any.
        seconds: between the two, breaks between executions included.
        job_seconds: time that final jobs spent at the provider, queues included, one after the other.
    """

    trained_tokens: int
    scored_tokens: int
    usd: float | None
    started_at: str
    finished_at: str
    seconds: float
    job_seconds: float


def usage_of(store: RunStore, examples: Sequence[EncodedExample], *, priced: bool) -> Usage:
    """Read what a run has used; ``examples`` are all that its models are asked about, ``priced`` whether every price of
    the run is known."""
    # What is deleted later is no result: a file says so in its state, a model in a job whose state stays.
    changes = [t for t in store.transitions() if t.after not in ("deleted", t.before)]
    started, finished = (changes[0].time, changes[-1].time) if changes else ("", "")
    return Usage(
        trained_tokens=sum(job.trained_tokens or 0 for job in store.jobs.rows()),
        scored_tokens=store.scores.tokens_scored(examples),
        usd=store.ledger.spent() if priced else None,
        started_at=started,
        finished_at=finished,
        seconds=_between(started, finished) if changes else 0.0,
        job_seconds=_job_seconds(changes),
    )


def _job_seconds(changes: Sequence[Transition]) -> float:
    total = 0.0
    begun: dict[str, str] = {}
    for change in changes:
        if not change.subject.startswith("job "):
            continue
        if change.after in FINAL:
            if change.subject in begun:
                total += _between(begun.pop(change.subject), change.time)
        elif change.after != INTENT:
            begun.setdefault(change.subject, change.time)
    return total


def _between(one: str, other: str) -> float:
    return (datetime.fromisoformat(other) - datetime.fromisoformat(one)).total_seconds()
