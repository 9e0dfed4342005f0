"""``/v1/batches``: the lines of an uploaded file, answered in the background into a file of answers.

Every line passes through the same handlers as a single request. A batch that a server was working on when it ended is
answered again from its start by the next one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_errors import ApiError, invalid, not_found
from .paging import page
from .requests import CreateBatch, read_body
from .routes_completions import chat, complete
from .service import Service
from .state import new_id, now

log = logging.getLogger("daunce_api.server")

MAX_LINES = 50_000
ENDED = ("completed", "failed", "cancelled")
HANDLERS = {"/v1/completions": complete, "/v1/chat/completions": chat}

Batch = dict[str, Any]


async def create(service: Service, request: Request) -> Response:
    body = await read_body(request, CreateBatch)
    file = service.file(body.input_file_id)
    if file is None:
        raise invalid(f"No such File object: {body.input_file_id[:200]}", param="input_file_id")
    if file["purpose"] != "batch":
        raise invalid("The input file must have purpose 'batch'.", param="input_file_id")
    batch: Batch = {
        **body.model_dump(),
        "id": new_id("batch"),
        "object": "batch",
        "errors": None,
        "status": "in_progress",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now(),
        "in_progress_at": now(),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
    }
    service.state.insert("batches", id=batch["id"], body=json.dumps(batch))
    _spawn(service, batch)
    return JSONResponse(batch)


async def retrieve(service: Service, request: Request) -> Response:
    return JSONResponse(_batch(service, request))


async def listing(service: Service, request: Request) -> Response:
    return page(service, request, "batches", lambda row: json.loads(row["body"]))


async def cancel(service: Service, request: Request) -> Response:
    batch = _batch(service, request)
    if batch["status"] in ENDED:
        raise invalid(f"Batch {batch['id']} is {batch['status']} already.")
    if (task := service.batches.get(batch["id"])) is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    batch = _batch(service, request)
    if batch["status"] not in ENDED:
        batch |= {"status": "cancelled", "cancelled_at": now()}
        _keep(service, batch)
    return JSONResponse(batch)


def _batch(service: Service, request: Request) -> Batch:
    identity = request.path_params["batch_id"]
    row = service.state.one("batches", identity)
    if row is None:
        raise not_found("batch", identity, "batch_id")
    batch: Batch = json.loads(row["body"])
    return batch


def start(service: Service) -> None:
    """Take up the batches that an earlier server left."""
    for row in service.state.rows("SELECT * FROM batches ORDER BY seq"):
        batch = json.loads(row["body"])
        if batch["status"] not in ENDED:
            _spawn(service, batch)


def _spawn(service: Service, batch: Batch) -> None:
    task = service.batches[batch["id"]] = asyncio.create_task(_run(service, batch))
    task.add_done_callback(lambda _: service.batches.pop(batch["id"], None))


async def _run(service: Service, batch: Batch) -> None:
    try:
        content = await asyncio.to_thread(service.state.file_path(batch["input_file_id"]).read_bytes)
        requests = _requests(content, batch["endpoint"])
    except (OSError, ApiError) as error:
        message = error.message if isinstance(error, ApiError) else "The input file cannot be read."
        problem = {"code": "invalid_request", "message": message, "param": None, "line": None}
        errors = {"object": "list", "data": [problem]}
        _keep(service, {**batch, "status": "failed", "failed_at": now(), "errors": errors})
        return
    try:
        answered = [await _answer(service, identity, batch["endpoint"], body) for identity, body in requests]
        good = [line for line in answered if line["response"]["status_code"] == 200]
        bad = [line for line in answered if line["response"]["status_code"] != 200]
        counts = {"total": len(answered), "completed": len(good), "failed": len(bad)}
        files = {
            name: service.state.keep_file(f"{batch['id']}_{name}.jsonl", _lines(lines), "batch_output")
            for name, lines in (("output", good), ("error", bad))
            if lines
        }
        done = {**batch, "status": "completed", "completed_at": now(), "request_counts": counts}
        _keep(service, {**done, **{f"{name}_file_id": identity for name, identity in files.items()}})
    except Exception as error:
        log.error("batch %s: %s", batch["id"], type(error).__name__)
        _keep(service, {**batch, "status": "failed", "failed_at": now()})


async def _answer(service: Service, identity: str, endpoint: str, body: Any) -> dict[str, Any]:
    content = json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "path": endpoint, "headers": headers}, receive)
    try:
        response = await HANDLERS[endpoint](service, request)
    except ApiError as error:
        response = error.response()
    answer = {
        "status_code": response.status_code,
        "request_id": f"req_{secrets.token_hex(16)}",
        "body": json.loads(bytes(response.body)),
    }
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": identity, "response": answer, "error": None}


def _keep(service: Service, batch: Batch) -> None:
    service.state.update_batch(batch["id"], json.dumps(batch))


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
