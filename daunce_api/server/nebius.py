"""``--dialect nebius``: what Nebius Token Factory's documentation says where it differs from OpenAI's format.

A job has no metadata and names no model when it succeeds; its checkpoints do not answer by themselves. A checkpoint
becomes a model by ``POST /v0/models {name, base_model, source: "JOB:CHECKPOINT"}``. Hyperparameters have the service's
own names. Source: docs.tokenfactory.nebius.com, API reference of 6 May 2026.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..providers.server_settings import BASE_LEARNING_RATE
from .api_errors import invalid, model_not_found
from .requests import Bool, Int, NewJob, Number, Str, StrictBody, read_body
from .service import Service
from .state import Row, now

_UNKNOWN = ("fine_tuned_model", "metadata", "user_provided_suffix", "method")


def nebius_job(job: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's job object as Nebius answers it."""
    kept = {name: value for name, value in job.items() if name not in _UNKNOWN}
    return {**kept, "suffix": job["user_provided_suffix"]}


class NebiusHyperparameters(StrictBody):
    """Nebius's names and defaults. This server trains LoRA on unpacked examples alone, and refuses the rest."""

    n_epochs: Annotated[Int, Field(ge=1, le=50)] = 3
    batch_size: Annotated[Int, Field(ge=1, le=256)] = 8
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-5
    lora: Bool = False
    packing: Bool = True
    lora_r: Int | None = None
    lora_alpha: Int | None = None
    lora_dropout: Number | None = None
    warmup_ratio: Number | None = None
    weight_decay: Number | None = None
    max_grad_norm: Number | None = None
    context_length: Int | None = None

    def resolved(self) -> tuple[int, int, float]:
        """(epochs, batch size, multiplier). Raises ApiError for what this server does not train."""
        if not self.lora:
            raise invalid("This server trains LoRA only: send lora: true.", param="hyperparameters.lora")
        if self.packing:
            raise invalid("This server does not pack examples: send packing: false.", param="hyperparameters.packing")
        return self.n_epochs, self.batch_size, self.learning_rate / BASE_LEARNING_RATE


class CreateNebiusJob(NewJob):
    """``POST /v1/fine_tuning/jobs`` without OpenAI's metadata and method."""

    hyperparameters: NebiusHyperparameters = Field(default_factory=NebiusHyperparameters)
    tags: Str | None = None
    metadata: None = Field(None, exclude=True)

    def chosen_hyperparameters(self) -> NebiusHyperparameters:
        return self.hyperparameters


class CreateModel(StrictBody):
    """``POST /v0/models``."""

    name: Annotated[Str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    base_model: Str
    source: Annotated[Str, Field(pattern=r"^[^:]+:[^:]+$")]
    description: Str | None = None


async def create(service: Service, request: Request) -> Response:
    """Make a model of a checkpoint."""
    body = await read_body(request, CreateModel)
    if body.base_model != service.base.id:
        raise model_not_found(body.base_model)
    job, _, checkpoint = body.source.partition(":")
    rows = [r for r in service.state.models_of_job(job) if r["checkpoint_id"] == checkpoint]
    if not rows:
        raise invalid(f"No such checkpoint: {body.source[:200]}", param="source")
    identity = f"{body.base_model}-LoRa:{body.name}-{secrets.token_hex(4)}"
    values = {name: rows[0][name] for name in ("base", "adapter", "fingerprint", "train_loss")}
    service.state.insert("models", id=identity, job=body.source, created_at=now(), **values)
    model = _model(service.fine_tune(identity))
    service.injector.born(identity)
    return JSONResponse(model)


async def listing(service: Service, request: Request) -> Response:
    hidden = set(service.injector.unlisted("model"))
    rows = service.state.rows("SELECT * FROM models WHERE job LIKE '%:%' ORDER BY seq DESC")
    return JSONResponse({"object": "list", "data": [_model(row) for row in rows if row["id"] not in hidden]})


async def retrieve(service: Service, request: Request) -> Response:
    return JSONResponse(_model(service.fine_tune(request.path_params["model"])))


async def delete(service: Service, request: Request) -> Response:
    row = service.fine_tune(request.path_params["model"])
    service.state.delete_models([row])
    return JSONResponse({**_model(row), "status": "deleted"})


def _model(row: Row) -> dict[str, Any]:
    return {
        "name": row["id"],
        "base_model": row["base"],
        "source": row["job"],
        "created_at": row["created_at"],
        "status": "active",
        "description": None,
    }
