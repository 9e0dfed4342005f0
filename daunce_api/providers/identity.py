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
from collections.abc import Collection, Iterable

from .base import EchoField, Job, JobRequest, mark_of

MOST_TOKENS = 2**53
"""Counts above this are not taken for counts: no job trains that many tokens, and floats lose their last digits."""

MOST_ATTEMPTS = 100
_MARKED = re.compile(r"(?:^|[-:])([0-9a-f]{3,64})-(target|m\d+)-([0-9a-f]{20})(?=$|[-:])")
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


def key_in(names: Iterable[object]) -> str | None:
    """The key of the job that has one of these names, which :meth:`JobRequest.marked_suffix` made a part of them; None
    where none of them holds one.

    Example:
        >>> request = JobRequest("abc123-m7-a2", "base", "file-1", 7, {}, "poems-abc123-m7")
        >>> key_in([None, "owner/base-8b-" + request.marked_suffix(40)]), key_in(["poems-abc123-m7"])
        ('abc123-m7-a2', None)
    """
    for match in (m for name in names if isinstance(name, str) for m in _MARKED.finditer(name)):
        member = "m-1" if match[2] == "target" else match[2]
        for attempt in range(1, MOST_ATTEMPTS):
            key = f"{match[1]}-{member}-a{attempt}"
            if mark_of(key) == match[3]:
                return key
    return None


def of_run(key: str | None, run_key: str) -> bool:
    """Whether a job's key is one of this run's.

    Example:
        >>> of_run("abc123-m7-a2", "abc123"), of_run("abc1234-m7-a2", "abc123"), of_run(None, "abc123")
        (True, False, False)
    """
    return key is not None and key.partition("-")[0] == run_key


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
