"""What each failed request of a provider means for a run: one table for all SDKs.

``providers/base.py`` lists the classes. A message never holds a key, and says what was kept and what to do next.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from .._util.exhausted import exhausted
from ..errors import AmbiguousSubmitError, DailyLimitError, ProviderError, RejectedError, StopError, TransientError
from .base import Job

_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_KEPT = "Everything so far is kept; once it is raised or freed, run the same command again."
_MAX_MESSAGE = 500
NO_REASON = "the provider gave no reason"
"""Stands for what a provider did not say of a failed job."""


class Failures:
    """Turns failures of one provider into the project's errors; ``secrets`` are removed from every message."""

    def __init__(self, provider: str, secrets: Sequence[str] = ()) -> None:
        self.provider = provider
        self._secrets = tuple(s for s in secrets if s)

    def clean(self, text: str) -> str:
        """A message of a server, fit for people: without secrets and control characters, and not too long."""
        for secret in self._secrets:
            text = text.replace(secret, "[key removed]")
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"

    def from_status(self, status: int, response: httpx2.Response, doing: str, *, submit: bool = False) -> ProviderError:
        """The error of an answer with an HTTP status of 400 or more (``httpx``'s serves as well). ``doing`` names the
        request in messages, ``submit`` marks one that must not be repeated blindly."""
        error = self._of_status(status, response, doing, submit)
        error.status = status
        return error

    def _of_status(self, status: int, response: httpx2.Response, doing: str, submit: bool) -> ProviderError:
        message, code = _error_of(response)
        said = self.clean(f"{self.provider} answered {status} to {doing}: {message}")
        said += "" if said.endswith((".", "!", "?", "…")) else "."
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
                return self.ambiguous(doing, f"answered {status}")
            return TransientError(said, retry_after=retry_after(response.headers))
        if status == 404 and code == "model_not_found":
            said += " The model does not exist, was deleted, or was shut down by the provider."
        return RejectedError(said)

    def unreachable(
        self,
        doing: str,
        cause: BaseException | None,
        *,
        timed_out: bool = False,
        submit: bool = False,
        never_sent: bool = False,
    ) -> ProviderError:
        """The error of a request that got no answer, by what its connection failed with; ``never_sent`` says that it
        cannot have been acted on."""
        if (limit := exhausted(cause)) is not None:
            return StopError(f"{doing} was not sent: {limit}. {_KEPT}")
        what = "did not answer in time" if timed_out else "could not be reached, or broke the connection"
        if submit and not never_sent:
            return self.ambiguous(doing, what)
        return TransientError(f"{self.provider} {what} ({doing}).")

    def malformed(self, doing: str, submit: bool, what: str) -> ProviderError:
        """The error of an answer that cannot be read; ``what`` completes "answered with ..."."""
        if submit:
            return self.ambiguous(doing, f"answered with {what}")
        return TransientError(f"{self.provider} answered {doing} with {what}; nothing of it was used.")

    def ambiguous(self, doing: str, what: str) -> AmbiguousSubmitError:
        """The error of a submit whose outcome is not known; ``what`` completes "the provider ..."."""
        return AmbiguousSubmitError(
            f"{self.provider} {what} ({doing}), so the job may exist or not. It is looked up before anything is sent "
            "again."
        )

    async def request(
        self, http: httpx2.AsyncClient, method: str, url: str, *, doing: str, **how: Any
    ) -> httpx2.Response:
        """The answer to a request that no SDK makes, of a status below 400; any other raises its error."""
        try:
            response = await http.request(method, url, **how)
        except httpx2.TransportError as error:
            failure = self.unreachable(doing, error, timed_out=isinstance(error, httpx2.TimeoutException))
        else:
            if response.status_code < 400:
                return response
            failure = self.from_status(response.status_code, response, doing)
        raise failure  # outside the handler: address and headers may be secret


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


@contextmanager
def gone_already() -> Iterator[None]:
    """Around a request to take something away or to read it: that it is not there (404) is no error."""
    try:
        yield
    except ProviderError as error:
        if error.status != 404:
            raise


async def cancelled(call: Awaitable[Job], read: Callable[[], Awaitable[Job]]) -> Job:
    """The job after a request to cancel it; where that is refused because it is final already, as ``read`` gives it."""
    try:
        return await call
    except RejectedError:
        job = await read()
        if job.status.final:
            return job
        raise


@contextmanager
def noted_in(kept: dict[str, str], name: str) -> Iterator[None]:
    """Around the clean-up of one thing: where that fails, ``kept`` says why, and the next one can go on.

    A StopError ends everything.
    """
    try:
        yield
    except StopError:
        raise
    except ProviderError as error:
        kept[name] = str(error)
