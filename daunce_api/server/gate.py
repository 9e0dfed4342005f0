"""What every request passes: identity, limits, headers, and errors in OpenAI's shape."""

from __future__ import annotations

import errno
import hmac
import logging
import secrets
import sqlite3
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..providers.endpoint import is_loopback
from ..providers.server_settings import ServerSettings
from .api_errors import ApiError, rate_limited, server_error, unavailable
from .inject import BrokenConnectionError

log = logging.getLogger("daunce_api.server")

MAX_FILE_BYTES = 512 * 1024**2
"""OpenAI's limit for an uploaded file."""
MAX_BODY_BYTES = 4 * 1024**2
"""Limit of a JSON body, checked before it is parsed."""
MULTIPART_OVERHEAD = 64 * 1024


class Gate:
    """The outermost ASGI layer. No part of a request, and no key, is ever logged; a failure is logged by its place in
    the code."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._key = settings.api_key
        self._limit = _RequestLimit(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        response = _Response(send)
        try:
            if scope["path"].startswith(("/v1/", "/v0/")):
                headers = Headers(scope=scope)
                self._identify(headers)
                response.headers |= self._limit.take()
                is_file = scope["path"] == "/v1/files"
                limit = MAX_FILE_BYTES + MULTIPART_OVERHEAD if is_file else MAX_BODY_BYTES
                receive = _limit_body(headers, receive, limit)
            await self._app(scope, receive, response.send)
        except (BrokenConnectionError, ClientDisconnect):
            # Returning with the response unfinished makes the HTTP server close the connection.
            return
        except ApiError as error:
            await response.finish(error.response(), scope, receive)
        except Exception as error:
            await response.finish(_failure(error), scope, receive)

    def _identify(self, headers: Headers) -> None:
        if self._key is None:
            # Without a key only programs on this machine are answered, and no web page in a browser.
            if "origin" in headers or not is_loopback(_host_of(headers)):
                raise ApiError(403, "This server has no API key and answers requests to the local machine only.")
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            message = (
                "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
                "(Authorization: Bearer YOUR_KEY)."
            )
        elif hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key.encode()):
            return
        else:
            message = "Incorrect API key provided."
        raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _host_of(headers: Headers) -> str | None:
    """The host that a request names, without its port."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class _RequestLimit:
    """A token bucket for all clients together; the ``x-ratelimit-*`` headers show its state."""

    def __init__(self, per_minute: int) -> None:
        self._capacity = per_minute
        self._level = float(per_minute)
        self._time = time.monotonic()

    def take(self) -> dict[str, str]:
        """Count one request. Raises ApiError 429 with the time until the next one is allowed."""
        moment = time.monotonic()
        rate = self._capacity / 60
        self._level = min(self._capacity, self._level + (moment - self._time) * rate)
        self._time = moment
        if self._level < 1:
            wait = (1 - self._level) / rate
            raise rate_limited(
                f"Rate limit reached for requests: {self._capacity} a minute. Please try again in {wait:.3f}s.", wait
            )
        self._level -= 1
        return {
            "x-ratelimit-limit-requests": str(self._capacity),
            "x-ratelimit-remaining-requests": str(int(self._level)),
            "x-ratelimit-reset-requests": f"{(self._capacity - self._level) / rate:.3f}s",
        }


class _Response:
    """Adds the common headers to a response, and knows whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send, self._started_at, self._started = send, time.perf_counter(), False
        self.headers = {"x-request-id": f"req_{secrets.token_hex(16)}", "openai-version": "2020-10-01"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = MutableHeaders(raw=list(message["headers"]))
            elapsed = (time.perf_counter() - self._started_at) * 1000
            headers.update({**self.headers, "openai-processing-ms": f"{elapsed:.0f}"})
            message = {**message, "headers": headers.raw}
        await self._send(message)

    async def finish(self, error: JSONResponse, scope: Scope, receive: Receive) -> None:
        """Send an error, unless another response has begun; then the connection is closed."""
        if not self._started:
            await error(scope, receive, self.send)


def _limit_body(headers: Headers, receive: Receive, limit: int) -> Receive:
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return limited


def _too_large(limit: int) -> ApiError:
    # The rest of the body is not read, so the connection cannot be used again.
    message = f"Maximum content size limit ({limit} bytes) exceeded."
    return ApiError(413, message, code="content_too_large", headers={"connection": "close"})


def _failure(error: Exception) -> JSONResponse:
    if isinstance(error, sqlite3.OperationalError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
    ):
        log.error("the state folder cannot be written: %s", error)
        message = "The server cannot write its state. Nothing was changed."
        return unavailable(message, code="storage_unavailable").response()
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "unknown"
    log.error("%s at %s", type(error).__name__, place)
    return server_error().response()
