"""One real server for all tests, and clients whose every answer is checked against OpenAI's schemas."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import httpx2
import openai
import pytest
from starlette.applications import Starlette

from daunce_api.data.tokenizers import LocalTokenizer
from daunce_api.providers.tokenizers import embedded_folder
from daunce_api.server import EmbeddedServer, InjectSettings, ServerSettings
from daunce_api.server.app import create_app
from daunce_api.server.inject import Injector
from daunce_api.server.service import Service
from daunce_api.server.state import State
from daunce_api.server.tokentext import TokenText
from daunce_api.server.worker import BaseModelFacts

from .schemas import check_response

os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = "daunce-tiny"


class Address(Protocol):
    """Where a server is."""

    base_url: str
    api_key: str


def _check(response: httpx2.Response) -> None:
    response.read()
    request = response.request
    check_response(request.method, request.url.path, response.status_code, response.content)


async def _check_async(response: httpx2.Response) -> None:
    await response.aread()
    request = response.request
    check_response(request.method, request.url.path, response.status_code, response.content)


def connect(server: Address, *, timeout: float = 60.0) -> openai.OpenAI:
    """The official SDK; no retries; every answer validated."""
    http = httpx2.Client(event_hooks={"response": [_check]}, timeout=timeout, verify=False)
    return openai.OpenAI(
        base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=timeout, http_client=http
    )


def connect_async(server: EmbeddedServer, *, timeout: float = 60.0) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(event_hooks={"response": [_check_async]}, timeout=timeout, verify=False)
    return openai.AsyncOpenAI(
        base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=timeout, http_client=http
    )


def raw(server: EmbeddedServer, **headers: str) -> httpx2.Client:
    """Plain HTTP with the key. (``verify``: reading certificates would take longer than most tests.)"""
    root, key = server.base_url.removesuffix("/v1"), {"authorization": f"Bearer {server.api_key}"}
    return httpx2.Client(base_url=root, headers={**key, **headers}, timeout=60, verify=False)


def records(count: int = 12, word: str = "thing") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"a {word} {i}"}]}
        for i in range(count)
    ]


def jsonl(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def upload(client: openai.OpenAI, content: bytes, name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def wait(client: openai.OpenAI, job: str, *, until: Callable[[Any], bool] | None = None, seconds: float = 240) -> Any:
    """Poll a job until it is final (or ``until`` holds)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = client.fine_tuning.jobs.retrieve(job)
        if until(found) if until is not None else found.status in ("succeeded", "failed", "cancelled"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{job} is still {found.status} after {seconds} s")


def submit(
    client: openai.OpenAI, file: str, *, seed: int = 1, n_epochs: int = 1, rate: float = 1.0, **more: Any
) -> Any:
    hyperparameters = {"n_epochs": n_epochs, "batch_size": 4, "learning_rate_multiplier": rate}
    return client.fine_tuning.jobs.create(
        model=more.pop("model", MODEL),
        training_file=file,
        seed=seed,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        **more,
    )


def echo(client: openai.OpenAI, model: str, prompts: list[list[int]], logprobs: int = 1) -> list[list[float]]:
    """Log-probabilities of all ids of token-id prompts."""
    answer = client.completions.create(model=model, prompt=prompts, echo=True, logprobs=logprobs, max_tokens=0)
    return [list(c.logprobs.token_logprobs) for c in answer.choices]


def offline(folder: Path, **options: Any) -> tuple[Starlette, Service]:
    """The application over a state folder, without the processes: jobs stay as they were created, and no model
    answers."""
    settings = ServerSettings(state_dir=folder, **options)
    model = embedded_folder()
    base = BaseModelFacts(MODEL, model, max_context=512, vocabulary=2048, end=1, fingerprint="base")
    injector = Injector(settings.inject or InjectSettings())
    scorer: Any = None
    app = create_app(settings)
    app.state.service = service = Service(
        settings, injector, State(folder), scorer, base, LocalTokenizer(model), TokenText(model)
    )
    jobs: Any = SimpleNamespace(add=lambda job: None)
    service.scheduler = jobs
    return app, service


@pytest.fixture(scope="session")
def nebius(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerSettings(state_dir=tmp_path_factory.mktemp("nebius"), dialect="nebius")) as running:
        yield running


JOB_FAULTS = InjectSettings(daily_limit_after=12, job_failure=0.3, job_stuck=0.3, model_deleted=0.4, seed=4)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """vLLM's dialect, and jobs with faults."""
    settings = ServerSettings(state_dir=tmp_path_factory.mktemp("vllm"), dialect="vllm", inject=JOB_FAULTS)
    with EmbeddedServer(settings) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: EmbeddedServer) -> openai.OpenAI:
    return connect(server)


@pytest.fixture(scope="session")
def http(server: EmbeddedServer) -> Iterator[httpx2.Client]:
    with raw(server) as client:
        yield client


@pytest.fixture(scope="session")
def training_file(client: openai.OpenAI) -> str:
    return upload(client, jsonl(records()))


@pytest.fixture(scope="session")
def fine_tune(client: openai.OpenAI, training_file: str) -> Any:
    """A finished job: 4 epochs of 3 steps at twice the base rate."""
    job = submit(client, training_file, seed=7, n_epochs=4, rate=2.0, suffix="Demo Set", metadata={"daunce_key": "k0"})
    finished = wait(client, job.id)
    if finished.status != "succeeded":
        raise AssertionError(finished.error)
    return finished


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"
