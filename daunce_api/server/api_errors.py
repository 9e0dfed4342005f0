"""Errors as OpenAI's API words them: one JSON shape, a status, and codes that clients branch on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from starlette.responses import JSONResponse


@dataclass(eq=False)
class ApiError(Exception):
    """Answered as ``{"error": {"message", "type", "param", "code"}}`` with an HTTP status."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def response(self) -> JSONResponse:
        body = {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        return JSONResponse(body, self.status, self.headers)


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong and will be wrong again."""
    return ApiError(400, message, param=param, code=code)


def missing(name: str) -> ApiError:
    return invalid(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def model_not_found(model: str) -> ApiError:
    message = f"The model `{model[:200]}` does not exist or you do not have access to it."
    return ApiError(404, message, param="model", code="model_not_found")


def not_found(kind: str, identity: str, param: str) -> ApiError:
    return ApiError(404, f"No such {kind}: {identity[:200]}", param=param)


def unavailable(message: str, *, code: str) -> ApiError:
    """503: the same request may succeed later."""
    return ApiError(503, message, type="server_error", code=code, headers={"retry-after": "1"})


def rate_limited(message: str, wait: float | None) -> ApiError:
    """429; ``wait``: the seconds in its Retry-After headers, or None for an answer without them."""
    headers = {} if wait is None else {"retry-after": str(ceil(wait)), "retry-after-ms": str(ceil(1000 * wait))}
    return ApiError(429, message, type="requests", code="rate_limit_exceeded", headers=headers)


def server_error() -> ApiError:
    return ApiError(500, "The server had an error while processing your request.", "server_error")
