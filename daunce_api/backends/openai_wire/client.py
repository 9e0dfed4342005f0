"""The SDK's client as every OpenAI-wire part opens it, and what each of its errors means here.

Answers are read as raw JSON: the SDK builds its objects without checking them, which is slower on long lists of
log-probabilities and lets a malformed answer through. The SDK's own retries are off; callers decide by error class.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import httpx2
import openai

from ...errors import (
    AmbiguousSubmitError,
    ConfigurationError,
    DailyLimitError,
    ProviderError,
    RejectedError,
    StopError,
    TransientError,
)

OPENAI_BASE_URL = "https://api.openai.com/v1"
ANONYMOUS = "no-key"
"""Sent as the bearer token to servers that ask for none; the SDK insists on one."""

_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_MAX_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go. ``api_key`` is not part of the representation; ``provider`` is used in messages."""

    base_url: str
    api_key: str = field(default=ANONYMOUS, repr=False)
    provider: str = "the server"

    @property
    def loopback(self) -> bool:
        return (urlsplit(self.base_url).hostname or "") in _LOOPBACK


def api_key_from(variable: str) -> str:
    """The key in an environment variable. Raises ConfigurationError that names the variable, never the key."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigurationError(
            f"the environment variable {variable} holds no API key. Set it (export {variable}=...), or name another "
            "one with backend.api_key_env. `daunce plan` works without a key."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigurationError(
            f"the environment variable {variable} holds characters that no API key has (spaces, line breaks or "
            "letters outside ASCII). Copy the key again."
        )
    return key


def checked_base_url(base_url: str) -> str:
    """The URL without a trailing slash. Raises ConfigurationError where it is not http(s), or carries a password."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(f"base_url {base_url!r} is not an address like http://127.0.0.1:8000/v1.")
    if parts.username or parts.password or parts.query:
        raise ConfigurationError(
            "base_url carries a user name, a password or a query. It is stored with the run: put the secret into an "
            "environment variable and name that with api_key_env."
        )
    return base_url.rstrip("/")


def open_sdk(
    endpoint: Endpoint, *, http_client: httpx2.AsyncClient | None = None, timeout: float = 600.0, connections: int = 100
) -> openai.AsyncOpenAI:
    """``AsyncOpenAI`` without retries of its own.

    Organisation and project of the environment go to OpenAI alone, and a proxy of the environment is not asked for
    loopback addresses. ``timeout`` is in seconds, for one request.
    """
    if http_client is None:
        http_client = openai.DefaultAsyncHttpxClient(
            timeout=httpx2.Timeout(timeout, connect=10.0),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not endpoint.loopback,
        )
    sdk = openai.AsyncOpenAI(
        api_key=endpoint.api_key,
        base_url=endpoint.base_url,
        max_retries=0,
        timeout=timeout,
        http_client=http_client,
    )
    if (urlsplit(endpoint.base_url).hostname or "") not in ("api.openai.com", "eu.api.openai.com"):
        sdk.organization = None
        sdk.project = None
    return sdk


class RawResponse(Protocol):
    """What the SDK's ``with_raw_response`` methods return."""

    @property
    def http_response(self) -> httpx2.Response: ...


