"""Deliberate faults: which request meets which, and what each looks like on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from ..providers.server_settings import REQUEST_FAULTS, InjectSettings
from .api_errors import ApiError, rate_limited, server_error

Handler = Callable[[Request], Awaitable[Response]]
Kind = Literal["job", "file", "model"]


class Injector:
    """Decides faults from a seed and from counts, so that a run can be repeated."""

    def __init__(self, settings: InjectSettings) -> None:
        self.settings = settings
        self._seen: Counter[str] = Counter()
        self._jobs_accepted = 0
        self._uses: Counter[str] = Counter()
        self._born: dict[str, float] = {}
        self._last: Response | None = None
        self._swap: tuple[Response, asyncio.Future[Response]] | None = None

    def request_fault(self, route: str) -> str | None:
        """The fault of the next request to a route (method and pattern), or None."""
        self._seen[route] += 1
        return self._choose(f"{route}#{self._seen[route]}", REQUEST_FAULTS)

    def job_fault(self, ordinal: int) -> str | None:
        """``job_failure``, ``job_stuck``, ``model_deleted`` or None for the n-th job ever created."""
        return self._choose(f"job#{ordinal}", ("job_failure", "job_stuck", "model_deleted"))

    def accept_job(self) -> bool:
        """False once the daily limit is reached, which counts the jobs since the server started."""
        limit = self.settings.daily_limit_after
        if limit is not None and self._jobs_accepted >= limit:
            return False
        self._jobs_accepted += 1
        return True

    def vanishes_now(self, model: str) -> bool:
        """True from the second use on of a model that is to be deleted while it is in use."""
        self._uses[model] += 1
        return self._uses[model] >= 2

    def born(self, identity: str) -> None:
        """Note that a job, file or model was made now. What an earlier server made is never hidden."""
        if self.settings.lags:
            self._born[identity] = time.monotonic()

    def hidden(self, kind: Kind, identity: str) -> bool:
        """Whether something is too young to be found by its id."""
        lag: float = getattr(self.settings, f"{kind}_lag")
        return self._born.get(identity, -math.inf) > time.monotonic() - lag

    def unlisted(self, kind: Kind) -> list[str]:
        """Ids of what is too young to be in a list."""
        since = time.monotonic() - max(getattr(self.settings, f"{kind}_lag"), self.settings.list_lag)
        return [identity for identity, born in self._born.items() if born > since]

    def _choose(self, key: str, faults: tuple[str, ...]) -> str | None:
        digest = hashlib.sha256(f"{self.settings.seed}:{key}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        for fault in faults:
            rate = float(getattr(self.settings, fault))
            if draw < rate:
                return fault
            draw -= rate
        return None

    async def answer(self, route: str, handler: Handler, request: Request) -> Response:
        """The answer of a handler, or what the fault of this request makes of it. Raises ApiError."""
        fault = self.request_fault(route)
        if fault in ("rate_limit", "rate_limit_bare"):
            wait = self.settings.retry_after if fault == "rate_limit" else None
            raise rate_limited("Rate limit reached for requests. Please try again later.", wait)
        if fault == "error_500":
            raise server_error()
        if fault == "error_502":
            return HTMLResponse("<html><body><h1>502 Bad Gateway</h1></body></html>", 502)
        if fault == "timeout_before":
            return await self._hang(request)
        if fault is None and not self.settings.duplicated:
            return await handler(request)
        try:
            response = await handler(request)
        except ApiError as error:
            response = error.response()
        before, self._last = self._last, response
        if fault == "timeout_after":
            return await self._hang(request)
        if fault == "swapped":
            return await self._exchanged(response)
        if fault == "duplicated":
            return before or response
        return response if fault is None else _spoiled(fault, response)

    async def _exchanged(self, mine: Response) -> Response:
        """The answer of the next request that is to be swapped; its own where none comes within ``hang``."""
        if self._swap is not None:
            theirs, waiting = self._swap
            self._swap = None
            if not waiting.done():
                waiting.set_result(mine)
                return theirs
        waiting = asyncio.get_running_loop().create_future()
        self._swap = (mine, waiting)
        try:
            return await asyncio.wait_for(waiting, self.settings.hang)
        except TimeoutError:
            return mine

    async def _hang(self, request: Request) -> Response:
        """Say nothing until the client leaves or ``hang`` seconds have passed; then the connection is cut."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.hang):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
        return _Broken(b"", 504, {"content-type": "application/json", "content-length": "1"})


def _spoiled(fault: str, response: Response) -> Response:
    body = Path(response.path).read_bytes() if isinstance(response, FileResponse) else bytes(response.body)
    half = body[: len(body) // 2]
    kind = response.headers["content-type"]
    if fault == "drop":
        return _Broken(half, response.status_code, {"content-type": kind, "content-length": str(len(body) + 1)})
    if fault == "malformed":
        half = b'{"object": "list", "data": [' + half[:40] + b"\x00<!-- "
    return Response(half, response.status_code, {"content-type": kind})


class BrokenConnectionError(Exception):
    """The response was left unfinished on purpose: the connection has to be closed."""


class _Broken(Response):
    """A response that is never finished."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        raise BrokenConnectionError
