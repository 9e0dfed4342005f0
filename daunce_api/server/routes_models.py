"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_errors import ApiError
from .service import Service


class ModelRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def listing(self, request: Request) -> Response:
        """The base model, then the fine-tunes, newest first; checkpoints are listed with their job."""
        service = self._service
        rows = service.state.rows("SELECT * FROM models WHERE step IS NULL ORDER BY seq DESC")
        rows = [r for r in rows if service.answers(r) and not service.hidden("model", r["id"], listed=True)]
        data = [self._base(), *(_model_object(r["id"], r["created_at"], "daunce") for r in rows)]
        return JSONResponse({"object": "list", "data": data})

    async def retrieve(self, request: Request) -> Response:
        model = request.path_params["model"]
        if model == self._service.base.id:
            return JSONResponse(self._base())
        return JSONResponse(_model_object(model, self._service.fine_tune(model)["created_at"], "daunce"))

    async def delete(self, request: Request) -> Response:
        model = request.path_params["model"]
        if model == self._service.base.id:
            raise ApiError(403, "The base model cannot be deleted.", param="model")
        await self._service.delete_fine_tune(model)
        return JSONResponse({"id": model, "object": "model", "deleted": True})

    def _base(self) -> dict[str, Any]:
        base = self._service.base
        if self._service.settings.dialect == "vllm":
            return _model_object(base.id, base.created, "vllm") | {"max_model_len": base.max_context}
        return _model_object(base.id, base.created, "daunce")


def _model_object(identity: str, created: int, owner: str) -> dict[str, Any]:
    return {"id": identity, "object": "model", "created": created, "owned_by": owner, "shutdown_date": None}
