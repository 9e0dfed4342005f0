"""What the scorers on a :class:`WireClient` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ContractError
from ..base import Closing, ScorerCapabilities
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
        self.capabilities = capabilities

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
