"""What a server says of a job, read without trusting that every field is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..refusals import NO_REASON


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's log. ``step`` of ``total_steps`` where the event tells of training steps."""

    message: str
    kind: str
    created_at: int
    step: int | None = None
    total_steps: int | None = None


def reason_of(error: object) -> str:
    """Text of a failed job's ``error``, which may be ``{}``, null or hold nulls only."""
    if isinstance(error, dict):
        parts = [str(error[name]) for name in ("code", "message", "param") if error.get(name)]
        if parts:
            return ": ".join(parts)
    return NO_REASON


def names_a_parameter(error: object) -> bool:
    """Whether a failed job names the parameter that was invalid (``training_file``, most often)."""
    return isinstance(error, dict) and isinstance(error.get("param"), str)


def event_of(item: dict[str, Any]) -> JobEvent:
    """A ``fine_tuning.job.event``."""
    raw = item.get("data")
    data: dict[str, Any] = raw if isinstance(raw, dict) else {}
    return JobEvent(
        message=str(item.get("message", "")),
        kind=str(item.get("type", "")),
        created_at=number(item.get("created_at")) or 0,
        step=number(data.get("step")),
        total_steps=number(data.get("total_steps")),
    )


def number(value: object) -> int | None:
    """A whole number, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
