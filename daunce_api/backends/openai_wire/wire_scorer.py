"""What the scorers on a :class:`WireClient` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from ..base import ScorerCapabilities
from .client import WireClient


class WireScorer:
    """Client and capabilities of a scorer. Closing it closes the client."""

    def __init__(self, client: WireClient, capabilities: ScorerCapabilities) -> None:
        self.client = client
        self._capabilities = capabilities

    @property
    def capabilities(self) -> ScorerCapabilities:
        return self._capabilities

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer."""
        self.client.observer = observer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.close()
