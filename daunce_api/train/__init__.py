"""Fine-tuning jobs: submit, poll, retry, resume, cancel. Knows ``Trainer``, and no provider."""

from __future__ import annotations

from .events import CancelReport, CleanReport, Event, EventKind, OnEvent, TrainingOutcome
from .policy import JOB_RETRIES, PollPolicy
from .training import OnReady, Orchestrator

__all__ = [
    "JOB_RETRIES",
    "CancelReport",
    "CleanReport",
    "Event",
    "EventKind",
    "OnEvent",
    "OnReady",
    "Orchestrator",
    "PollPolicy",
    "TrainingOutcome",
]