class WireClient:
    """An SDK client with the project's errors. Owns the client: closing this closes its connections.

    ``sdk`` may be any ``AsyncOpenAI`` (``AsyncAzureOpenAI`` too); ``secrets`` are removed from every message.
    """

    def __init__(self, sdk: openai.AsyncOpenAI, *, provider: str, secrets: Sequence[str] = ()) -> None:
        self.sdk = sdk
        self.provider = provider
        self._secrets = tuple(s for s in (*secrets, sdk.api_key) if s and s != ANONYMOUS)

    @classmethod
    def open(
        cls,
        endpoint: Endpoint,
        *,
        http_client: httpx2.AsyncClient | None = None,
        timeout: float = 600.0,
        connections: int = 100,
    ) -> WireClient:
        """A client of an endpoint; see :func:`open_sdk`."""
        sdk = open_sdk(endpoint, http_client=http_client, timeout=timeout, connections=connections)
        return cls(sdk, provider=endpoint.provider)

    async def json(
        self,
        call: Awaitable[RawResponse],
        *,
        doing: str,
        submit: bool = False,
        needs: Mapping[str, type] | None = None,
    ) -> dict[str, Any]:
        """The JSON object that a ``with_raw_response`` call is answered with.

        ``doing`` names the request in messages ("creating a job"). ``submit`` marks a request that must not be
        repeated blindly: whatever leaves open whether it was acted on raises AmbiguousSubmitError. ``needs`` are the
        fields without which the answer is malformed.
        """
        content = await self.content(call, doing=doing, submit=submit)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._malformed(doing, submit, "a body that is not a JSON object")
        for name, kind in (needs or {}).items():
            if not isinstance(answer.get(name), kind):
                raise self._malformed(doing, submit, f"no usable field {name!r}")
        return answer

    async def content(self, call: Awaitable[RawResponse], *, doing: str, submit: bool = False) -> bytes:
        """The bytes that a ``with_raw_response`` call is answered with; errors as in :meth:`json`."""
        failure: ProviderError
        try:
            return (await call).http_response.content
        except openai.OpenAIError as error:
            failure = self.translate(error, doing=doing, submit=submit)
        # Raised outside the handler: the SDK's error holds the request with its Authorization header.
        raise failure

    async def post(self, path: str, body: Mapping[str, Any], *, doing: str) -> dict[str, Any]:
        """POST to a path outside the SDK's surface, relative to ``base_url`` (an absolute URL is taken as it is)."""
        return await self.json(_raw(self.sdk.post(path, cast_to=httpx2.Response, body=body)), doing=doing)

    async def get(self, path: str, *, doing: str) -> dict[str, Any]:
        """GET of a path outside the SDK's surface."""
        return await self.json(_raw(self.sdk.get(path, cast_to=httpx2.Response)), doing=doing)

    def translate(self, error: openai.OpenAIError, *, doing: str, submit: bool = False) -> ProviderError:
        """The error class that says what to do; the table is in ``backends/base.py``."""
        if isinstance(error, openai.APIStatusError):
            translated = self._from_status(error, doing, submit)
            translated.status = error.status_code
            return translated
        if isinstance(error, openai.APIConnectionError):
            timed_out = isinstance(error, openai.APITimeoutError)
            what = "did not answer in time" if timed_out else "could not be reached, or broke the connection"
            if submit and not isinstance(error.__cause__, _NEVER_SENT):
                return self._ambiguous(doing, what)
            return TransientError(f"{self.provider} {what} ({doing}).")
        return StopError(self.clean(f"{doing} could not be sent to {self.provider}: {error}. Nothing was changed."))

    def clean(self, text: str) -> str:
        """A message of a server, fit for people: without secrets and control characters, and not too long."""
        for secret in self._secrets:
            text = text.replace(secret, "[key removed]")
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"

    def _from_status(self, error: openai.APIStatusError, doing: str, submit: bool) -> ProviderError:
        status, response = error.status_code, error.response
        message, code = _error_of(response)
        said = self.clean(f"{self.provider} answered {status} to {doing}: {message}")
        if code == "daily_rate_limit_exceeded":
            return DailyLimitError(f"{said} Everything so far is kept; run the same command again in some hours.")
        if code in _QUOTA_CODES or status == 402:
            return StopError(f"{said} Everything so far is kept; add credit, then run the same command again.")
        if status in (401, 403):
            return StopError(
                f"{said} Everything so far is kept; check the API key (backend.api_key_env) and its permissions, then "
                "run the same command again."
            )
        if status == 429:
            return TransientError(said, retry_after=retry_after(response.headers))
        if status in (408, 409, 425) or (status >= 500 and status not in (501, 505)):
            if submit:
                return self._ambiguous(doing, f"answered {status}")
            return TransientError(said, retry_after=retry_after(response.headers))
        if status == 404 and code == "model_not_found":
            said += " The model does not exist, was deleted, or was shut down by the provider."
        return RejectedError(said)

    def _malformed(self, doing: str, submit: bool, what: str) -> ProviderError:
        if submit:
            return self._ambiguous(doing, f"answered with {what}")
        return TransientError(f"{self.provider} answered {doing} with {what}; nothing of it was used.")

    def _ambiguous(self, doing: str, what: str) -> AmbiguousSubmitError:
        return AmbiguousSubmitError(
            f"{self.provider} {what} ({doing}), so the job may exist or not. It is looked up before anything is sent "
            "again."
        )

    async def close(self) -> None:
        await self.sdk.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass(frozen=True, slots=True)
class _Raw:
    http_response: httpx2.Response


async def _raw(call: Awaitable[httpx2.Response]) -> _Raw:
    return _Raw(await call)


def _error_of(response: httpx2.Response) -> tuple[str, str]:
    """Message and code of an error body: OpenAI's, vLLM's (integer code), FastAPI's ``detail``, or plain text."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return (response.text.strip()[:_MAX_MESSAGE] or "no message", "")
    inner = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(inner, dict):
        message = inner.get("message") or inner.get("detail") or inner.get("error") or "no message"
        codes = [str(inner[name]) for name in ("code", "type") if inner.get(name) is not None]
        known = [c for c in codes if c in _QUOTA_CODES or c == "daily_rate_limit_exceeded"]
        return str(message), (known or codes or [""])[0]
    return str(inner), ""


def retry_after(headers: Mapping[str, str], *, wall_clock: float | None = None) -> float | None:
    """Seconds that ``retry-after-ms`` or ``retry-after`` (seconds or a date) ask to wait; None if they say nothing.

    ``wall_clock`` is the present as a Unix time, for tests.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    if date is None:
        return None
    try:
        moment = email.utils.mktime_tz(date)
    except (OverflowError, ValueError):
        return None
    return max(moment - (time.time() if wall_clock is None else wall_clock), 0.0)
