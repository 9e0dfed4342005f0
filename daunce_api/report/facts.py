"""What a report says about a run beside its scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OtherGroup:
    """Another page of the same run: its address, and how many answers it explains by how many members."""

    address: str
    answers: int
    members: int


@dataclass(frozen=True, slots=True)
class QualityPoint:
    """self_lds of the first ``members`` members, with its 95 % interval."""

    members: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Plain facts of a run. Everything may be left out; what is unknown is not shown.

    Attributes:
        name: of the run.
        provider, model: who fine-tuned, and from which base model.
        started_at, finished_at: ISO 8601 times.
        members_asked, members_trained, members_failed: fine-tunes requested, that succeeded, that were given up.
        dollars: spent, in US dollars; None = unknown.
        training_tokens: as the provider counted them.
        scoring_tokens: prompts and completions of everything that was scored.
        seconds: from the start to the last result.
        job_seconds: what the fine-tuning jobs took, one after the other.
        warnings: one sentence each, shown at the top.
        failures: one sentence for each member that was given up.
        stopped: why the run ended before all members, if it did.
    """

    name: str = ""
    provider: str = ""
    model: str = ""
    started_at: str = ""
    finished_at: str = ""
    members_asked: int | None = None
    members_trained: int | None = None
    members_failed: int | None = None
    dollars: float | None = None
    training_tokens: int | None = None
    scoring_tokens: int | None = None
    seconds: float | None = None
    job_seconds: float | None = None
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    stopped: str = ""
