"""Fine-tuning jobs: submit, poll, retry, resume, cancel. Knows ``Trainer``, and no provider."""

from __future__ import annotations

from .events import CancelReport, CleanReport, Event, EventKind, OnEvent, TrainingOutcome
from .patience import Patience
from .training import OnReady, Orchestrator

__all__ = [
    "CancelReport",
    "CleanReport",
    "Event",
    "EventKind",
    "OnEvent",
    "OnReady",
    "Orchestrator",
    "Patience",
    "TrainingOutcome",
]
