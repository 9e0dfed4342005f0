"""The application: routes, and what is started and stopped with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

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


async def health(request: Request) -> Response:
    """503 where a lane that trains jobs has ended: jobs would wait for it forever."""
    service: Service = request.app.state.service
    if service.scheduler.lanes < service.settings.workers:
        return JSONResponse({"status": "degraded"}, 503)
    return JSONResponse({"status": "ok"})


def create_app(settings: ServerSettings) -> Starlette:
    """The ASGI application. Its state folder is opened and its model loaded when the application starts.

    What goes wrong at the start is in ``app.state.startup_error`` (a DaunceError) besides being raised.
    """
    injector = Injector(settings.inject or InjectSettings())

    def route(method: str, path: str, handler: Handler) -> Route:
        async def call(request: Request) -> Response:
            return await injector.answer(f"{method} {path}", partial(handler, app.state.service), request)

        return Route(path, call, methods=[method])

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

    table = ROUTES + (NEBIUS_ROUTES if settings.dialect == "nebius" else ())
    app = Starlette(
        routes=[*(route(*entry) for entry in table), Route("/health", health)],
        lifespan=lifespan,
        middleware=[Middleware(Gate, settings=settings)],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


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
