"""Faults on purpose: which request meets which, and how each is committed on the wire."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import Counter
from typing import Literal

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..providers.server_settings import REQUEST_FAULTS, InjectSettings
from .api_errors import rate_limited, server_error


class Injector:
    """Decides faults from a seed and from counts, so that a run can be repeated."""

    def __init__(self, settings: InjectSettings) -> None:
        self.settings = settings
        self._seen: Counter[str] = Counter()
        self._jobs_accepted = 0
        self._uses: Counter[str] = Counter()
        self._born: dict[str, float] = {}
        self._last: _Recorder | None = None
        self._swap: tuple[_Recorder, asyncio.Future[_Recorder]] | None = None

    def request_fault(self, route: str) -> str | None:
        """The fault of the next request to a route (method and pattern), or None."""
        self._seen[route] += 1
        return self._choose(f"{route}#{self._seen[route]}", REQUEST_FAULTS)

    def job_fault(self, ordinal: int) -> str | None:
        """``job_failure``, ``job_stuck``, ``model_deleted`` or None for the n-th job ever created."""
        return self._choose(f"job#{ordinal}", ("job_failure", "job_stuck", "model_deleted"))

    def accept_job(self) -> bool:
        """False when the daily limit is reached; it counts the jobs accepted since the server started."""
        limit = self.settings.daily_limit_after
        if limit is not None and self._jobs_accepted >= limit:
            return False
        self._jobs_accepted += 1
        return True

    def vanishes_now(self, model: str) -> bool:
        """True at the second use of a model that is to be deleted under its users."""
        self._uses[model] += 1
        return self._uses[model] >= 2

    def born(self, identity: str) -> None:
        """A job, file or model comes into being now; what an earlier server made is old enough to be seen."""
        self._born[identity] = time.monotonic()

    def hidden(self, kind: Literal["job", "file", "model"], identity: str, *, listed: bool = False) -> bool:
        """Whether something is too young to be found by its id or, with ``listed``, to be in a list."""
        lag: float = getattr(self.settings, f"{kind}_lag")
        if listed:
            lag = max(lag, self.settings.list_lag)
        return time.monotonic() - self._born.get(identity, -math.inf) < lag

    def _choose(self, key: str, faults: tuple[str, ...]) -> str | None:
        digest = hashlib.sha256(f"{self.settings.seed}:{key}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        for fault in faults:
            rate = float(getattr(self.settings, fault))
            if draw < rate:
                return fault
            draw -= rate
        return None

    async def commit(self, fault: str | None, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with a fault; None: only keep the answer, since one may be sent again (``duplicated``).
        Raises ApiError for those that are plain answers."""
        if fault in ("rate_limit", "rate_limit_bare"):
            wait = self.settings.retry_after if fault == "rate_limit" else None
            raise rate_limited("Rate limit reached for requests. Please try again later.", wait)
        if fault == "error_500":
            raise server_error()
        if fault == "error_502":
            page = HTMLResponse("<html><body><h1>502 Bad Gateway</h1></body></html>", 502)
            await page(scope, receive, send)
        elif fault == "timeout_before":
            await self._hang(receive, send)
        else:
            recorder = _Recorder()
            await app(scope, receive, recorder.send)
            before, self._last = self._last, recorder
            if fault == "duplicated":
                await (before or recorder).replay(send)
            elif fault == "swapped":
                await (await self._exchanged(recorder)).replay(send)
            elif fault is None:
                await recorder.replay(send)
            else:
                await self._spoil(fault, recorder, scope, receive, send)

    async def _exchanged(self, mine: _Recorder) -> _Recorder:
        """The answer of the next request that is to be swapped; the own one where none comes within ``hang``."""
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

    async def _spoil(self, fault: str, done: _Recorder, scope: Scope, receive: Receive, send: Send) -> None:
        half = done.body[: len(done.body) // 2]
        kind = Headers(raw=done.headers).get("content-type", "application/json")
        if fault == "timeout_after":
            await self._hang(receive, send)
        elif fault == "drop":
            headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % (len(done.body) + 1))]
            await send({"type": "http.response.start", "status": done.status, "headers": headers})
            await send({"type": "http.response.body", "body": half, "more_body": True})
            raise BrokenConnectionError
        else:
            body = half if fault == "truncated" else b'{"object": "list", "data": [' + half[:40] + b"\x00<!-- "
            await Response(body, done.status, {"content-type": kind})(scope, receive, send)

    async def _hang(self, receive: Receive, send: Send) -> None:
        """Say nothing until the client leaves or ``hang`` seconds have passed, then break the connection."""

        async def until_client_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        try:
            await asyncio.wait_for(until_client_leaves(), self.settings.hang)
        except TimeoutError:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"1")]
            await send({"type": "http.response.start", "status": 504, "headers": headers})
            raise BrokenConnectionError from None


class BrokenConnectionError(Exception):
    """The response was left unfinished on purpose: the connection has to be closed."""


class _Recorder:
    """Keeps a response instead of sending it."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    async def replay(self, send: Send) -> None:
        """Send what was kept."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})
