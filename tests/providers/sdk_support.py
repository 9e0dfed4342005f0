"""A scripted service behind httpx's mock transport, which the providers' SDKs speak through."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

httpx: Any = pytest.importorskip("httpx")  # of the providers' SDKs; ours speaks httpx2

KEY = "key-marked-0123456789"
Handler = Callable[[Any], Any]


class Service:
    """Answers by "METHOD path" (longest prefix of the path wins) with JSON, a response, or a function of the request;
    an exception is raised as the transport's. A list is used up in order."""

    def __init__(self, **routes: Any) -> None:
        self.routes: dict[str, Any] = dict(routes)
        self.requests: list[Any] = []

    def on(self, route: str, answer: Any) -> Service:
        self.routes[route] = answer
        return self

    def __call__(self, request: Any) -> Any:
        self.requests.append(request)
        asked = f"{request.method} {request.url.path}"
        known = [route for route in self.routes if asked.startswith(route)]
        if not known:
            return httpx.Response(404, json={"error": {"message": f"no route {asked}"}})
        route = max(known, key=len)
        answer = self.routes[route]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def http(self) -> Any:
        return httpx.AsyncClient(transport=httpx.MockTransport(self))

    @property
    def paths(self) -> list[str]:
        return [f"{r.method} {r.url.path}" for r in self.requests]

    def bodies(self, route: str) -> list[dict[str, Any]]:
        return [json.loads(r.content) for r in self.requests if f"{r.method} {r.url.path}".startswith(route)]


def error(status: int, message: str = "no", code: Any = None, headers: dict[str, str] | None = None) -> Any:
    body = {"error": {"message": message, "type": "x", "code": code}}
    return httpx.Response(status, json=body, headers=headers)
