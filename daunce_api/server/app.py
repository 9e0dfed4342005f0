"""The application: routes, and what is started and stopped with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from ..providers.server_settings import InjectSettings, ServerSettings
from . import nebius, routes_batches, routes_completions, routes_files, routes_jobs, routes_models
from .api_errors import ApiError
from .gate import Gate
from .inject import Injector
from .service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/files", routes_files.create),
    ("GET", "/v1/files", routes_files.listing),
    ("GET", "/v1/files/{file_id}", routes_files.retrieve),
    ("DELETE", "/v1/files/{file_id}", routes_files.delete),
    ("GET", "/v1/files/{file_id}/content", routes_files.content),
    ("POST", "/v1/fine_tuning/jobs", routes_jobs.create),
    ("GET", "/v1/fine_tuning/jobs", routes_jobs.listing),
    ("GET", "/v1/fine_tuning/jobs/{job_id}", routes_jobs.retrieve),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel", routes_jobs.cancel),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events", routes_jobs.events),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints", routes_jobs.checkpoints),
    ("GET", "/v1/models", routes_models.listing),
    ("GET", "/v1/models/{model:path}", routes_models.retrieve),
    ("DELETE", "/v1/models/{model:path}", routes_models.delete),
    ("POST", "/v1/batches", routes_batches.create),
    ("GET", "/v1/batches", routes_batches.listing),
    ("GET", "/v1/batches/{batch_id}", routes_batches.retrieve),
    ("POST", "/v1/batches/{batch_id}/cancel", routes_batches.cancel),
    ("POST", "/v1/completions", routes_completions.complete),
    ("POST", "/v1/chat/completions", routes_completions.chat),
)

NEBIUS_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v0/models", nebius.create),
    ("GET", "/v0/models", nebius.listing),
    ("GET", "/v0/models/{model:path}", nebius.retrieve),
    ("DELETE", "/v0/models/{model:path}", nebius.delete),
)


async def health(service: Service, request: Request) -> Response:
    """503 where a lane that trains jobs has ended: jobs would wait for it for ever."""
    if service.scheduler.lanes < service.settings.workers:
        return JSONResponse({"status": "degraded"}, 503)
    return JSONResponse({"status": "ok"})


def create_app(settings: ServerSettings) -> Starlette:
    """The ASGI application. Its state folder is opened and its model loaded when the application starts.

    What goes wrong at the start is in ``app.state.startup_error`` (a DaunceError) besides being raised.
    """

    def route(method: str, path: str, handler: Handler) -> Route:
        async def call(request: Request) -> Response:
            return await handler(app.state.service, request)

        return Route(path, call, methods=[method])

    table = ROUTES + (NEBIUS_ROUTES if settings.dialect == "nebius" else ())
    routes = [route(*entry) for entry in (*table, ("GET", "/health", health))]

    def route_of(scope: Scope) -> str:
        """Method and pattern of a request, for counting; unknown paths count together."""
        for route in routes:
            if route.matches(scope)[0] == Match.FULL:
                return f"{scope['method']} {route.path}"
        return "other"

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                app.state.service = service = await Service.start(settings, injector)
                stack.push_async_callback(service.close)
                routes_batches.start(service)
                service.scheduler.start()
            except Exception as error:
                app.state.startup_error = error
                raise
            yield

    injector = Injector(settings.inject or InjectSettings())
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Gate, settings=settings, injector=injector, route_of=route_of)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (unknown path, wrong method, bad multipart) in OpenAI's shape."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path[:200]}. Please check the URL for typos."
        return ApiError(404, message, code="unknown_url").response()
    if error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path[:200]}."
        return ApiError(405, message, code="method_not_supported", headers=error.headers).response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()
