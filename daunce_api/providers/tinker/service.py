"""Tinker's client (SDK ``tinker``), shared by the trainer and the scorer of a run.

Tinker's own service and the servers that speak its wire (SkyRL, Baseten Loops, OpenRL, ...) are of different ages, and
each works with SDKs of its own age. What an SDK offers is therefore detected, never inferred from its version.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit

from ...errors import ConfigurationError, MissingExtraError, ProviderError, RejectedError, TransientError
from ..calls import Calls
from ..endpoint import ANONYMOUS
from ..registry import TINKER_BASE_URL, Context

DAY = 86_400
KEY_PREFIX = "tml-"
"""Every key that the SDK sends begins so; it refuses others."""
NO_KEY = "tml-no-key"
"""Sent to servers without keys."""
_SHARED = "tinker"
_PAGE = 100
_FULL = re.compile(r"maximum number of .{0,40}(reached|exceeded)|no free (slot|adapter)", re.IGNORECASE)
"""What a full server says; the models of a killed process are removed after a while."""


def is_tinker(base_url: str | None) -> bool:
    """Whether an address is Tinker's own service."""
    return base_url is None or urlsplit(base_url).hostname == urlsplit(TINKER_BASE_URL).hostname


def name_of(base_url: str | None) -> str:
    """What messages call the service at an address."""
    return "Tinker" if base_url is None or is_tinker(base_url) else f"the Tinker server at {urlsplit(base_url).netloc}"


class Service:
    """A ``tinker.ServiceClient``, opened at its first use and closed with its last user."""

    def __init__(self, connect: Callable[[], Any], calls: Calls, look_up: Callable[[], Any] | None = None) -> None:
        """``connect`` creates the client of a session; ``look_up`` the one for training runs and checkpoints, where the
        SDK has one that needs no session. Both send requests and block."""
        self.calls = calls
        self._connect = connect
        self._look_up = look_up
        self._client: Any = None
        self._rest: Any = None
        self._opening = asyncio.Lock()
        self._users = 0

    @property
    def name(self) -> str:
        """Name of the service in messages."""
        return self.calls.provider

    async def client(self) -> Any:
        """The SDK's client. Raises the errors of ``providers/base.py`` where no session can be opened."""
        async with self._opening:
            if self._client is None:
                self._client = await self.calls.call(asyncio.to_thread(self._connect), doing="opening a session")
        return self._client

    async def rest(self) -> Any:
        """The SDK's client for training runs and checkpoints."""
        look_up = self._look_up
        if look_up is None:
            client = await self.client()
            look_up = client.create_rest_client
        async with self._opening:
            if self._rest is None:
                self._rest = await self.calls.call(asyncio.to_thread(look_up), doing="connecting")
        return self._rest

    async def models(self) -> list[Any]:
        """The models that the service lists; older SDKs ask through the session's client."""
        owner = await self.rest()
        if not hasattr(owner, "get_server_capabilities"):
            owner = await self.client()
        answer = await self.start(owner.get_server_capabilities, doing="listing models")
        return list(getattr(answer, "supported_models", None) or ())

    async def training_runs(self, doing: str) -> list[Any]:
        """Every training run that the service lists."""
        rest = await self.rest()
        found: dict[str, Any] = {}
        while True:  # a server may send fewer than requested, or the same ones again
            page = await self.start(partial(rest.list_training_runs, limit=_PAGE, offset=len(found)), doing=doing)
            known = len(found)
            found |= {str(run.training_run_id): run for run in page.training_runs}
            if len(found) in (known, page.cursor.total_count):
                return list(found.values())

    async def start(self, create: Callable[[], Any], *, doing: str, submit: bool = False) -> Any:
        """The result of an SDK method. The method itself may open a session, which blocks, so it runs in a thread."""

        async def run() -> Any:
            return await _settled(await asyncio.to_thread(create))

        try:
            return await self.calls.call(run(), doing=doing, submit=submit)
        except RejectedError as error:
            if not _FULL.search(str(error)):
                raise
            full = TransientError(f"{error} A place becomes free when the server ends an earlier session.")
        raise full

    async def result(self, future: Any, *, doing: str) -> Any:
        """The result of an SDK method that was already called."""
        return await self.calls.call(_settled(future), doing=doing)

    def enter(self) -> Self:
        """Register one more user, who must call :meth:`leave`."""
        self._users += 1
        return self

    async def leave(self) -> None:
        self._users -= 1
        if self._users == 0 and self._client is not None:
            client, self._client = self._client, None
            if hasattr(client, "close"):
                with suppress(ProviderError):  # an unclosed session expires
                    await self.start(lambda: client.close("success"), doing="closing the session")


async def _settled(value: Any) -> Any:
    """The result of an SDK method, which may be a plain value, a concurrent future or an awaitable."""
    if inspect.isawaitable(value):  # some are concurrent futures as well, a use that the SDK deprecates
        return await value
    return await asyncio.wrap_future(value) if isinstance(value, concurrent.futures.Future) else value


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a method of the installed SDK takes a keyword argument of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def open_service(context: Context) -> Service:
    """The run's service client; sends nothing yet.

    Raises MissingExtraError where the SDK is not installed, ConfigurationError for a key that the SDK would refuse.
    """
    try:
        import tinker
    except ImportError as error:
        raise MissingExtraError("Tinker", "tinker") from error
    found = context.shared.get(_SHARED)
    if isinstance(found, Service):
        return found
    endpoint, name = context.wire_endpoint, context.config.name
    key = NO_KEY if endpoint.api_key == ANONYMOUS else endpoint.api_key
    if not key.startswith(KEY_PREFIX):
        raise ConfigurationError(
            f"the API key for {name_of(endpoint.base_url)} does not begin with {KEY_PREFIX}, and Tinker's SDK refuses "
            f"every other key. Give the server a key that does, or leave backend.api_key_env out: {NO_KEY!r} is then "
            "sent."
        )
    calls = Calls(name_of(endpoint.base_url), [key], tinker)
    calls.longest = DAY  # steps and samples wait in the service's queues
    where = {"api_key": key, "base_url": endpoint.base_url}
    shown = {"display_name": name} if accepts(tinker.ServiceClient, "display_name") else {}
    rest = getattr(tinker, "RestClient", None)
    service = Service(
        lambda: tinker.ServiceClient(**where, **shown),
        calls,
        None if rest is None else lambda: rest(**where),
    )
    context.shared[_SHARED] = service
    return service
