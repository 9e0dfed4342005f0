"""The application: routes, and what is started and stopped with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from ..data.tokenizers import LocalTokenizer
from ..providers.server_settings import ServerSettings
from .api_errors import ApiError
from .channel import Worker
from .gate import Gate
from .inject import Injector
from .nebius import CustomModelRoutes
from .routes_batches import BatchRoutes
from .routes_completions import CompletionRoutes
from .routes_files import FileRoutes
from .routes_jobs import JobRoutes
from .routes_models import ModelRoutes
from .scheduler import Scheduler
from .service import BaseModelFacts, Service
from .state import State
from .tokentext import TokenText

Handler = Callable[[Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, str, str], ...] = (
    ("POST", "/v1/files", "files", "create"),
    ("GET", "/v1/files", "files", "listing"),
    ("GET", "/v1/files/{file_id}", "files", "retrieve"),
    ("DELETE", "/v1/files/{file_id}", "files", "delete"),
    ("GET", "/v1/files/{file_id}/content", "files", "content"),
    ("POST", "/v1/fine_tuning/jobs", "jobs", "create"),
    ("GET", "/v1/fine_tuning/jobs", "jobs", "listing"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}", "jobs", "retrieve"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel", "jobs", "cancel"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events", "jobs", "events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints", "jobs", "checkpoints"),
    ("GET", "/v1/models", "models", "listing"),
    ("GET", "/v1/models/{model:path}", "models", "retrieve"),
    ("DELETE", "/v1/models/{model:path}", "models", "delete"),
    ("POST", "/v1/batches", "batches", "create"),
    ("GET", "/v1/batches", "batches", "listing"),
    ("GET", "/v1/batches/{batch_id}", "batches", "retrieve"),
    ("POST", "/v1/batches/{batch_id}/cancel", "batches", "cancel"),
    ("POST", "/v1/completions", "completions", "complete"),
    ("POST", "/v1/chat/completions", "completions", "chat"),
)


NEBIUS_ROUTES: tuple[tuple[str, str, str, str], ...] = (
    ("POST", "/v0/models", "custom_models", "create"),
    ("GET", "/v0/models", "custom_models", "listing"),
    ("GET", "/v0/models/{model:path}", "custom_models", "retrieve"),
    ("DELETE", "/v0/models/{model:path}", "custom_models", "delete"),
)


def create_app(settings: ServerSettings) -> Starlette:
    """The ASGI application. Its state folder is opened and its model loaded when the application starts.

    What goes wrong at the start is in ``app.state.startup_error`` (a DaunceError) besides being raised.
    """
    groups: dict[str, Any] = {}

    def handler(group: str, name: str) -> Handler:
        async def call(request: Request) -> Response:
            answer: Response = await getattr(groups[group], name)(request)
            return answer

        return call

    table = ROUTES + (NEBIUS_ROUTES if settings.dialect == "nebius" else ())
    routes = [Route(path, handler(group, name), methods=[method]) for method, path, group, name in table]

    async def health(request: Request) -> Response:
        """503 where a lane that trains jobs has ended: jobs would wait for it for ever."""
        scheduler: Scheduler | None = groups.get("scheduler")
        degraded = scheduler is not None and scheduler.lanes < settings.workers
        return JSONResponse({"status": "degraded" if degraded else "ok"}, 503 if degraded else 200)

    routes.append(Route("/health", health))

    def route_of(scope: Scope) -> str:
        """Method and pattern of a request, for counting; unknown paths count together."""
        for route in routes:
            if route.matches(scope)[0] == Match.FULL:
                return f"{scope['method']} {route.path}"
        return "other"

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            running = _Running(settings, injector)
            await running.start(groups)
        except Exception as error:
            app.state.startup_error = error
            raise
        try:
            yield
        finally:
            await running.close()

    injector = Injector(settings.inject) if settings.inject is not None else None
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Gate, settings=settings, injector=injector, route_of=route_of)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


class _Running:
    """What lives as long as the application runs."""

    def __init__(self, settings: ServerSettings, injector: Injector | None) -> None:
        self._settings = settings
        self._injector = injector
        self._state = State(settings.state_dir)
        self._hello = {
            "op": "load",
            "model": settings.model,
            "device": settings.device,
            "dtype": settings.dtype,
            "threads": settings.threads,
        }
        self._scorer = Worker(self._hello)
        self._scheduler: Scheduler | None = None
        self._batches: BatchRoutes | None = None

    async def start(self, groups: dict[str, Any]) -> None:
        """Load the model and fill in the groups of routes."""
        try:
            base = BaseModelFacts.of(await self._scorer.start(), self._settings)
            service = Service(
                settings=self._settings,
                state=self._state,
                base=base,
                tokenizer=LocalTokenizer(base.folder),
                text=TokenText(base.folder),
                scorer=self._scorer,
                injector=self._injector,
            )
            self._scheduler = Scheduler(service, self._hello)
            completions = CompletionRoutes(service)
            handlers = {"/v1/completions": completions.complete, "/v1/chat/completions": completions.chat}
            self._batches = BatchRoutes(service, handlers)
            groups.update(
                scheduler=self._scheduler,
                files=FileRoutes(service, self._scheduler),
                jobs=JobRoutes(service, self._scheduler),
                models=ModelRoutes(service),
                completions=completions,
                batches=self._batches,
                custom_models=CustomModelRoutes(service),
            )
            self._batches.start()
            self._scheduler.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._batches is not None:
            await self._batches.close()
        if self._scheduler is not None:
            await self._scheduler.close()
        await self._scorer.close()
        self._state.close()


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
