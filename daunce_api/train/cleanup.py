"""Stop a run at the provider, and delete what it left there: a store and a trainer are all that this needs."""

from __future__ import annotations

from ..providers.base import JobStatus
from ..providers.calls import noted_in
from ..store import INTENT, JobRow
from .audit import report_unknown
from .client import CANCELLED, LOST, JobClient
from .events import CancelReport, CleanReport


async def cancel_jobs(client: JobClient) -> CancelReport:
    """Cancel every job that the store does not know to be final."""
    report = CancelReport()
    client.money.release_unsent()
    for row in client.store.jobs.rows():
        if row.status != INTENT and JobStatus(row.status).final:
            continue
        with noted_in(report.kept, row.key):
            await _cancel(client, row, report)
    with noted_in(report.kept, "the list of this run's jobs"):
        report.unknown = await report_unknown(client, cancel=True)
    return report


async def _cancel(client: JobClient, row: JobRow, report: CancelReport) -> None:
    job = await client.look_at(row)
    if job is None:
        # Never created, or deleted since; either way there is nothing to stop.
        client.store.jobs.state(row.key, JobStatus.CANCELLED, error=CANCELLED)
        if row.job_id is None:
            client.store.ledger.settle(row.key, 0.0)
        report.cancelled.append(row.key)
        return
    if row.job_id is None:
        client.store.jobs.submitted(row.key, job.id)
    if not job.status.final:
        job = await client.cancel(row.key, job.id)
    if not job.status.final:
        report.kept[row.key] = f"job {job.id} is still {job.status} after a request to cancel it"
        return
    error = CANCELLED if job.status is JobStatus.CANCELLED else job.error
    client.store.jobs.state(row.key, job.status, job.model, error, job.trained_tokens)
    (report.cancelled if job.status is JobStatus.CANCELLED else report.already_final).append(row.key)


async def clean_up(client: JobClient) -> CleanReport:
    """Cancel live jobs, then delete the models of all jobs and all training files of the run."""
    cancelled = await cancel_jobs(client)
    report = CleanReport(kept=dict(cancelled.kept), unknown=dict(cancelled.unknown))
    for row in client.store.jobs.rows():
        with noted_in(report.kept, row.model or row.key):
            await _delete_checkpoints(client, row, report)
            await _delete_model(client, row, report)
    for file in client.store.jobs.files():
        if file.state == "deleted":
            continue
        with noted_in(report.kept, file.file_id or file.name):
            file_id = file.file_id or await client.files.find(file.name, file.size)
            if file_id is not None and not await client.files.delete(file_id):
                report.kept[file_id] = f"the provider keeps the file {file.name}"
                continue
            client.store.jobs.file_deleted(file.sha256)
            if file_id is not None:
                report.files.append(file_id)
    return report


async def _delete_model(client: JobClient, row: JobRow, report: CleanReport) -> None:
    model = row.model
    if model is None and (row.error or "").startswith(LOST):
        job = await client.look_at(row)
        model = job.model if job is not None else None
    if model is None or row.model_deleted:
        return
    if await client.delete_model(model):
        client.store.jobs.model_deleted(row.key)
        report.models.append(model)
    else:
        report.kept[model] = "the provider keeps the model"


async def _delete_checkpoints(client: JobClient, row: JobRow, report: CleanReport) -> None:
    """Delete what a job left beside its final model: not every provider takes it away with that."""
    models = client.store.jobs.checkpoints(row.key) or ()
    if row.status == JobStatus.SUCCEEDED and not row.model_deleted:
        models = await client.checkpoints(row)
    for number, model in enumerate(reversed(models), start=1):
        if model is None:
            continue
        if await client.delete_model(model):
            client.store.jobs.checkpoint_gone(row.key, number, "cleaned up")
            report.models.append(model)
        else:
            report.kept[model] = "the provider keeps the model"
