"""Fine-tuning jobs: which members need one, and exactly one an attempt. Knows ``Trainer``, and no provider."""

from __future__ import annotations

from .cleanup import cancel_jobs, clean_up
from .client import JobClient
from .events import CancelReport, CleanReport, Event, EventKind, OnEvent
from .training import Training

__all__ = [
    "CancelReport",
    "CleanReport",
    "Event",
    "EventKind",
    "JobClient",
    "OnEvent",
    "Training",
    "cancel_jobs",
    "clean_up",
]
