"""A scripted server behind httpx2's mock transport, which OpenAI's SDK speaks through."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire.client import WireClient

KEY = "sk-marked-0123456789abcdef"
Handler = Callable[[httpx2.Request], Any]


class ScriptedServer:
    """Answers requests with what a function returns (a response, or JSON), and remembers them."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.handler(request)
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)

    def http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.MockTransport(self))

    def client(self, base_url: str = "http://wire.test/v1") -> WireClient:
        return WireClient.open(Endpoint(base_url, KEY, "the server"), http_client=self.http())

    def body(self, position: int = -1) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.requests[position].content)
        return body


def encoded(ids: Sequence[int], targets: Sequence[int], name: str = "e") -> EncodedExample:
    return EncodedExample(Example(name, prompt="p", completion="c"), tuple(ids), tuple(targets))
