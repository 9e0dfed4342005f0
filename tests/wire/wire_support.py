"""A scripted server behind httpx2's mock transport, and short ways to make the objects under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from daunce_api.backends.base import ScorerCapabilities, TrainerCapabilities
from daunce_api.backends.openai_wire.client import Endpoint, WireClient
from daunce_api.backends.openai_wire.echo import EchoOptions, EchoScorer
from daunce_api.backends.openai_wire.trainer import WireTrainer
from daunce_api.dataset import Example
from daunce_api.tokens import EncodedExample

KEY = "sk-marked-0123456789abcdef"
Handler = Callable[[httpx2.Request], Any]


class Server:
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

    def client(self) -> WireClient:
        return WireClient.open(Endpoint("http://wire.test/v1", KEY, "the server"), http_client=self.http())

    def trainer(self, **options: Any) -> WireTrainer:
        return WireTrainer(self.client(), TrainerCapabilities("test", 3), **options)

    def echo(self, **options: Any) -> EchoScorer:
        return EchoScorer(
            self.client(), ScorerCapabilities("test", "any", max_prompts_per_request=8), EchoOptions(**options)
        )

    def body(self, position: int = -1) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.requests[position].content)
        return body


def encoded(ids: Sequence[int], targets: Sequence[int], name: str = "e") -> EncodedExample:
    return EncodedExample(Example(name, prompt="p", completion="c"), tuple(ids), tuple(targets))


def failing(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Handler:
    def handler(_: httpx2.Request) -> httpx2.Response:
        if isinstance(body, bytes):
            return httpx2.Response(status, content=body, headers=headers)
        return httpx2.Response(status, json=body, headers=headers)

    return handler


def openai_error(
    message: str, code: Any = None, kind: str = "invalid_request_error", param: Any = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def job_object(**changes: Any) -> dict[str, Any]:
    """A job as OpenAI sends it."""
    return {
        "object": "fine_tuning.job",
        "id": "ftjob-1",
        "model": "base",
        "created_at": 1,
        "fine_tuned_model": None,
        "organization_id": "org-x",
        "result_files": [],
        "status": "validating_files",
        "training_file": "file-1",
        "hyperparameters": {"n_epochs": 1},
        "trained_tokens": None,
        "error": {},
        "seed": 0,
        "metadata": {"daunce_key": "abc-m0-a0"},
        **changes,
    }
