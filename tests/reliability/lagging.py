"""A provider over real HTTP that lags behind itself, loses answers and lies about whose they are.

Time is injected: provider and run share a clock that moves where somebody sleeps, ``SPEED`` times as fast as the
wall's, so that a grace period of minutes takes a second and a slow machine takes none of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

SPEED = 200.0
JOB_SECONDS = 20.0
"""How long a job takes, on the fast clock."""


class FastClock:
    """A ``Clock`` on which sleeping is ``SPEED`` times as fast as real time, and everything else takes no time."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        end = self._now + seconds
        await asyncio.sleep(seconds / SPEED)
        self._now = max(self._now, end)

    def pass_by(self, seconds: float) -> None:
        """Let time pass where nobody sleeps on this clock."""
        self._now += seconds


@dataclass
class Faults:
    """Seconds for which what was just made is invisible, by place; requests whose answer is lost after the provider
    acted; and lies: functions that change an answer, by route, each used ``times`` times."""

    job: float = 0.0
    listed: float = 0.0
    file: float = 0.0
    model: float = 0.0
    completions: float = 0.0
    lost_submits: int = 0
    lies: dict[str, Callable[[dict[str, Any], LaggingProvider], dict[str, Any]]] = field(default_factory=dict)
    times: int = 1
    swaps: dict[str, int] = field(default_factory=dict)
    """Routes of which this many answers are those of the request before."""
    broken: dict[str, int] = field(default_factory=dict)
    """Status with which every request to a route is answered."""


class LaggingProvider:
    """Files, jobs, models and completions in memory, served on a port of this machine."""

    def __init__(self, faults: Faults | None = None, *, clock: FastClock | None = None) -> None:
        self.faults = faults or Faults()
        self.clock = clock or FastClock()
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.previous: dict[str, dict[str, Any]] = {}
        self.lock = threading.RLock()
        self.job_seconds = JOB_SECONDS

    def __enter__(self) -> Self:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                status, answer = provider.answer(self.command, self.path, body, self.headers.get("content-type", ""))
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = _handle

            def log_message(self, *_: Any) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, body: bytes, content_type: str) -> tuple[int, dict[str, Any]]:
        parts = urlsplit(target)
        path = unquote(parts.path.removeprefix("/v1/"))
        with self.lock:
            route = f"{method} {_route(path)}"
            self.requests.append(route)
            if route in self.faults.broken:
                return self.faults.broken[route], {"error": {"message": "the route is broken"}}
            status, found = self._act(method, path, parse_qs(parts.query), body, content_type)
            if status != 200:
                return status, found
            if route == "POST jobs" and self.faults.lost_submits > 0:
                self.faults.lost_submits -= 1
                return 500, {"error": {"message": "lost"}}
            lie = self.faults.lies.get(route)
            if lie is not None and self.faults.times > 0:
                told = lie(json.loads(json.dumps(found)), self)
                self.faults.times -= told != found
                return 200, told
            before, self.previous[route.split(maxsplit=1)[0]] = self.previous.get(route.split(maxsplit=1)[0]), found
            if self.faults.swaps.get(route, 0) > 0 and before is not None:
                self.faults.swaps[route] -= 1
                return 200, before
            return 200, found

    def _act(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, content_type: str
    ) -> tuple[int, dict[str, Any]]:
        now, faults = self.clock.now(), self.faults
        if path == "models":
            return 200, {"object": "list", "data": [{"id": "daunce-tiny", "object": "model", "owned_by": "lagging"}]}
        if path.startswith("models/"):
            name = path.removeprefix("models/")
            if method == "DELETE":
                return 200, {"id": name, "object": "model", "deleted": True}
            if name != "daunce-tiny" and not self._made(name, now - faults.model):
                return _missing(f"model {name} does not exist")
            return 200, {"id": name, "object": "model", "owned_by": "lagging"}
        if path == "files" and method == "POST":
            file = self._upload(body, content_type, now)
            return (200, file) if file else (400, {"error": {"message": "no file in the body"}})
        if path == "files":
            shown = [_public(f) for f in self.files.values() if f["made"] <= now - faults.listed]
            return 200, {"object": "list", "data": shown, "has_more": False}
        if path.startswith("files/"):
            self.files.pop(path.removeprefix("files/"), None)
            return 200, {"id": path.removeprefix("files/"), "object": "file", "deleted": True}
        if path == "fine_tuning/jobs" and method == "POST":
            return self._submit(json.loads(body), now)
        if path == "fine_tuning/jobs":
            wanted = {k[9:-1]: v[0] for k, v in query.items() if k.startswith("metadata[")}
            shown = [
                self._job(job, now)
                for job in self.jobs.values()
                if job["made"] <= now - faults.listed and wanted.items() <= job["metadata"].items()
            ]
            return 200, {"object": "list", "data": shown, "has_more": False}
        if path.startswith("fine_tuning/jobs/"):
            job_id, _, rest = path.removeprefix("fine_tuning/jobs/").partition("/")
            job = self.jobs.get(job_id)
            if job is None or job["made"] > now - faults.job:
                return _missing(f"no job {job_id}")
            if rest in ("events", "checkpoints"):
                return 200, {"object": "list", "data": [], "has_more": False}
            if rest == "cancel" and self._job(job, now)["status"] != "succeeded":
                job["cancelled"] = True
            return 200, self._job(job, now)
        if path == "completions":
            return self._complete(json.loads(body), now)
        return _missing(path)

    def _upload(self, body: bytes, content_type: str, now: float) -> dict[str, Any] | None:
        boundary = content_type.partition("boundary=")[2].strip('"').encode()
        for part in body.split(b"--" + boundary):
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(rb'filename="([^"]+)"', head)
            if name is not None:
                content = content.removesuffix(b"\r\n")
                file = {
                    "id": f"file-{len(self.contents) + 1}",
                    "object": "file",
                    "filename": name.group(1).decode(),
                    "bytes": len(content),
                    "purpose": "fine-tune",
                    "status": "processed",
                    "made": now,
                }
                self.files[file["id"]], self.contents[file["id"]] = file, content
                return _public(file)
        return None  # a client that ended in the middle of it

    def _submit(self, request: dict[str, Any], now: float) -> tuple[int, dict[str, Any]]:
        file = self.files.get(request["training_file"])
        if file is None or file["made"] > now - self.faults.file:
            return 400, {"error": {"message": f"invalid training_file: {request['training_file']} not found"}}
        content = self.contents[file["id"]]
        job = {
            "id": f"ftjob-{len(self.jobs) + 1}",
            "object": "fine_tuning.job",
            **{name: request.get(name) for name in ("model", "training_file", "seed", "method", "metadata", "suffix")},
            "made": now,
            "weights": hashlib.sha256(content + str(request["seed"]).encode()).hexdigest(),
            "cancelled": False,
        }
        self.jobs[job["id"]] = job
        return 200, self._job(job, now)

    def _job(self, job: dict[str, Any], now: float) -> dict[str, Any]:
        done = now - job["made"] >= self.job_seconds
        status = "cancelled" if job["cancelled"] else "succeeded" if done else "running"
        model = f"ft:daunce-tiny:{job['id']}" if status == "succeeded" else None
        tokens = 1000 if status == "succeeded" else None
        return {**_public(job), "status": status, "fine_tuned_model": model, "trained_tokens": tokens, "error": None}

    def _made(self, model: str, before: float) -> dict[str, Any] | None:
        job = self.jobs.get(model.removeprefix("ft:daunce-tiny:"))
        return job if job is not None and job["made"] + self.job_seconds <= before else None

    def _complete(self, request: dict[str, Any], now: float) -> tuple[int, dict[str, Any]]:
        model = request["model"]
        job = self._made(model, now - self.faults.completions)
        if model != "daunce-tiny" and job is None:
            return _missing(f"model {model} not found")
        weights = "base" if job is None else job["weights"]
        choices = []
        for index, ids in enumerate(request["prompt"]):
            values: list[float | None] = [None]
            for place in range(1, len(ids)):
                number = hashlib.sha256(f"{weights} {ids[: place + 1]}".encode()).digest()
                values.append(-0.05 - 6 * int.from_bytes(number[:4]) / 2**32)
            shown = len(ids) if request["echo"] else 0
            logprobs = {"tokens": [str(i) for i in ids[:shown]], "token_logprobs": values[:shown]}
            choice = {"index": index, "text": "", "logprobs": logprobs, "finish_reason": "length"}
            if request.get("return_token_ids"):
                choice |= {"prompt_token_ids": list(ids), "token_ids": []}
            choices.append(choice)
        return 200, {"object": "text_completion", "model": model, "choices": choices}


