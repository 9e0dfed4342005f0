"""``/v1/fine_tuning/jobs``."""

from __future__ import annotations

import json
import re
import secrets
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_errors import ApiError, invalid, not_found
from .nebius import CreateNebiusJob, nebius_job
from .paging import metadata_filter, page
from .requests import CreateJob, read_body
from .service import Service
from .state import UNFINISHED, Row, new_id, now

ORGANIZATION = "org-daunce"


def job_object(service: Service, row: Row) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job``."""
    hyperparameters = {name: row[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    names = ("id", "status", "created_at", "finished_at", "estimated_finish", "model", "fine_tuned_model")
    job = {name: row[name] for name in (*names, "training_file", "trained_tokens", "seed")} | {
        "object": "fine_tuning.job",
        "error": json.loads(row["error"]) if row["error"] else None,
        "organization_id": ORGANIZATION,
        "validation_file": None,
        "result_files": [row["result_file"]] if row["result_file"] else [],
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "integrations": [],
        "metadata": json.loads(row["metadata"]) if row["metadata"] else None,
        "user_provided_suffix": row["suffix"],
    }
    return nebius_job(job) if service.settings.dialect == "nebius" else job


def event_object(row: Row) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.event``."""
    kept = {name: row[name] for name in ("id", "created_at", "level", "message", "type")}
    return {**kept, "object": "fine_tuning.job.event", "data": json.loads(row["data"])}


def checkpoint_object(row: Row) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.checkpoint``; ``train_loss`` is that of the last batch."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": row["checkpoint_id"],
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["id"],
        "fine_tuning_job_id": row["job"],
        "step_number": row["step"],
        "metrics": {"step": row["step"], "train_loss": row["train_loss"]},
    }


async def create(service: Service, request: Request) -> Response:
    body: CreateJob | CreateNebiusJob
    if service.settings.dialect == "nebius":
        body = await read_body(request, CreateNebiusJob)
    else:
        body = await read_body(request, CreateJob)
    service.served(body.model)
    file = service.file(body.training_file)
    if file is None:
        message = f"invalid training_file: {body.training_file[:200]}"
        raise invalid(message, param="training_file", code="invalid_training_file")
    if file["purpose"] != "fine-tune":
        raise invalid("The training file must have purpose 'fine-tune'.", param="training_file")
    epochs, batch, rate = body.chosen_hyperparameters().resolved()
    state, injector = service.state, service.injector
    if not injector.accept_job():
        message = (
            "This fine-tune request has been rejected because your organization exceeded its daily limit of "
            "fine-tuning jobs. Try again tomorrow."
        )
        raise ApiError(429, message, code="daily_rate_limit_exceeded")
    job = new_id("ftjob")
    with state.transaction():
        state.insert(
            "jobs",
            id=job,
            created_at=now(),
            status="validating_files",
            model=body.model,
            training_file=body.training_file,
            n_epochs=epochs,
            batch_size=batch,
            learning_rate_multiplier=rate,
            seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
            suffix=_suffix(body.suffix),
            metadata=json.dumps(body.metadata) if body.metadata is not None else None,
            fault=injector.job_fault(state.rows("SELECT COUNT(*) AS jobs FROM jobs")[0]["jobs"] + 1),
        )
        state.event(job, f"Created fine-tuning job: {job}")
        state.event(job, f"Validating training file: {body.training_file}")
    service.injector.born(job)
    service.scheduler.add(job)
    return JSONResponse(job_object(service, state.job(job)))


async def listing(service: Service, request: Request) -> Response:
    where, values = metadata_filter(request)
    view = partial(job_object, service)
    return page(service, request, "jobs", view, where=where, values=values, kind="job")


async def retrieve(service: Service, request: Request) -> Response:
    return JSONResponse(job_object(service, _job(service, request)))


async def cancel(service: Service, request: Request) -> Response:
    """A job that was cancelled before is returned as it is; one that has ended otherwise is a 400."""
    row = _job(service, request)
    if row["status"] in UNFINISHED:
        service.scheduler.cancel(row)
    elif row["status"] != "cancelled":
        raise invalid(f"Job has already completed: {row['id']} is {row['status']}.")
    return JSONResponse(job_object(service, service.state.job(row["id"])))


async def events(service: Service, request: Request) -> Response:
    job = _job(service, request)["id"]
    return page(service, request, "events", event_object, where="job=?", values=[job], largest=1000)


async def checkpoints(service: Service, request: Request) -> Response:
    where, job = "job=? AND step IS NOT NULL", _job(service, request)["id"]
    return page(service, request, "models", checkpoint_object, where=where, values=[job], usual=10, largest=1000)


def _job(service: Service, request: Request) -> Row:
    identity = request.path_params["job_id"]
    row = service.state.one("jobs", identity)
    if row is None or service.injector.hidden("job", identity):
        raise not_found("fine-tuning job", identity, "fine_tuning_job_id")
    return row


def _suffix(given: str | None) -> str | None:
    """The suffix as it stands in a model's name: what could break the name's colons or a path becomes ``-``."""
    return None if given is None else re.sub(r"[^a-z0-9._-]+", "-", given.lower()) or None
