"""What every request passes: the key, the limits, the headers, OpenAI's error shape."""

from __future__ import annotations

import json
import logging
import socket
import sqlite3
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope

from daunce_api.errors import ConfigurationError
from daunce_api.providers.endpoint import is_loopback
from daunce_api.providers.options import parse_options
from daunce_api.server import EmbeddedServer, ServerSettings, run_server
from daunce_api.server.app import ROUTES
from daunce_api.server.gate import Gate
from daunce_api.server.requests import CreateChatCompletion, CreateCompletion, CreateJob
from daunce_api.server.run import _bind

from .conftest import MODEL, raw
from .schemas import check, check_response

ROUTES = [(m, p.replace("{model:path}", "x").replace("{file_id}", "x").replace("{job_id}", "x")) for m, p, *_ in ROUTES]


@pytest.fixture(scope="module")
def stranger(server: EmbeddedServer) -> Iterator[httpx2.Client]:
    """A client without the key."""
    with httpx2.Client(base_url=server.base_url.removesuffix("/v1"), timeout=60, verify=False) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/v1/unknown"), ("PUT", "/v1/files")])
def test_every_route_asks_for_the_key(server: EmbeddedServer, stranger: httpx2.Client, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {server.api_key}"}):
        response = stranger.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        check("ErrorResponse", response.json())
        assert server.api_key not in response.text


def test_health_needs_no_key_and_says_nothing(stranger: httpx2.Client) -> None:
    response = stranger.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/files/", 404, "unknown_url"),
        ("PUT", "/v1/files", 405, "method_not_supported"),
        ("GET", "/v1/completions", 405, "method_not_supported"),
        ("GET", "/v1/models/no-such", 404, "model_not_found"),
        ("GET", "/v1/files/file-no", 404, None),
        ("GET", "/v1/fine_tuning/jobs/ftjob-no", 404, None),
        ("GET", "/v1/fine_tuning/jobs/ftjob-no/events", 404, None),
        ("POST", "/v1/fine_tuning/jobs/ftjob-no/cancel", 404, None),
    ],
)
def test_errors_have_openai_s_shape(http: httpx2.Client, method: str, path: str, status: int, code: str | None) -> None:
    response = http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    check("ErrorResponse", response.json())


@pytest.mark.parametrize(
    "identity",
    ["..%2f..%2fstate.sqlite", "%2e%2e", "%2e", "%00", "file-x%0d%0aset-cookie:a", "a%2fb", "' OR 1=1 --", "%ff%fe"],
)
def test_ids_never_become_paths(server: EmbeddedServer, http: httpx2.Client, identity: str) -> None:
    for path in (f"/v1/files/{identity}", f"/v1/files/{identity}/content", f"/v1/fine_tuning/jobs/{identity}"):
        response = http.get(path)
        assert response.status_code in (404, 405)
        check("ErrorResponse", response.json())
        assert b"SQLite" not in response.content
        assert "set-cookie" not in response.headers
    assert http.delete(f"/v1/models/{identity}").status_code in (404, 405)


def test_headers_name_the_request_and_the_limit(http: httpx2.Client) -> None:
    first, second = http.get("/v1/models"), http.get("/v1/models")
    assert first.headers["x-request-id"].startswith("req_")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert int(first.headers["openai-processing-ms"]) >= 0
    assert int(second.headers["x-ratelimit-limit-requests"]) == 60_000
    assert 0 < int(second.headers["x-ratelimit-remaining-requests"]) < 60_000
    assert second.headers["x-ratelimit-reset-requests"].endswith("s")
    assert "server" not in first.headers
    assert http.get("/v1/none").headers["x-request-id"].startswith("req_")


def test_bodies_are_limited(server: EmbeddedServer, http: httpx2.Client) -> None:
    size = 33 * 1024**2
    response = http.post("/v1/completions", headers={"content-type": "application/json"}, content=b" " * size)
    assert response.status_code == 413
    check("ErrorResponse", response.json())

    def chunks() -> Iterator[bytes]:  # no content-length: counted as it comes
        for _ in range(33):
            yield b" " * 1024**2

    with raw(server) as other:
        response = other.post("/v1/completions", headers={"content-type": "application/json"}, content=chunks())
    assert response.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"nan",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b'{"model": "x", "prompt": ' + b"9" * 5000 + b"}",
        b'{"model": "daunce-tiny", "prompt": [5], "temperature": 1e999}',
        b'{"model": "\\u0000", "prompt": [5]}',
        json.dumps({"model": "\x1b[31m<script>" * 100, "prompt": [5]}).encode(),
    ],
)
def test_hostile_json_is_refused_politely(http: httpx2.Client, body: bytes) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 404)
    check("ErrorResponse", response.json())
    assert len(response.content) < 2000


