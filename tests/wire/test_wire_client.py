"""Every kind of failure on the wire becomes the error class that tells the caller what to do."""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import openai
import pytest
from wire_support import KEY, Server, failing, openai_error

from daunce_api.errors import (
    AmbiguousSubmitError,
    ConfigurationError,
    ContractError,
    DailyLimitError,
    ProviderError,
    RejectedError,
    StopError,
    TransientError,
)
from daunce_api.providers.calls import retry_after
from daunce_api.providers.endpoint import Endpoint, api_key_from, checked_base_url
from daunce_api.providers.openai_wire.client import WireClient


async def failure(server: Server, *, submit: bool = False) -> ProviderError:
    client = server.client()
    call = client.sdk.models.with_raw_response.retrieve("m")
    with pytest.raises(ProviderError) as caught:
        await client.json(call, doing="the test", submit=submit, needs={"id": str})
    return caught.value


STATUS_TABLE = [
    (429, openai_error("slow down", "rate_limit_exceeded"), TransientError, TransientError),
    (429, openai_error("tomorrow", "daily_rate_limit_exceeded"), DailyLimitError, DailyLimitError),
    (429, openai_error("no credit", "insufficient_quota", "insufficient_quota"), StopError, StopError),
    (429, openai_error("no credit", None, "insufficient_quota"), StopError, StopError),
    (402, openai_error("pay"), StopError, StopError),
    (401, openai_error("bad key", "invalid_api_key"), StopError, StopError),
    (403, openai_error("not you"), StopError, StopError),
    (404, openai_error("no such model", "model_not_found"), RejectedError, RejectedError),
    (404, {"object": "error", "message": "vLLM's", "type": "NotFoundError", "code": 404}, RejectedError, RejectedError),
    (404, openai_error("vLLM's", 404, "NotFoundError"), RejectedError, RejectedError),
    (400, openai_error("bad file", None, param="training_file"), RejectedError, RejectedError),
    (413, None, RejectedError, RejectedError),
    (422, {"detail": [{"msg": "FastAPI's"}]}, RejectedError, RejectedError),
    (501, openai_error("not here"), RejectedError, RejectedError),
    (408, openai_error("late"), TransientError, AmbiguousSubmitError),
    (409, openai_error("locked"), TransientError, AmbiguousSubmitError),
    (500, openai_error("oops", None, "server_error"), TransientError, AmbiguousSubmitError),
    (502, b"<html>Bad Gateway</html>", TransientError, AmbiguousSubmitError),
    (503, b"", TransientError, AmbiguousSubmitError),
    (529, {"error": "overloaded"}, TransientError, AmbiguousSubmitError),
]


@pytest.mark.parametrize(("status", "body", "plain", "on_submit"), STATUS_TABLE)
async def test_status_decides_the_class(status: int, body: Any, plain: type, on_submit: type) -> None:
    server = Server(failing(status, body))
    error = await failure(server)
    assert type(error) is plain
    assert error.status == status
    assert type(await failure(server, submit=True)) is on_submit
    assert len(server.requests) == 2  # the SDK repeated nothing


async def test_messages_keep_what_the_server_said() -> None:
    assert "bad file" in str(await failure(Server(failing(400, openai_error("bad file")))))
    assert "overloaded" in str(await failure(Server(failing(529, {"error": "overloaded"}))))
    assert "shut down" in str(await failure(Server(failing(404, openai_error("gone", "model_not_found")))))


async def test_a_long_message_is_not_cut_within_a_key() -> None:
    """Half of a key would no longer be found in it, and stay."""
    key = "sk-proj-" + "0123456789" * 16
    server = Server(failing(502, f"{'x' * 380} authorization: Bearer {key}".encode()))
    client = WireClient.open(Endpoint("http://wire.test/v1", key, "the server"), http_client=server.http())
    with pytest.raises(TransientError) as caught:
        await client.json(client.sdk.models.with_raw_response.retrieve("m"), doing="the test")
    assert key[:12] not in str(caught.value)


