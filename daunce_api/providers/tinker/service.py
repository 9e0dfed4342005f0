"""Tinker's client (SDK ``tinker``), shared by the trainer and the scorer of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import MissingExtraError, ProviderError
from ..failures import Failures
from ..registry import Context
from ..sdk_calls import SdkCalls

_SHARED = "tinker"


class Service:
    """A ``tinker.ServiceClient``, opened at its first use, which closes when its last user does."""

    def __init__(self, connect: Callable[[], Any], look_up: Callable[[], Any], calls: SdkCalls) -> None:
        """``connect`` makes the client of a session, ``look_up`` the one of what Tinker keeps. Both send requests and
        wait for them."""
        self.calls = calls
        self._connect = connect
        self._look_up = look_up
        self._client: Any = None
        self._rest: Any = None
        self._opening = asyncio.Lock()
        self._users = 0

    async def client(self) -> Any:
        """The SDK's client. Raises the errors of ``backends/base.py`` where no session can be opened."""
        async with self._opening:
            if self._client is None:
                self._client = await self.calls.call(asyncio.to_thread(self._connect), doing="opening a session")
        return self._client

    async def rest(self) -> Any:
        """The SDK's client of what Tinker keeps: training runs and checkpoints. It needs no session."""
        async with self._opening:
            if self._rest is None:
                self._rest = await self.calls.call(asyncio.to_thread(self._look_up), doing="connecting")
        return self._rest

    async def start(self, create: Callable[[], Any], *, doing: str, submit: bool = False) -> Any:
        """The result of an SDK method that returns a future. The method itself may open a session, which blocks, so
        it runs in a thread."""

        async def run() -> Any:
            return await (await asyncio.to_thread(create))

        return await self.calls.call(run(), doing=doing, submit=submit)

    def enter(self) -> None:
        self._users += 1

    async def leave(self) -> None:
        self._users -= 1
        if self._users == 0 and self._client is not None:
            client, self._client = self._client, None
            with suppress(ProviderError):  # a session that is not closed ends by itself
                await self.start(lambda: client.close("success"), doing="closing the session")


def open_service(context: Context) -> Service:
    """The run's service client; sends nothing yet. Raises MissingExtraError where the SDK is not installed."""
    try:
        import tinker
    except ImportError as error:
        raise MissingExtraError("Tinker", "tinker") from error
    found = context.shared.get(_SHARED)
    if isinstance(found, Service):
        return found
    endpoint, name = context.wire_endpoint, context.config.name
    service = Service(
        lambda: tinker.ServiceClient(api_key=endpoint.api_key, base_url=endpoint.base_url, display_name=name),
        lambda: tinker.RestClient(api_key=endpoint.api_key, base_url=endpoint.base_url),
        SdkCalls(tinker, Failures("Tinker", [endpoint.api_key])),
    )
    context.shared[_SHARED] = service
    return service
