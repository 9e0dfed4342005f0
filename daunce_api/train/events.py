"""What training reports while it works, and when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from ..providers.base import Job


class EventKind(StrEnum):
    """What happened."""

    UPLOADED = "uploaded"
    SUBMITTED = "submitted"
    FOUND = "found"
    STATE = "state"
    READY = "ready"
    FAILED = "failed"
    LEFT_OUT = "left_out"
    FEWER_MODELS = "fewer_models"
    OTHER_TOKENS = "other_tokens"
    WAITING = "waiting"
    NOT_YET = "not_yet"
    ORPHAN = "orphan"
    ADOPTED = "adopted"
    NOT_CHECKED = "not_checked"
    PARKED = "parked"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``member`` is -1 for the target model, None where it concerns the whole run.

    ``message`` is one plain sentence; it may quote a provider, so it is untrusted text.
    """

    kind: EventKind
    message: str
    member: int | None = None
    attempt: int | None = None
    job: Job | None = None


OnEvent = Callable[[Event], None]


@dataclass(slots=True)
class CancelReport:
    """What :func:`cancel_jobs` did, by job key. ``kept`` says why a job could not be cancelled. ``unknown``: jobs of
    this run that its folder does not know, by id, with what became of them."""

    cancelled: list[str] = field(default_factory=list)
    already_final: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class CleanReport:
    """What :func:`clean_up` deleted; ``kept`` names what it could not and why. ``unloaded``: models that an interrupted
    run had left on the scoring server, and that were unloaded. ``unknown``: as in :class:`CancelReport`."""

    models: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
