"""Jobs on Tinker's wire: what a loop's record says of one, and what a training run at the service does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ..base import Job, JobEcho, JobStatus
from .loops import LoopRecord
from .paths import FINAL, listed_name, path_of
from .service import Service

KEY_FIELD, FILE_FIELD, SEQUENCE_FIELD = "daunce_key", "daunce_file", "daunce_seq"
"""In the metadata of a training run."""
_PAGE = 100


async def training_runs(service: Service, doing: str) -> list[Any]:
    """Every training run that the service lists."""
    rest = await service.rest()
    found: list[Any] = []
    offset, total = 0, 1
    while offset < total:
        page = await service.start(partial(rest.list_training_runs, limit=_PAGE, offset=offset), doing=doing)
        found += page.training_runs
        total = page.cursor.total_count
        offset += _PAGE
    return found


_INTERRUPTED = "its training loop ended with the process that ran it"


def left(record: LoopRecord) -> Job:
    """A job that no loop of this process works on, by its record."""
    job = Job(record.job_id, JobStatus.CANCELLED, echo=record.echo)
    if record.final is not None:
        return replace(job, status=JobStatus.SUCCEEDED, model=record.final, trained_tokens=record.tokens, progress=1.0)
    if record.cancelled:
        return job
    return replace(job, status=JobStatus.FAILED, error=f"{_INTERRUPTED}, before its first epoch was saved")


def ended(run: Any) -> Job:
    """A training run that no loop of this process works on and no record knows."""
    run_id, checkpoint = str(run.training_run_id), run.last_sampler_checkpoint
    echo = JobEcho(key=key_of(run), file_id=(run.user_metadata or {}).get(FILE_FIELD))
    if checkpoint is not None and listed_name(checkpoint) == FINAL:
        return Job(run_id, JobStatus.SUCCEEDED, model=path_of(run_id, "sampler_weights", FINAL), echo=echo)
    return Job(run_id, JobStatus.FAILED, error=_INTERRUPTED, echo=echo)


def key_of(run: Any) -> str | None:
    """The key that a training run carries in its metadata."""
    key: str | None = (run.user_metadata or {}).get(KEY_FIELD)
    return key
