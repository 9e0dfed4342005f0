"""``/v1/batches``: the lines of an uploaded file, answered in the background into a file of answers.

Every line passes through the same handlers as a single request. A batch that a server was working on when it ended is
answered again from its start by the next one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import paging
from .api_errors import ApiError, invalid, not_found
from .requests import CreateBatch, read_body
from .service import Service
from .state import new_id, now

log = logging.getLogger("daunce_api.server")

MAX_LINES = 50_000
ENDED = ("completed", "failed", "cancelled")

Handlers = Mapping[str, Callable[[Request], Awaitable[Response]]]
Batch = dict[str, Any]


class BatchRoutes:
    """``handlers`` answer the requests of a batch, by their path."""

    def __init__(self, service: Service, handlers: Handlers) -> None:
        self._service, self._state, self._handlers = service, service.state, handlers
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Take up the batches that an earlier server left."""
        for row in self._state.rows("SELECT * FROM batches ORDER BY seq"):
            batch = json.loads(row["body"])
            if batch["status"] not in ENDED:
                self._spawn(batch)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(self, request: Request) -> Response:
        body = await read_body(request, CreateBatch)
        file = self._state.file(body.input_file_id)
        if file is None or self._service.hidden("file", body.input_file_id):
            raise invalid(f"No such File object: {body.input_file_id[:200]}", param="input_file_id")
        if file["purpose"] != "batch":
            raise invalid("The input file must have purpose 'batch'.", param="input_file_id")
        batch: Batch = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": body.endpoint,
            "errors": None,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "status": "in_progress",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now(),
            "in_progress_at": now(),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.metadata,
        }
        self._state.insert("batches", id=batch["id"], body=json.dumps(batch))
        self._spawn(batch)
        return JSONResponse(batch)

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(self._batch(request))

    async def listing(self, request: Request) -> Response:
        page = self._state.page("batches", after=paging.after(request), limit=paging.integer(request, "limit", 20, 100))
        rows, more = paging.found(page)
        batches = [json.loads(r["body"]) for r in rows]
        ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {}
        return JSONResponse({"object": "list", "data": batches, "has_more": more, **ends})

    async def cancel(self, request: Request) -> Response:
        batch = self._batch(request)
        if batch["status"] in ENDED:
            raise invalid(f"Batch {batch['id']} is {batch['status']} already.")
        task = self._tasks.get(batch["id"])
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        batch = self._batch(request)
        if batch["status"] not in ENDED:
            self._keep({**batch, "status": "cancelled", "cancelled_at": now()})
        return JSONResponse(self._batch(request))

    def _batch(self, request: Request) -> Batch:
        identity = request.path_params["batch_id"]
        row = self._state.one("batches", identity)
        if row is None:
            raise not_found("batch", identity, "batch_id")
        batch: Batch = json.loads(row["body"])
        return batch

    def _keep(self, batch: Batch) -> None:
        self._state.update_batch(batch["id"], json.dumps(batch))

    def _spawn(self, batch: Batch) -> None:
        task = self._tasks[batch["id"]] = asyncio.create_task(self._run(batch))
        task.add_done_callback(lambda _: self._tasks.pop(batch["id"], None))

    async def _run(self, batch: Batch) -> None:
        try:
            content = await asyncio.to_thread(self._state.file_path(batch["input_file_id"]).read_bytes)
            requests = _requests(content, batch["endpoint"])
        except (OSError, ApiError) as error:
            message = error.message if isinstance(error, ApiError) else "The input file cannot be read."
            problem = {"code": "invalid_request", "message": message, "param": None, "line": None}
            errors = {"object": "list", "data": [problem]}
            self._keep({**batch, "status": "failed", "failed_at": now(), "errors": errors})
            return
        try:
            answered = [await self._answer(identity, batch["endpoint"], body) for identity, body in requests]
            good = [line for line in answered if line["response"]["status_code"] == 200]
            bad = [line for line in answered if line["response"]["status_code"] != 200]
            counts = {"total": len(answered), "completed": len(good), "failed": len(bad)}
            files = {
                name: self._state.keep_file(f"{batch['id']}_{name}.jsonl", _lines(lines), "batch_output")
                for name, lines in (("output", good), ("error", bad))
                if lines
            }
            done = {**batch, "status": "completed", "completed_at": now(), "request_counts": counts}
            self._keep({**done, **{f"{name}_file_id": identity for name, identity in files.items()}})
        except Exception as error:
            log.error("batch %s: %s", batch["id"], type(error).__name__)
            self._keep({**batch, "status": "failed", "failed_at": now()})

    async def _answer(self, identity: str, endpoint: str, body: Any) -> dict[str, Any]:
        content = json.dumps(body).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        headers = [(b"content-type", b"application/json")]
        request = Request({"type": "http", "method": "POST", "path": endpoint, "headers": headers}, receive)
        try:
            response = await self._handlers[endpoint](request)
        except ApiError as error:
            response = error.response()
        answer = {
            "status_code": response.status_code,
            "request_id": f"req_{secrets.token_hex(16)}",
            "body": json.loads(bytes(response.body)),
        }
        return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": identity, "response": answer, "error": None}


def _requests(content: bytes, endpoint: str) -> list[tuple[str, Any]]:
    """(custom_id, body) of every line. Raises ApiError that names the first line that is wrong."""
    requests: dict[str, Any] = {}
    lines = content.splitlines()
    if len(lines) > MAX_LINES:
        raise invalid(f"The file has {len(lines)} lines; a batch has at most {MAX_LINES}.")
    for number, raw in enumerate(lines, start=1):
        try:
            line = json.loads(raw)
            identity, asked = line["custom_id"], (line["method"], line["url"])
            body = line["body"]
        except (ValueError, RecursionError, TypeError, KeyError):
            raise invalid(f"Line {number} is not an object with custom_id, method, url and body.") from None
        if asked != ("POST", endpoint):
            raise invalid(f"Line {number} is not a POST to {endpoint}.")
        if not isinstance(identity, str) or identity in requests:
            raise invalid(f"The custom_id of line {number} is not a text of its own.")
        requests[identity] = body
    if not requests:
        raise invalid("The file has no requests.")
    return list(requests.items())


def _lines(answers: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(answer) + "\n" for answer in answers).encode()