def test_json_must_be_declared(http: httpx2.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": [5]})
    for kind in ("text/plain", "multipart/form-data", ""):
        response = http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert response.status_code == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
names = st.sampled_from(
    [*CreateJob.model_fields, *CreateCompletion.model_fields, *CreateChatCompletion.model_fields, "unknown"]
)
VALID: dict[str, dict[str, Any]] = {
    "completions": {"model": MODEL, "prompt": [5, 6], "max_tokens": 2},
    "chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "fine_tuning/jobs": {"model": MODEL, "training_file": "file-none"},
}


@settings(max_examples=60)
@given(path=st.sampled_from(sorted(VALID)), change=st.dictionaries(names, json_values, max_size=4), whole=st.booleans())
def test_random_bodies_never_break_the_server(
    http: httpx2.Client, path: str, change: dict[str, Any], whole: bool
) -> None:
    response = http.post(f"/v1/{path}", json=VALID[path] | change if whole else change)
    assert response.status_code < 500
    check_response("POST", f"/v1/{path}", response.status_code, response.content)


@settings(max_examples=40)
@given(
    path=st.sampled_from(["files", "fine_tuning/jobs", "fine_tuning/jobs/x/events", "models", "batches"]),
    query=st.dictionaries(
        st.sampled_from(["after", "limit", "order", "purpose", "metadata", "metadata[a]", "metadata[\x00]"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    ),
)
def test_random_queries_never_break_the_server(http: httpx2.Client, path: str, query: dict[str, str]) -> None:
    response = http.get(f"/v1/{path}", params=query)
    assert response.status_code < 500
    if path != "batches" or response.status_code >= 400:
        check_response("GET", f"/v1/{path}", response.status_code, response.content)


def test_more_conditions_than_a_job_has_metadata_are_refused(http: httpx2.Client) -> None:
    response = http.get("/v1/fine_tuning/jobs", params={f"metadata[{i}]": "x" for i in range(2000)})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata")


@settings(max_examples=40)
@given(name=st.text(max_size=20), content=st.binary(max_size=40), purpose=st.text(max_size=9) | st.just("fine-tune"))
def test_random_uploads_never_break_the_server(http: httpx2.Client, name: str, content: bytes, purpose: str) -> None:
    name, purpose = (text.encode(errors="replace").decode() for text in (name, purpose))
    response = http.post("/v1/files", files={"file": (name or "x", content)}, data={"purpose": purpose})
    assert response.status_code < 500
    check_response("POST", "/v1/files", response.status_code, response.content)


# --- the layer by itself ---------------------------------------------------------------------------------------------


class Harness:
    """The gate around an application that does one thing."""

    def __init__(self, app: Any, **options: Any) -> None:
        self.gate = Gate(app, ServerSettings(**options))

    async def get(self, **headers: str) -> tuple[int, dict[str, str], Any]:
        sent: list[Message] = []
        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/models",
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.gate(scope, receive, send)
        answered = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return sent[0]["status"], answered, json.loads(b"".join(m.get("body", b"") for m in sent[1:]) or b"null")


async def empty(scope: Scope, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def test_requests_beyond_the_rate_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 100.0
    monkeypatch.setattr("daunce_api.server.gate.time.monotonic", lambda: moment)
    harness = Harness(empty, api_key="k", requests_per_minute=2)
    key = {"authorization": "Bearer k"}
    first, second = await harness.get(**key), await harness.get(**key)
    assert [first[1]["x-ratelimit-remaining-requests"], second[1]["x-ratelimit-remaining-requests"]] == ["1", "0"]
    assert second[1]["x-ratelimit-reset-requests"] == "60.000s"
    status, headers, body = await harness.get(**key)
    assert (status, body["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "30")
    moment += 30
    assert (await harness.get(**key))[0] == 200


async def test_without_a_key_only_this_machine_is_answered() -> None:
    harness = Harness(empty)
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert (await harness.get(host=host))[0] == 200
    assert (await harness.get(host="localhost", origin="https://example.com"))[0] == 403
    for host in ("example.com", "127.0.0.1.example.com", "", "[::ffff:8.8.8.8]", "["):
        assert (await harness.get(host=host))[0] == 403


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ZeroDivisionError("secret text"), 500, None),
        (sqlite3.OperationalError("database or disk is full"), 503, "storage_unavailable"),
        (OSError(28, "No space left on device"), 503, "storage_unavailable"),
    ],
)
async def test_failures_are_said_without_detail(
    failure: Exception, status: int, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(scope: Scope, receive: Any, send: Any) -> None:
        raise failure

    with caplog.at_level(logging.DEBUG):
        answered, _, body = await Harness(fail, api_key="k").get(authorization="Bearer k")
    assert (answered, body["error"]["code"]) == (status, code)
    check("ErrorResponse", body)
    assert "secret" not in json.dumps(body) + caplog.text
    assert caplog.records


async def test_a_client_that_leaves_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def leave(scope: Scope, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    with pytest.raises(IndexError):  # nothing was sent
        await Harness(leave, api_key="k").get(authorization="Bearer k")
    assert not caplog.records


def test_other_machines_need_a_key() -> None:
    with pytest.raises(ConfigurationError, match="no API key"):
        run_server(ServerSettings(), host="0.0.0.0")
    assert [is_loopback(h) for h in ("localhost", "127.9.9.9", "::1", "0.0.0.0", "10.0.0.1", "evil")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_key_is_in_no_representation() -> None:
    assert "marked-key" not in repr(ServerSettings(api_key="marked-key"))
    for wrong in ({"api_key": "marked-key", "workers": "many"}, {"api_key": "marked-key "}):
        with pytest.raises(ConfigurationError) as caught:
            parse_options(ServerSettings, wrong, "here")
        assert "marked-key" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_an_answer_on_a_kept_connection_waits_for_no_acknowledgement() -> None:
    """Nagle's algorithm and a client's delayed acknowledgement make 40 ms of every request; asyncio turns the first off
    for sockets that name their protocol."""
    with _bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
