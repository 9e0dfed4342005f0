"""Whose answer is it? A job as the provider shows it, compared with the request that it must belong to.

An answer may refine what was requested, but not contradict it:

    key, file_id       exactly equal
    seed               equal as a number
    model              equal, or without its organization prefix, or a snapshot of the requested alias
    hyperparameters    equal as numbers; ``auto`` in the request or the answer, and what was not requested, say nothing

A field that the provider leaves out says nothing either; which fields it fills in stands in its
``TrainerCapabilities.echoes``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from .base import EchoField, Job, JobRequest

MOST_TOKENS = 2**53
"""Counts above this are not taken for counts: no job trains that many tokens, and floats lose their last digits."""

_SNAPSHOT = re.compile(r"[-@:](?:\d[\d.\-]*|latest|v\d[\w.\-]*|[0-9a-f]{7,40})")


def contradiction(request: JobRequest, job: Job, fields: Collection[EchoField]) -> str | None:
    """What a job says that its request did not: one clause for people, None where the job may be the request's.

    Example:
        >>> from daunce_api.providers.base import JobEcho, JobStatus
        >>> request = JobRequest("r-m0-a1", "gpt-4o-mini", "file-1", 7, {"n_epochs": "auto"}, "r-m0-a1")
        >>> echo = JobEcho("r-m0-a1", "file-1", "gpt-4o-mini-2024-07-18", 7, {"n_epochs": 3})
        >>> fields = ("key", "file_id", "model", "seed", "hyperparameters")
        >>> contradiction(request, Job("j", JobStatus.QUEUED, echo=echo), fields)
        >>> contradiction(request, Job("j", JobStatus.QUEUED, echo=JobEcho(file_id="file-2")), fields)
        "training file 'file-2' instead of 'file-1'"
    """
    echo = job.echo
    pairs: list[tuple[EchoField, str, object, object, bool]] = [
        ("key", "key", request.key, echo.key, echo.key == request.key),
        ("file_id", "training file", request.file_id, echo.file_id, echo.file_id == request.file_id),
        ("seed", "seed", request.seed, echo.seed, echo.seed == request.seed),
        ("model", "base model", request.model, echo.model, echo.model is None or refines(request.model, echo.model)),
    ]
    for field, name, wanted, shown, equal in pairs:
        if field in fields and shown is not None and not equal:
            return f"{name} {shown!r} instead of {wanted!r}"
    if "hyperparameters" in fields and echo.hyperparameters is not None:
        for name, value in request.hyperparameters.items():
            other = echo.hyperparameters.get(name)
            if other is not None and not _same_setting(value, other):
                return f"{name} {other!r} instead of {value!r}"
    return None


def refines(requested: str, shown: str) -> bool:
    """Whether a model name is the requested one, said more exactly.

    Example:
        >>> refines("gpt-4.1", "gpt-4.1-2025-04-14"), refines("gpt-4.1", "gpt-4.1-mini-2025-04-14")
        (True, False)
        >>> refines("Qwen3-8B", "Qwen/Qwen3-8B"), refines("ft:gpt-4.1-2025-04-14:org::x", "gpt-4.1-2025-04-14")
        (True, True)
    """
    if requested.startswith("ft:") and not shown.startswith("ft:"):  # a fine-tune, shown by the model under it
        requested = requested.split(":")[1]
    (owner, _, wanted), (shown_owner, _, name) = requested.rpartition("/"), shown.rpartition("/")
    if owner and shown_owner and not f"/{owner}".endswith(f"/{shown_owner}"):
        return False
    rest = name.removeprefix(wanted)
    return name.startswith(wanted) and (not rest or _SNAPSHOT.fullmatch(rest) is not None)


def count(value: object) -> int | None:
    """A number of things as a provider reports it; None for anything that is not a possible count.

    Example:
        >>> count(12), count(0), count(-5), count(2**63), count(True), count("12")
        (12, 0, None, None, None, None)
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_TOKENS:
        return None
    return value


def _same_setting(value: object, other: object) -> bool:
    if "auto" in (value, other):
        return True
    try:
        return math.isclose(float(value), float(other), rel_tol=1e-5)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value) == str(other)
