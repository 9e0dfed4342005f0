"""Which jobs are trained together: groups of a fixed size, cut in the order in which the jobs were submitted.

The size follows from the config and the number of workers, never from what happens to wait, so that the same run gives
the same groups, and with them the same numbers to the last bit. Small groups also bring their results early, and lose
little where a process dies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from ...config import RunConfig
from ..base import JobStatus
from .jobs import JobRecord
from .options import LocalOptions


def group_size(config: RunConfig, options: LocalOptions, usual: int, *, workers: int, jobs_at_once: int) -> int:
    """Members of a group: ``members_at_a_time``, or ``usual`` and fewer where that leaves workers without any; never
    more than the ``jobs_at_once`` that can wait together."""
    even = -(-min(config.ensemble.members, jobs_at_once) // max(1, workers))
    return min(options.members_at_a_time or min(usual, even), jobs_at_once)


def groups_of(
    jobs: Mapping[str, JobRecord], size: int, *, base: str, target_is_trained: bool, partial: bool
) -> Iterator[list[JobRecord]]:
    """Queued jobs in groups: first the groups that were interrupted, whole, so that they give the same numbers; then
    full groups of jobs that agree in all but subset and seed, in the order of their submission; then, with
    ``partial``, what is left. Where members start from a target, it is a group of its own."""
    queued = sorted((r for r in jobs.values() if r.status == JobStatus.QUEUED), key=lambda r: (r.number, r.id))
    again = dict.fromkeys(r.group for r in queued if r.group)
    for group in again:
        yield [jobs[name] for name in group if name in jobs]
    alike: dict[str, list[JobRecord]] = {}
    for record in queued:
        if not record.group:
            alike.setdefault(json.dumps([record.model, dict(record.hyperparameters)], sort_keys=True), []).append(
                record
            )
    full: list[list[JobRecord]] = []
    rest: list[list[JobRecord]] = []
    for records in alike.values():
        own = 1 if target_is_trained and records[0].model == base else size
        for part in _cut(records, own):
            (full if len(part) == own else rest).append(part)
    yield from sorted(full, key=lambda part: part[0].number)
    if partial:
        yield from rest


def _cut(records: Sequence[JobRecord], size: int) -> Iterator[list[JobRecord]]:
    for first in range(0, len(records), size):
        yield list(records[first : first + size])
