"""Stopping a run at the provider, and taking away what it left there."""

from __future__ import annotations

from ..errors import ProviderError, StopError
from ..providers.base import JobStatus
from ..store import INTENT, JobRow
from .events import CancelReport, CleanReport
from .jobs import CANCELLED, LOST, Desk


async def cancel_jobs(desk: Desk) -> CancelReport:
    """Cancel every job that the store does not know to be final."""
    report = CancelReport()
    desk.release_unsent()
    for row in desk.store.jobs.rows():
        if row.status != INTENT and JobStatus(row.status).final:
            continue
        try:
            await _cancel(desk, row, report)
        except StopError:
            raise
        except ProviderError as error:
            report.kept[row.key] = str(error)
    return report


async def _cancel(desk: Desk, row: JobRow, report: CancelReport) -> None:
    job = await desk.look_at(row)
    if job is None:
        # Never created, or deleted since; either way there is nothing to stop.
        desk.store.jobs.state(row.key, JobStatus.CANCELLED, error=CANCELLED)
        if row.job_id is None:
            desk.store.ledger.settle(row.key, 0.0)
        report.cancelled.append(row.key)
        return
    if row.job_id is None:
        desk.store.jobs.submitted(row.key, job.id)
    if not job.status.final:
        job = await desk.cancel(row.key, job.id)
    if not job.status.final:
        report.kept[row.key] = f"job {job.id} is still {job.status} after a request to cancel it"
        return
    error = CANCELLED if job.status is JobStatus.CANCELLED else job.error
    desk.store.jobs.state(row.key, job.status, job.model, error, job.trained_tokens)
    (report.cancelled if job.status is JobStatus.CANCELLED else report.already_final).append(row.key)


async def clean_up(desk: Desk) -> CleanReport:
    """Cancel live jobs, then delete the models of all jobs and all training files of the run."""
    report = CleanReport()
    report.kept.update((await cancel_jobs(desk)).kept)
    for row in desk.store.jobs.rows():
        try:
            await _delete_checkpoints(desk, row, report)
            await _delete_model(desk, row, report)
        except StopError:
            raise
        except ProviderError as error:
            report.kept[row.model or row.key] = str(error)
    for file in desk.store.jobs.files():
        if file.state == "deleted":
            continue
        try:
            file_id = file.file_id or await desk.find_file(file.name, file.size)
            if file_id is not None and not await desk.delete_file(file_id):
                report.kept[file_id] = f"the provider keeps the file {file.name}"
                continue
            desk.store.jobs.file_deleted(file.sha256)
            if file_id is not None:
                report.files.append(file_id)
        except StopError:
            raise
        except ProviderError as error:
            report.kept[file.file_id or file.name] = str(error)
    return report


async def _delete_model(desk: Desk, row: JobRow, report: CleanReport) -> None:
    model = row.model
    if model is None and (row.error or "").startswith(LOST):
        job = await desk.look_at(row)
        model = job.model if job is not None else None
    if model is None or row.model_deleted:
        return
    if await desk.delete_model(model):
        desk.store.jobs.model_deleted(row.key)
        report.models.append(model)
    else:
        report.kept[model] = "the provider keeps the model"


async def _delete_checkpoints(desk: Desk, row: JobRow, report: CleanReport) -> None:
    """Delete what a job left beside its final model: not every provider takes it away with that."""
    models = desk.store.jobs.checkpoints(row.key) or ()
    if row.status == JobStatus.SUCCEEDED and not row.model_deleted:
        models = await desk.checkpoints(row)
    for number, model in enumerate(reversed(models), start=1):
        if model is None:
            continue
        if await desk.delete_model(model):
            desk.store.jobs.checkpoint_gone(row.key, number, "cleaned up")
            report.models.append(model)
        else:
            report.kept[model] = "the provider keeps the model"
