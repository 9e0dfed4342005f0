"""The provider's list of this run's jobs, compared with what the store knows.

A job that the store does not know means that the run folder is a copy of a run that went further, or lost what was
stored last: nothing may be submitted then. A second job of a known attempt is an orphan of an answer that was lost for
longer than the grace period: it is named, cancelled if it is still alive, and counted in the ledger.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

from ..errors import ProviderError, RejectedError, UnknownJobsError
from ..providers.base import Job, JobRequest, JobStatus
from ..providers.identity import contradiction
from ..store import INTENT, JobRow
from .client import LOST, JobClient
from .events import Event, EventKind

Adopt = Callable[[int, str, str], Awaitable[JobRequest | None]]
_KEY = re.compile(r"-m(-?\d+)-a(\d+)$")


@dataclass(frozen=True, slots=True)
class Audit:
    """``unknown``: jobs of this run that its store does not know. ``orphans``: jobs of attempts that it knows, which
    are not (or no longer) the ones that it uses. ``unseen``: attempts that were sent more often than the list shows
    jobs of them, so that there may be another one."""

    unknown: list[Job] = field(default_factory=list)
    orphans: list[tuple[JobRow, Job]] = field(default_factory=list)
    unseen: list[JobRow] = field(default_factory=list)


async def audit(client: JobClient) -> Audit:
    """Compare, once. Empty where the provider cannot list a run's jobs, and in a replay."""
    store, listed = client.store, None if client.replaying else await client.listed()
    if listed is None:
        return Audit()
    rows = {row.key: row for row in store.jobs.rows()}  # read after the list: what was submitted meanwhile is known
    by_key: dict[str, list[Job]] = defaultdict(list)
    for job in {job.id: job for job in listed}.values():
        by_key[job.echo.key or ""].append(job)
    result = Audit(unseen=[row for row in rows.values() if client.sends(row.key) > max(1, len(by_key[row.key]))])
    for key, jobs in by_key.items():
        row = rows.get(key)
        if row is None:
            result.unknown.extend(jobs)
            continue
        others = [job for job in jobs if job.id != row.job_id or (row.error or "").startswith(LOST)]
        if row.status == INTENT:
            others = []  # its submit is under way, or is looked up before it is sent again
        sends = client.sends(key)
        if len(jobs) > sends:  # more jobs than this folder ever sent: another copy of it sent the rest
            result.unknown.extend(job for job in others if job.id != row.job_id)
        else:
            result.orphans.extend((row, job) for job in others)
    return result


async def check(client: JobClient, *, adopt: Adopt | None = None) -> None:
    """Before anything is submitted: deal with orphans, and stop where there are unknown jobs.

    ``adopt`` makes the request that a job of a member must have been submitted with, from the training file that the
    job names (None where that is not the member's); with it unknown jobs are taken over. Raises UnknownJobsError.
    """
    found = await audit(client)
    for row, job in found.orphans:
        await end_orphan(client, row, job)
    unknown = found.unknown
    if adopt is not None:
        unknown = [job for job in unknown if not await _adopt(client, job, adopt)]
    if unknown:
        shown = "\n".join(f"  {job.id} ({job.echo.key}): {job.status}" for job in unknown[:20])
        raise UnknownJobsError(
            f"{client.trainer.capabilities.provider} has {len(unknown)} job{'s' * (len(unknown) != 1)} of the run "
            f"{client.store.run_key} that this run folder does not know:\n{shown}\nThe folder is a copy of a run that "
            "went further, or lost what was stored last. Nothing was submitted, and everything is kept. Go on in the "
            "folder that knows them, or take them over here with `daunce run CONFIG --adopt`; `daunce cancel` stops "
            "them.",
            [job.id for job in unknown],
        )


async def say_unseen(client: JobClient) -> None:
    """At the end of a run: name the attempts of which the provider may still show another job."""
    for row in (await audit(client)).unseen:
        text = (
            f"{row.key} was sent {client.sends(row.key)} times, and the provider's list does not show as many jobs: "
            "another one may exist. `daunce cancel` and `daunce clean` name it once it is listed."
        )
        client.store.note("may exist", text)
        client.emit(Event(EventKind.ORPHAN, text, row.member, row.attempt))


async def end_orphan(client: JobClient, row: JobRow, job: Job) -> str:
    """Name a second job of an attempt, cancel it if it is alive, and book it; what was done, in words."""
    store, subject = client.store, row.key if job.id == row.job_id else f"{row.key} orphan {job.id}"
    state = str(job.status)
    if not job.status.final:
        try:
            job = await client.cancel(row.key, job.id)
            state = "cancelled" if job.status is JobStatus.CANCELLED else f"{job.status} after a request to cancel it"
        except RejectedError as error:
            state = f"{job.status}, and not cancelled ({error})"
    known = store.get_value(f"orphan {job.id}")
    if known == state:
        return state
    client.money.book(subject, row.member, job.trained_tokens)
    store.set_value(f"orphan {job.id}", state)
    lost = "was taken for lost" if job.id == row.job_id else f"is not the one of {row.key} that this run uses"
    text = f"job {job.id} ({row.key}) {lost}: {state}"
    client.emit(Event(EventKind.ORPHAN, text, row.member, row.attempt, job))
    return state


async def report_unknown(client: JobClient, *, cancel: bool) -> dict[str, str]:
    """What this run has at the provider and its store does not use, by job id; cancelled where that is wanted."""
    report: dict[str, str] = {}
    found = await audit(client)
    for row, job in found.orphans:
        report[job.id] = f"second job of {row.key}: {await end_orphan(client, row, job)}"
    for job in found.unknown:
        state = str(job.status)
        if cancel and not job.status.final:
            try:
                state = str((await client.cancel(job.echo.key or job.id, job.id)).status)
            except ProviderError as error:
                state = f"{state}, and not cancelled ({error})"
        report[job.id] = f"{job.echo.key} is not known to this run folder: {state}"
    return report


async def _adopt(client: JobClient, job: Job, request_for: Adopt) -> bool:
    """Take an unknown job over as the attempt that its key names; False where it cannot be this run's."""
    key = job.echo.key or ""
    match = _KEY.search(key)
    if match is None or job.echo.file_id is None:
        return False
    member, attempt = int(match.group(1)), int(match.group(2))
    store = client.store
    if any(row.attempt == attempt for row in store.jobs.rows(member)):
        return False
    request = await request_for(member, key, job.echo.file_id)
    if request is None or contradiction(request, job, client.trainer.capabilities.echoes) is not None:
        return False
    client.money.reserve(key, member)
    store.jobs.intent(key, member, attempt, json.dumps(asdict(request)))
    store.jobs.submitted(key, job.id)
    client.emit(Event(EventKind.ADOPTED, f"job {job.id} is taken over as {key}", member, attempt, job))
    return True
