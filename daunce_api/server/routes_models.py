"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_errors import ApiError
from .service import Service


async def listing(service: Service, request: Request) -> Response:
    """The base model, then the fine-tunes, newest first; checkpoints are listed with their job."""
    rows = service.state.rows("SELECT * FROM models WHERE step IS NULL ORDER BY seq DESC")
    hidden = set(service.injector.unlisted("model"))
    shown = [_model(r["id"], r["created_at"]) for r in rows if service.answers(r) and r["id"] not in hidden]
    return JSONResponse({"object": "list", "data": [_base(service), *shown]})


async def retrieve(service: Service, request: Request) -> Response:
    model = request.path_params["model"]
    if model == service.base.id:
        return JSONResponse(_base(service))
    return JSONResponse(_model(model, service.fine_tune(model)["created_at"]))


async def delete(service: Service, request: Request) -> Response:
    model = request.path_params["model"]
    if model == service.base.id:
        raise ApiError(403, "The base model cannot be deleted.", param="model")
    service.delete_fine_tune(model)
    return JSONResponse({"id": model, "object": "model", "deleted": True})


def _base(service: Service) -> dict[str, Any]:
    base = service.base
    model = _model(base.id, int((base.folder / "tokenizer.json").stat().st_mtime))
    if service.settings.dialect == "vllm":
        model |= {"owned_by": "vllm", "max_model_len": base.max_context}
    return model


def _model(identity: str, created: int) -> dict[str, Any]:
    return {"id": identity, "object": "model", "created": created, "owned_by": "daunce", "shutdown_date": None}
