"""What the scorers on a :class:`WireClient` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from ...data.tokenizers import EncodedExample
from ..base import ScorerCapabilities, TokenScores
from ..registry import Context
from .client import WireClient


def open_client(context: Context, *, timeout: float, concurrency: int) -> WireClient:
    """A client of the config's endpoint with a connection for each of the requests that may be under way."""
    return WireClient.open(
        context.wire_endpoint,
        http_client=context.http_client,
        timeout=timeout,
        connections=max(concurrency, context.config.scoring.concurrency or 1),
    )


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


class OneByOneScorer(WireScorer, ABC):
    """A scorer of servers that take one prompt a request."""

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, a request each.

        Raises RejectedError for an example over the context length, ContractError for an answer that does not hold
        what was asked for.
        """
        return [await self._score(model, example) for example in batch]

    @abstractmethod
    async def _score(self, model: str, example: EncodedExample) -> TokenScores: ...
