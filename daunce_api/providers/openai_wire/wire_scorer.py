"""What the scorers on a :class:`WireClient` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...data.tokenizers import EncodedExample
from ...errors import ContractError
from ..base import Closing, ScorerCapabilities, TokenScores
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


class WireScorer(Closing):
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

    async def generate(self, model: str, asked: str | Sequence[Mapping[str, Any]], *, max_tokens: int) -> str:
        """The model's most likely answer, at temperature 0; see :class:`~daunce_api.providers.base.Generator`."""
        plain = isinstance(asked, str)
        body = {"prompt": asked} if plain else {"messages": list(asked)}
        path = "completions" if plain else "chat/completions"
        answer = await self.client.post(
            path, {"model": model, **body, "max_tokens": max_tokens, "temperature": 0}, doing="generating an answer"
        )
        try:
            choice = answer["choices"][0]
            text = choice["text"] if plain else choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str) or not text:
            raise ContractError(f"{self.client.provider} generated no text. Give the answer instead.")
        return text

    async def close(self) -> None:
        await self.client.close()


class OneByOneScorer(WireScorer, ABC):
    """A scorer of servers that take one prompt a request."""

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, a request each.

        Raises RejectedError for an example over the context length, ContractError for an answer that does not hold
        what was requested.
        """
        return [await self._score(model, example) for example in batch]

    @abstractmethod
    async def _score(self, model: str, example: EncodedExample) -> TokenScores: ...
