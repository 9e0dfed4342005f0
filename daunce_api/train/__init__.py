"""Fine-tuning jobs: which members need one, and exactly one an attempt. Knows ``Trainer``, and no provider."""

from __future__ import annotations

from .cleanup import cancel_jobs, clean_up
from .client import JobClient
from .events import CancelReport, CleanReport, Event, EventKind, OnEvent, TrainingOutcome
from .patient import JOB_RETRIES, PollPolicy
from .training import OnReady, Training

__all__ = [
    "JOB_RETRIES",
    "CancelReport",
    "CleanReport",
    "Event",
    "EventKind",
    "JobClient",
    "OnEvent",
    "OnReady",
    "PollPolicy",
    "Training",
    "TrainingOutcome",
    "cancel_jobs",
    "clean_up",
]
