"""Every answer that a server could send, to every reader of answers: a result, or an error of the package."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2

from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import DaunceError
from daunce_api.providers.base import JobRequest, ScorerCapabilities, TrainerCapabilities
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire.client import WireClient
from daunce_api.providers.openai_wire.echo import EchoOptions, EchoScorer
from daunce_api.providers.openai_wire.trainer import WireTrainer, WireTrainerOptions

EXAMPLE = EncodedExample(Example("e", prompt="p", completion="c"), (5, 6, 7), (1, 2))
REQUEST = JobRequest("abc-m0-a1", "base", "file-1", 7, {"n_epochs": 1}, "suffix")

JOB: dict[str, Any] = {
    "object": "fine_tuning.job",
    "id": "ftjob-1",
    "model": "base",
    "created_at": 1,
    "fine_tuned_model": "ft:base:x",
    "status": "succeeded",
    "training_file": "file-1",
    "trained_tokens": 10,
    "error": {"code": None, "message": None, "param": None},
    "metadata": {"daunce_key": "abc-m0-a1"},
}
FILE = {"id": "file-1", "object": "file", "bytes": 3, "filename": "name.jsonl", "purpose": "fine-tune", "created_at": 1}
EVENT = {"id": "e", "object": "fine_tuning.job.event", "message": "step", "type": "metrics", "created_at": 1,
         "data": {"step": 1, "total_steps": 2}}  # fmt: skip
CHOICE = {
    "index": 0,
    "text": "",
    "prompt_token_ids": [5, 6, 7],
    "token_ids": [],
    "logprobs": {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"b": -1.0}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    },
}
TEMPLATES: list[dict[str, Any]] = [
    JOB,
    {"object": "list", "data": [JOB], "has_more": False},
    {"object": "list", "data": [FILE], "has_more": False},
    {"object": "list", "data": [EVENT], "has_more": False},
    FILE,
    {"id": "base", "object": "model", "owned_by": "x", "created": 1, "shutdown_date": "2027-01-14"},
    {"id": "x", "object": "model", "deleted": True},
    {"id": "cmpl", "object": "text_completion", "model": "base", "choices": [CHOICE]},
    {"error": {"message": "no", "type": "x", "param": None, "code": "model_not_found"}},
]
STATUSES = (200, 200, 200, 200, 400, 401, 404, 409, 429, 500, 502)


def calls(client: WireClient) -> list[Callable[[], Awaitable[Any]]]:
    """One call of every reader."""
    trainer = WireTrainer(client, TrainerCapabilities("test", 3), WireTrainerOptions())
    scorer = EchoScorer(client, ScorerCapabilities("test", "any"), EchoOptions(return_token_ids=True))
    plain = EchoScorer(client, ScorerCapabilities("test", "any"), EchoOptions(max_tokens=1))
    return [
        lambda: trainer.upload("name.jsonl", b"{}"),
        lambda: trainer.find_file("name.jsonl", 3),
        lambda: trainer.submit(REQUEST),
        lambda: trainer.find_job("abc-m0-a1"),
        lambda: trainer.get("ftjob-1"),
        lambda: trainer.cancel("ftjob-1"),
        lambda: trainer.model_info("base"),
        lambda: trainer.delete_model("ft:base:x"),
        lambda: trainer.delete_file("file-1"),
        lambda: scorer.score("base", [EXAMPLE]),
        lambda: plain.score("base", [EXAMPLE]),
        lambda: scorer.probe("base", EXAMPLE),
        lambda: plain.probe("base", EXAMPLE),
    ]


CALLS = 13


def changed(template: int, path: list[int], value: Any) -> dict[str, Any]:
    """A good answer with one place replaced; ``path`` says which child to go into at each level."""
    answer = copy.deepcopy(TEMPLATES[template % len(TEMPLATES)])
    here: Any = answer
    for step, number in enumerate(path):
        keys: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            break
        key = keys[number % len(keys)]
        if step == len(path) - 1 or not isinstance(here[key], dict | list) or not here[key]:
            here[key] = value
            break
        here = here[key]
    return answer


def answered(call: int, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
    """Give one answer to one reader. Raises whatever is not an error of the package."""

    def handler(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=content, headers={"content-type": "application/json", **(headers or {})})

    async def run() -> None:
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
        async with WireClient.open(Endpoint("http://wire.test/v1", "sk-test-key", "it"), http_client=http) as client:
            try:
                answer = await calls(client)[call % CALLS]()
                check_storable(answer)
            except DaunceError as error:
                text = str(error)
                assert all(c.isprintable() or c == "\n" for c in text), f"control characters in {text!r}"

    asyncio.run(run())


def check_storable(answer: Any) -> None:
    """Every text of a result can be stored. Raises UnicodeEncodeError."""
    if isinstance(answer, str):
        answer.encode()
    elif dataclasses.is_dataclass(answer):
        for item in dataclasses.fields(answer):
            check_storable(getattr(answer, item.name))
    elif isinstance(answer, list | tuple):
        for item in answer:
            check_storable(item)


def as_json(value: Any) -> bytes:
    """JSON with everything that Python writes beyond the standard (NaN, lone surrogates as escapes)."""
    return json.dumps(value).encode()
