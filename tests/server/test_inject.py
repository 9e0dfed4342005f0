"""Faults on purpose: their rates, that they follow from the seed alone, and how each looks on the wire."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from pathlib import Path

import httpx2
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Scope

from daunce_api.errors import ConfigurationError
from daunce_api.providers.server_settings import REQUEST_FAULTS
from daunce_api.server import EmbeddedServer, InjectSettings, ServerSettings
from daunce_api.server.gate import Gate
from daunce_api.server.inject import Injector

from .conftest import JOB_FAULTS, MODEL, connect, jsonl, offline, records, submit, upload, wait


def test_text_form() -> None:
    parsed = InjectSettings.parse("rate_limit=0.1, error_500=0.05,seed=3,daily_limit_after=7")
    assert parsed == InjectSettings(rate_limit=0.1, error_500=0.05, seed=3, daily_limit_after=7)
    assert InjectSettings.parse("") == InjectSettings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate_limits=0.1", "rate_limit"),
        ("rate_limit", "NAME=VALUE"),
        ("rate_limit=1.5", "rate_limit"),
        ("rate_limit=x", "rate_limit"),
        ("rate_limit=nan", "rate_limit"),
        ("drop=0.1,drop=0.2", "twice"),
        ("rate_limit=0.6,drop=0.6", "add up"),
        ("seed=1.5", "seed"),
    ],
)
def test_text_form_refusals(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        InjectSettings.parse(text)


def test_rates_hold_and_follow_from_the_seed_alone() -> None:
    rates = dict.fromkeys(REQUEST_FAULTS, 0.05) | {"drop": 0.2}
    draws = [Injector(InjectSettings(**rates, seed=s)) for s in (1, 1, 2)]
    seen = [[i.request_fault("GET /v1/models") for _ in range(4000)] for i in draws]
    assert seen[0] == seen[1] != seen[2]
    counts = Counter(seen[0])
    for fault, rate in rates.items():
        assert counts[fault] / 4000 == pytest.approx(rate, abs=0.02)
    assert counts[None] / 4000 == pytest.approx(1 - sum(rates.values()), abs=0.03)


def test_routes_do_not_disturb_each_other() -> None:
    alone, mixed = (Injector(InjectSettings(error_500=0.3, seed=5)) for _ in range(2))
    expected = [alone.request_fault("A") for _ in range(50)]
    got = []
    for _ in range(50):
        mixed.request_fault("B")
        got.append(mixed.request_fault("A"))
    assert got == expected


def test_job_faults_and_the_daily_limit() -> None:
    injector = Injector(InjectSettings(job_failure=0.2, job_stuck=0.1, model_deleted=0.1, daily_limit_after=2, seed=1))
    counts = Counter(injector.job_fault(n) for n in range(3000))
    assert counts["job_failure"] / 3000 == pytest.approx(0.2, abs=0.03)
    assert counts["job_stuck"] / 3000 == pytest.approx(0.1, abs=0.03)
    assert [injector.accept_job() for _ in range(4)] == [True, True, False, False]
    assert [injector.vanishes_now("m") for _ in range(3)] == [False, True, True]


BODY = json.dumps({"object": "list", "data": [{"id": "x" * 50}]}).encode()


class Once:
    """An application whose one route counts what it did, with an injector and the gate around it."""

    def __init__(self, settings: InjectSettings) -> None:
        self.acted = 0
        self.sent: list[Message] = []
        injector = Injector(settings)

        async def act(request: Request) -> Response:
            self.acted += 1
            return Response(BODY, media_type="application/json")

        async def call(request: Request) -> Response:
            return await injector.answer("models", act, request)

        gate = Middleware(Gate, settings=ServerSettings(api_key="k"))
        self.app = Starlette(routes=[Route("/v1/models", call)], middleware=[gate])

    async def get(self) -> None:
        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/models",
            "headers": [(b"authorization", b"Bearer k")],
        }
        received = asyncio.Event()

        async def receive() -> Message:
            if received.is_set():
                await asyncio.Event().wait()  # the client stays; cancelled by the end of the hang
            received.set()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            self.sent.append(message)

        await self.app(scope, receive, send)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    @property
    def finished(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)


@pytest.mark.parametrize(
    ("fault", "acted", "status", "finished"),
    [
        ("rate_limit", 0, 429, True),
        ("rate_limit_bare", 0, 429, True),
        ("error_500", 0, 500, True),
        ("error_502", 0, 502, True),
        ("timeout_before", 0, 504, False),
        ("timeout_after", 1, 504, False),
        ("drop", 1, 200, False),
        ("truncated", 1, 200, True),
        ("malformed", 1, 200, True),
    ],
)
async def test_each_fault_on_the_wire(fault: str, acted: int, status: int, finished: bool) -> None:
    once = Once(InjectSettings.model_validate({fault: 1, "retry_after": 0.25, "hang": 0.05}))
    await once.get()
    assert (once.acted, once.sent[0]["status"], once.finished) == (acted, status, finished)
    headers = {k.decode(): v.decode() for k, v in once.sent[0]["headers"]}
    assert (headers.get("retry-after-ms"), headers.get("retry-after")) == (
        ("250", "1") if fault == "rate_limit" else (None, None)
    )
    if fault in ("drop", "truncated"):
        assert once.body == BODY[: len(BODY) // 2]
    if fault in ("truncated", "malformed"):
        assert int(headers["content-length"]) == len(once.body)
        with pytest.raises(ValueError):
            json.loads(once.body)


async def test_the_answer_before_is_sent_again() -> None:
    once = Once(InjectSettings(duplicated=1))
    await once.get()
    assert once.body == BODY  # there is none before the first
    once.sent.clear()
    await once.get()
    assert (once.acted, once.body, once.finished) == (2, BODY, True)


async def test_two_requests_get_each_others_answers() -> None:
    injector = Injector(InjectSettings(swapped=1, hang=60))

    async def request(body: bytes) -> bytes:
        async def act(request: Request) -> Response:
            return Response(body)

        return bytes((await injector.answer("models", act, Request({"type": "http"}))).body)

    assert await asyncio.gather(request(b"first"), request(b"second")) == [b"second", b"first"]


async def test_what_is_new_is_hidden_for_a_while(tmp_path: Path) -> None:
    """Files, jobs and models exist before they are found, and are found before they are listed."""
    inject = InjectSettings(file_lag=1000, job_lag=1000, model_lag=1000, list_lag=2000)
    app, service = offline(tmp_path, inject=inject)
    service.state.file_path("file-old").write_text("x")
    old = service.state.add_file("file-old", "a", "fine-tune")

    def pass_time(seconds: float) -> None:
        born = service.injector._born
        born |= {identity: moment - seconds for identity, moment in born.items()}

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as http:

        async def listed(path: str) -> list[str]:
            return [found["id"] for found in (await http.get(f"/v1/{path}")).json()["data"]]

        part = ("train.jsonl", jsonl(records()))
        file = (await http.post("/v1/files", files={"file": part}, data={"purpose": "fine-tune"})).json()["id"]
        job = {"model": MODEL, "training_file": file}
        assert (await http.get(f"/v1/files/{file}")).status_code == 404
        assert (await http.post("/v1/fine_tuning/jobs", json=job)).json()["error"]["param"] == "training_file"
        pass_time(1001)
        assert (await http.get(f"/v1/files/{file}")).status_code == 200
        assert await listed("files?limit=1") == [old["id"]]
        created = (await http.post("/v1/fine_tuning/jobs", json=job)).json()["id"]
        assert (await http.get(f"/v1/fine_tuning/jobs/{created}")).status_code == 404
        assert await listed("fine_tuning/jobs") == []
        service.state.insert("models", id="ft:m", job=created, base=MODEL, created_at=1, adapter="a", fingerprint="f")
        service.injector.born("ft:m")
        assert (await http.get("/v1/models/ft:m")).status_code == 404
        pass_time(1001)
        assert await listed("files?limit=1") == [file]
        assert (await http.get(f"/v1/fine_tuning/jobs/{created}")).status_code == 200
        assert (await http.get("/v1/models/ft:m")).status_code == 200
        assert await listed("fine_tuning/jobs") == []
        assert await listed("models") == [MODEL]
        pass_time(1001)
        assert await listed("fine_tuning/jobs") == [created]
        assert await listed("models") == [MODEL, "ft:m"]
    service.state.close()


class Loopback:
    """A real HTTP server of the one-answer application, in a thread."""

    def __init__(self, settings: InjectSettings, timeout: float = 60) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(Once(settings).app, log_config=None, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._timeout = timeout

    def __enter__(self) -> openai.OpenAI:
        self._thread.start()
        url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        return openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=self._timeout)

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("rate_limit", openai.RateLimitError),
        ("rate_limit_bare", openai.RateLimitError),
        ("error_500", openai.InternalServerError),
        ("error_502", openai.InternalServerError),
        ("timeout_before", openai.APITimeoutError),
        ("timeout_after", openai.APITimeoutError),
        ("drop", openai.APIConnectionError),
        ("truncated", ValueError),
        ("malformed", ValueError),
    ],
)
def test_each_fault_as_the_sdk_sees_it(fault: str, seen: type[Exception]) -> None:
    hangs = fault.startswith("timeout")
    with Loopback(InjectSettings.model_validate({fault: 1}), 0.2 if hangs else 60) as client, pytest.raises(seen):
        client.models.list()


def test_over_http_the_faults_come_as_planned() -> None:
    settings = InjectSettings(drop=0.4, seed=4)
    planned = Injector(settings)
    with Loopback(settings) as client:
        for _ in range(20):
            fault = planned.request_fault("models")
            if fault is None:
                assert len(client.models.list().data) == 1
            else:
                with pytest.raises(openai.APIConnectionError):
                    client.models.list()


@pytest.mark.slow
def test_job_faults_over_http(vllm: EmbeddedServer) -> None:
    """Stuck and failed jobs, vanishing models, the daily limit."""
    expected = [Injector(JOB_FAULTS).job_fault(n) for n in range(1, 13)]
    assert {"job_failure", "job_stuck", "model_deleted"} <= set(expected)
    client = connect(vllm)
    file = upload(client, jsonl(records()))
    jobs = [submit(client, file, n_epochs=1) for _ in range(12)]
    with pytest.raises(openai.RateLimitError) as caught:
        submit(client, file)
    assert (caught.value.code, caught.value.type) == ("daily_rate_limit_exceeded", "invalid_request_error")
    final = [wait(client, j.id, until=lambda j: j.status not in ("validating_files", "queued")) for j in jobs]
    for job, fault in zip(final, expected, strict=True):
        if fault == "job_stuck":
            assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
            assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
            continue
        done = wait(client, job.id)
        assert (done.status, done.error is None) == (
            ("failed", False) if fault == "job_failure" else ("succeeded", True)
        )
        if fault == "model_deleted":
            client.completions.create(model=done.fine_tuned_model, prompt=[5], max_tokens=0)
            with pytest.raises(openai.NotFoundError) as gone:
                client.completions.create(model=done.fine_tuned_model, prompt=[5], max_tokens=0)
            assert gone.value.code == "model_not_found"
    assert client.models.retrieve(MODEL).id == MODEL
