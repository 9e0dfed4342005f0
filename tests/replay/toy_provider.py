"""A whole toy provider behind a mock transport, and a small run against it."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from pathlib import Path
from typing import Any

import httpx2

from daunce_api._util.clock import Clock
from daunce_api.config import RunConfig
from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.base import JobRequest
from daunce_api.providers.registry import open_backend
from daunce_api.providers.replay import Session
from daunce_api.score.client import ScoringClient
from daunce_api.store import RunStore
from tests.store_rows import by_key

KEY = "sk-marked-key-4711-do-not-keep"
ORGANISATION = "org-Marked4711Organisation"
COOKIE = "marked-cookie-4711"
EXAMPLES = [EncodedExample(Example(f"e{i}", prompt="p", completion="c"), (5, i, i + 1), (1, 2)) for i in range(6)]
CONFIG: dict[str, Any] = {
    "data": {"train": "a.jsonl", "test": "b.jsonl"},
    "backend": {
        "kind": "openai_wire",
        "base_url": "http://127.0.0.1:8000/v1",
        "model": "base",
        "api_key_env": "DAUNCE_TEST_KEY",
        "scorer": {"options": {"logprobs": 0, "prompts_per_request": 2}},
    },
}


class Provider:
    """Files, jobs that take three looks to finish, and echo completions. The first scoring request is turned away for
    a minute, with an error text that repeats the key."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.looks: dict[str, int] = {}
        self.requests = 0
        self.turned_away = False

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests += 1
        status, body, headers = self._answer(request)
        headers = {
            "content-type": "application/json",
            "set-cookie": f"session={COOKIE}",
            "openai-organization": ORGANISATION,
            "x-request-id": f"req_{self.requests}",
            "server": "toy",
            "content-encoding": "gzip",
            **headers,
        }
        return httpx2.Response(status, content=gzip.compress(json.dumps(body).encode()), headers=headers)

    def _answer(self, request: httpx2.Request) -> tuple[int, dict[str, Any], dict[str, str]]:
        path = request.url.path.removeprefix("/v1")
        if path == "/models":
            return 200, {"object": "list", "data": []}, {}
        if path == "/files":
            return 200, {"id": f"file-{self.requests}", "object": "file"}, {}
        if path == "/fine_tuning/jobs":
            asked = json.loads(request.content)
            job = {
                "id": f"ftjob-{len(self.jobs)}",
                "status": "queued",
                "organization_id": ORGANISATION,
                "metadata": asked["metadata"],
                "fine_tuned_model": None,
            }
            self.jobs.append(job)
            return 200, job, {}
        if path == "/completions":
            return self._completions(request)
        job = next(j for j in self.jobs if path.endswith(j["id"]))
        self.looks[job["id"]] = self.looks.get(job["id"], 0) + 1
        done = self.looks[job["id"]] >= 3
        name = f"ft:base:{job['metadata']['daunce_key']}"
        return (
            200,
            {**job, "status": "succeeded" if done else "running", "fine_tuned_model": name if done else None},
            {},
        )

    def _completions(self, request: httpx2.Request) -> tuple[int, dict[str, Any], dict[str, str]]:
        if not self.turned_away:
            self.turned_away = True
            key = request.headers["authorization"].removeprefix("Bearer ")
            return (
                429,
                {"error": {"message": f"{key} of {ORGANISATION} is too fast", "code": "x"}},
                {"retry-after": "60", "x-request-id": f"for {key} of {ORGANISATION}"},
            )
        asked = json.loads(request.content)
        choices = []
        for index, ids in enumerate(asked["prompt"] if asked["echo"] else []):
            number = sum(asked["model"].encode()) % 97 + 1
            values = [None, *(-(t * number + 1) / 7 for t in ids[1:])]
            choices.append({"index": index, "text": "", "logprobs": {"token_logprobs": values}})
        if not asked["echo"]:
            choices = [{"index": 0, "text": "", "logprobs": {"token_logprobs": []}}]
        return 200, {"model": asked["model"], "choices": choices}, {}


def transport(provider: Any) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.MockTransport(provider))


class NoNetwork:
    """Any request that gets here is a failure of the replay."""

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        raise AssertionError(f"{request.method} {request.url} left for the network")


async def small_run(
    run_dir: Path,
    session: Session,
    provider: Any,
    *,
    members: int = 3,
    config: dict[str, Any] | None = None,
    clock: Clock | None = None,
) -> dict[int, Any]:
    """Upload, train and score some members at the same time; their scores by member."""
    run_config = RunConfig.from_mapping({**(config or CONFIG), "run_dir": str(run_dir)})
    clock = clock or session.clock
    with (
        RunStore.create_or_open(run_dir, {"config": {}}, run_key=session.run_key) as store,
        session,
    ):
        session.check_run(store.run_key)
        async with open_backend(run_config, http_client=transport(provider), replaying=session.replaying) as backend:
            scoring = ScoringClient(backend.scorer, store, clock=clock)

            async def member(k: int) -> None:
                content = f'{{"prompt": "{k}", "completion": "ü"}}\n'.encode()
                file_id = await backend.trainer.upload(f"daunce-{store.run_key}-{k}.jsonl", content)
                request = JobRequest(f"{store.run_key}-m{k}-a0", "base", file_id, k, {}, "s")
                job = await backend.trainer.submit(request)
                while not job.status.final:
                    await clock.sleep(1.0 + 0.1 * k)
                    job = await backend.trainer.get(job.id)
                await scoring.score_member(k, job.model or "", EXAMPLES)

            async with asyncio.TaskGroup() as group:
                for k in range(members):
                    group.create_task(member(k))
        return {k: by_key(store, k) for k in range(members)}


def all_bytes(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def words(text: bytes) -> set[bytes]:
    return set(re.findall(rb"[A-Za-z0-9_-]{6,}", text))
