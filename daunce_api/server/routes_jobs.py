"""``/v1/fine_tuning/jobs``."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import paging
from .api_errors import ApiError, invalid, not_found
from .nebius import CreateNebiusJob, nebius_job
from .requests import CreateJob, read_body
from .scheduler import Scheduler
from .service import Service
from .state import UNFINISHED, Row, new_id, now

ORGANIZATION = "org-daunce"


def job_object(row: Row) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job``."""
    hyperparameters = {
        "n_epochs": row["n_epochs"],
        "batch_size": row["batch_size"],
        "learning_rate_multiplier": row["learning_rate_multiplier"],
    }
    return {
        "id": row["id"],
        "object": "fine_tuning.job",
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
        "status": row["status"],
        "model": row["model"],
        "fine_tuned_model": row["fine_tuned_model"],
        "training_file": row["training_file"],
        "validation_file": None,
        "organization_id": ORGANIZATION,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": row["seed"],
        "trained_tokens": row["trained_tokens"],
        "result_files": [row["result_file"]] if row["result_file"] else [],
        "error": json.loads(row["error"]) if row["error"] else None,
        "estimated_finish": row["estimated_finish"],
        "integrations": [],
        "metadata": json.loads(row["metadata"]) if row["metadata"] else None,
        "user_provided_suffix": row["suffix"],
    }


def event_object(row: Row) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.event``."""
    return {
        "object": "fine_tuning.job.event",
        "id": row["id"],
        "created_at": row["created_at"],
        "level": row["level"],
        "message": row["message"],
        "type": row["type"],
        "data": json.loads(row["data"]),
    }


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


class JobRoutes:
    def __init__(self, service: Service, scheduler: Scheduler) -> None:
        self._service = service
        self._state = service.state
        self._scheduler = scheduler

    def _job(self, request: Request) -> Row:
        identity = request.path_params["job_id"]
        row = self._state.one("jobs", identity)
        if row is None or self._service.hidden("job", identity):
            raise not_found("fine-tuning job", identity, "fine_tuning_job_id")
        return row

    async def create(self, request: Request) -> Response:
        body: CreateJob | CreateNebiusJob
        if self._service.settings.dialect == "nebius":
            body = await read_body(request, CreateNebiusJob)
        else:
            body = await read_body(request, CreateJob)
        self._service.served(body.model)
        row = self._state.file(body.training_file)
        if row is None or self._service.hidden("file", body.training_file):
            raise invalid(
                f"invalid training_file: {body.training_file[:200]}",
                param="training_file",
                code="invalid_training_file",
            )
        if row["purpose"] != "fine-tune":
            raise invalid("The training file must have purpose 'fine-tune'.", param="training_file")
        epochs, batch, rate = body.chosen_hyperparameters().resolved()
        injector = self._service.injector
        if injector is not None and not injector.accept_job():
            raise ApiError(
                429,
                "This fine-tune request has been rejected because your organization exceeded its daily limit of "
                "fine-tuning jobs. Try again tomorrow.",
                code="daily_rate_limit_exceeded",
            )
        job = new_id("ftjob")
        fault = injector.job_fault(self._state.job_count() + 1) if injector is not None else None
        with self._state.transaction():
            self._state.insert(
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
                fault=fault,
            )
            self._state.event(job, f"Created fine-tuning job: {job}")
            self._state.event(job, f"Validating training file: {body.training_file}")
        self._service.born(job)
        self._scheduler.add(job)
        return self._answer(job)

    async def listing(self, request: Request) -> Response:
        where, values = paging.metadata_filter(request)
        page = self._state.page(
            "jobs",
            where=where,
            parameters=values,
            after=paging.after(request),
            limit=paging.integer(request, "limit", 20, 100),
        )
        rows, more = paging.found(page)
        data = [self._object(r) for r in rows if not self._service.hidden("job", r["id"], listed=True)]
        return JSONResponse({"object": "list", "data": data, "has_more": more})

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(self._object(self._job(request)))

    async def cancel(self, request: Request) -> Response:
        """A job that was cancelled before is returned as it is; one that has ended otherwise is a 400."""
        row = self._job(request)
        if row["status"] in UNFINISHED:
            await self._scheduler.cancel(row["id"])
        elif row["status"] != "cancelled":
            raise invalid(f"Job has already completed: {row['id']} is {row['status']}.")
        return self._answer(row["id"])

    async def events(self, request: Request) -> Response:
        row = self._job(request)
        rows, more = self._page(request, "events", row["id"], "job=?", 20)
        return JSONResponse({"object": "list", "data": [event_object(r) for r in rows], "has_more": more})

    async def checkpoints(self, request: Request) -> Response:
        row = self._job(request)
        rows, more = self._page(request, "models", row["id"], "job=? AND step IS NOT NULL", 10)
        return JSONResponse(
            {
                "object": "list",
                "data": [checkpoint_object(r) for r in rows],
                "first_id": rows[0]["checkpoint_id"] if rows else None,
                "last_id": rows[-1]["checkpoint_id"] if rows else None,
                "has_more": more,
            }
        )

    def _page(self, request: Request, table: Any, job: str, where: str, default: int) -> tuple[list[Row], bool]:
        limit = paging.integer(request, "limit", default, 1000)
        page = self._state.page(table, where=where, parameters=[job], after=paging.after(request), limit=limit)
        return paging.found(page)

    def _answer(self, job: str) -> Response:
        row = self._state.one("jobs", job)
        if row is None:
            raise not_found("fine-tuning job", job, "fine_tuning_job_id")
        return JSONResponse(self._object(row))

    def _object(self, row: Row) -> dict[str, Any]:
        job = job_object(row)
        return nebius_job(job) if self._service.settings.dialect == "nebius" else job


def _suffix(given: str | None) -> str | None:
    """The suffix as it stands in a model's name: what could break the name's colons or a path becomes ``-``."""
    if given is None:
        return None
    return re.sub(r"[^a-z0-9._-]+", "-", given.lower()) or None