async def test_an_answer_that_drips_is_not_waited_for_without_end() -> None:
    """Every byte restarts the SDK's own timeout."""

    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "100000")
            self.end_headers()
            with suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b" ")
                    time.sleep(0.01)

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    client = WireClient.open(Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", KEY), timeout=5)
    client.calls.longest = 0.2
    try:
        call = client.sdk.models.with_raw_response.retrieve("m")
        with pytest.raises(TransientError, match="did not answer in time"):
            await client.json(call, doing="the test")
        call = client.sdk.models.with_raw_response.retrieve("m")
        with pytest.raises(AmbiguousSubmitError, match="did not answer in time"):
            await client.json(call, doing="the test", submit=True)
    finally:
        await client.close()
        server.shutdown()
        server.server_close()


async def test_an_answer_generated_by_another_model_is_not_explained() -> None:
    answer = {"model": "gpt-other", "choices": [{"message": {"content": "yes"}}]}
    with pytest.raises(ContractError, match="another model"):
        await Server(lambda _: answer).echo().generate("ft:m", [{"role": "user", "content": "?"}], max_tokens=4)


def raising(error: type[httpx2.TransportError]) -> Server:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise error(f"with {request.headers['authorization']}", request=request)

    return Server(handler)


@pytest.mark.parametrize("error", [httpx2.ReadTimeout, httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.WriteError])
async def test_a_lost_answer_is_ambiguous_for_a_submit(error: type[httpx2.TransportError]) -> None:
    assert type(await failure(raising(error))) is TransientError
    assert type(await failure(raising(error), submit=True)) is AmbiguousSubmitError


@pytest.mark.parametrize("error", [httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout])
async def test_a_request_that_never_left_is_not_ambiguous(error: type[httpx2.TransportError]) -> None:
    assert type(await failure(raising(error), submit=True)) is TransientError


@pytest.mark.parametrize(
    "body", [b"", b'{"id": "x', b"not json", b"[1]", b"null", b'{"id": 7}', b"{}", b"[" * 100_000, b"\xff\xfe"]
)
async def test_a_body_that_is_not_the_object_asked_for(body: bytes) -> None:
    assert type(await failure(Server(failing(200, body)))) is TransientError
    assert type(await failure(Server(failing(200, body)), submit=True)) is AmbiguousSubmitError


async def test_the_key_is_in_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [
        Server(failing(401, openai_error(f"Incorrect API key provided: {KEY}"))),
        Server(failing(500, f"proxy dump: authorization: Bearer {KEY}".encode())),
        raising(httpx2.ReadError),
    ]
    for server in servers:
        error = await failure(server)
        assert error.__cause__ is None
        assert error.__context__ is None
        assert KEY not in "".join(traceback.format_exception(error))
        assert KEY.encode() not in pickle.dumps(error)
    assert KEY not in repr(Endpoint("http://x/v1", KEY))


async def test_control_characters_of_a_server_do_not_reach_the_terminal() -> None:
    error = await failure(Server(failing(400, openai_error("a\x1b[31mred\x07\x00" + "x" * 5000))))
    assert str(error).isprintable()
    assert len(str(error)) < 700


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 37.0),
        ({"retry-after": "Sun, 99 Nov 99999999999 08:49:37 GMT"}, None),
        ({"retry-after": "tomorrow"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 784111740.0)
    assert retry_after(headers) == seconds


async def test_retry_after_reaches_the_caller() -> None:
    error = await failure(Server(failing(429, openai_error("slow"), {"retry-after-ms": "250"})))
    assert isinstance(error, TransientError)
    assert error.retry_after == 0.25


def test_a_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "  ")
    with pytest.raises(ConfigurationError, match="SOME_KEY"):
        api_key_from("SOME_KEY")
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert api_key_from("SOME_KEY") == KEY
    for broken in ("sk-a b", "sk-a…", "sk-a\nb"):
        monkeypatch.setenv("SOME_KEY", broken)
        with pytest.raises(ConfigurationError) as caught:
            api_key_from("SOME_KEY")
        assert broken not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1", "/v1"])
def test_an_unusable_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="address"):
        checked_base_url(url)


@pytest.mark.parametrize("url", ["http://me:secret@x/v1", "https://x/v1?key=secret"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        checked_base_url(url)
    assert "secret@" not in str(caught.value)
    assert "key=" not in str(caught.value)


async def test_organisation_and_project_go_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
    server = Server(lambda _: {"id": "m"})
    await server.client().sdk.models.retrieve("m")
    assert not {"openai-organization", "openai-project"} & set(server.requests[0].headers)
    official = WireClient.open(Endpoint("https://api.openai.com/v1", KEY), http_client=server.http()).sdk
    await official.models.retrieve("m")
    assert server.requests[1].headers["openai-organization"] == "org-private"


async def test_no_retries_of_the_sdk_and_no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    sdk = WireClient.open(Endpoint("http://127.0.0.1:1/v1", KEY), timeout=5).sdk
    assert sdk.max_retries == 0
    with pytest.raises(openai.APIConnectionError):
        await sdk.models.retrieve("m")
    assert not sdk._client._mounts
    await sdk.close()
    remote = WireClient.open(Endpoint("http://wire.test/v1", KEY)).sdk
    assert remote._client._mounts
    await remote.close()


async def test_a_redirect_takes_no_training_file_elsewhere() -> None:
    """307 keeps method and body; the key would be stripped on the way to another origin, the file would not."""
    received: list[bytes] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(body)
            target = None if self.path == "/there" else f"http://127.0.0.1:{server.server_address[1]}/there"
            self.send_response(200 if target is None else 307)
            if target is not None:
                self.send_header("location", target)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", KEY, "the server")
    try:
        client = WireClient.open(endpoint)
        call = client.sdk.files.with_raw_response.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
        with pytest.raises(RejectedError, match="307"):
            await client.json(call, doing="the test")
        await client.sdk.close()
    finally:
        server.shutdown()
        server.server_close()
    assert len(received) == 1
