"""Tinker's client (SDK ``tinker``), shared by the trainer and the scorer of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ...errors import MissingExtraError
from ..failures import Failures
from ..registry import Context
from ..sdk_calls import SdkCalls

_SHARED = "tinker"


class Service:
    """A ``tinker.ServiceClient`` that closes when its last user does."""

    def __init__(self, client: Any, calls: SdkCalls) -> None:
        self.client = client
        self.calls = calls
        self._users = 0

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
        if self._users == 0:
            await self.start(lambda: self.client.close("success"), doing="closing the session")


def open_service(context: Context) -> Service:
    """The run's service client. Raises MissingExtraError where the SDK is not installed."""
    try:
        import tinker
    except ImportError as error:
        raise MissingExtraError("Tinker", "tinker") from error
    found = context.shared.get(_SHARED)
    if isinstance(found, Service):
        return found
    endpoint = context.wire_endpoint
    client = tinker.ServiceClient(
        api_key=endpoint.api_key, base_url=endpoint.base_url, display_name=context.config.name
    )
    service = Service(client, SdkCalls(tinker, Failures("Tinker", [endpoint.api_key])))
    context.shared[_SHARED] = service
    return service