def _route(path: str) -> str:
    head = path.removeprefix("fine_tuning/").split("/")
    return head[0] if len(head) == 1 else f"{head[0]}/ID" + "".join(f"/{rest}" for rest in head[2:])


def _public(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("made", "weights", "cancelled")}


def _missing(message: str) -> tuple[int, dict[str, Any]]:
    return 404, {"error": {"message": message, "code": "not_found"}}


# -- lies -------------------------------------------------------------------------------------------------------------


def another_job(answer: dict[str, Any], provider: LaggingProvider) -> dict[str, Any]:
    """The object of another job of the provider."""
    others = [job for job in provider.jobs.values() if job["id"] != answer["id"]]
    return provider._job(random.choice(others), provider.clock.now()) if others else answer


def saying(**changes: Any) -> Callable[[dict[str, Any], LaggingProvider], dict[str, Any]]:
    """The right object with other values."""
    return lambda answer, _: {**answer, **changes}


def another_file(answer: dict[str, Any], provider: LaggingProvider) -> dict[str, Any]:
    """The object of another upload."""
    others = [_public(f) for f in provider.files.values() if f["id"] != answer["id"]]
    return random.choice(others) if others else answer


def a_job_for_a_file(answer: dict[str, Any], provider: LaggingProvider) -> dict[str, Any]:
    """A job's object in answer to an upload: what a stale copy on a kept-alive connection looks like."""
    jobs = list(provider.jobs.values())
    return provider._job(jobs[0], provider.clock.now()) if jobs else answer
