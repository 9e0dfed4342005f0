"""``/v1/batches``: the lines of an uploaded file, answered in the background into a file of answers.

Every line passes through the same handlers as a single request. A batch that was in progress when a server
ended is answered again from its start by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import sqlite3
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_errors import ApiError, invalid, not_found, server_error
from .gate import MAX_BODY_BYTES
from .paging import page
from .requests import CreateBatch, read_body
from .routes_completions import chat, complete
from .scheduler import in_thread, once_stored
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
        service.state.update_batch(batch)
    return JSONResponse(batch)


def _batch(service: Service, request: Request) -> Batch:
    identity = request.path_params["batch_id"]
    row = service.state.one("batches", identity)
    if row is None:
        raise not_found("batch", identity, "batch_id")
    batch: Batch = json.loads(row["body"])
    return batch


def start(service: Service) -> None:
    """Resume the batches that an earlier server left."""
    for row in service.state.rows("SELECT * FROM batches ORDER BY seq"):
        batch = json.loads(row["body"])
        if batch["status"] not in ENDED:
            _spawn(service, batch)


def _spawn(service: Service, batch: Batch) -> None:
    work = once_stored(f"batch {batch['id']}", partial(_run, service, batch))
    task = service.batches[batch["id"]] = asyncio.create_task(work)
    task.add_done_callback(lambda _: service.batches.pop(batch["id"], None))


async def _run(service: Service, batch: Batch) -> None:
    """Write the answers to a batch into files, which are kept if it completes."""
    state = service.state
    files = {name: new_id("file") for name in ("output", "error")}
    try:
        counts = await _answer_all(service, batch, files)
        total = {"total": sum(counts.values()), "completed": counts["output"], "failed": counts["error"]}
        end = {"status": "completed", "completed_at": now(), "request_counts": total}
        with state.transaction():
            for name, identity in files.items():
                if counts[name]:
                    state.add_file(identity, f"{batch['id']}_{name}.jsonl", "batch_output")
                    end[f"{name}_file_id"] = identity
            state.update_batch(batch | end)
    except ApiError as error:
        problem = {"code": "invalid_request", "message": error.message, "param": None, "line": None}
        errors = {"object": "list", "data": [problem]}
        state.update_batch({**batch, "status": "failed", "failed_at": now(), "errors": errors})
    finally:
        for identity in files.values():
            if state.file(identity) is None:
                state.file_path(identity).unlink(missing_ok=True)


async def _answer_all(service: Service, batch: Batch, files: Mapping[str, str]) -> dict[str, int]:
    """Write the answers to ``files`` (``output`` and ``error``); how many each has. Raises ApiError for a file that is
    not a batch."""
    state, endpoint = service.state, batch["endpoint"]
    path, counts = state.file_path(batch["input_file_id"]), dict.fromkeys(files, 0)
    await in_thread(_check, path, endpoint)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(path.open("rb"))
        answers = {name: stack.enter_context(state.file_path(i).open("wb")) for name, i in files.items()}
        for line in lines:
            answer = await _answer(service, endpoint, json.loads(line))
            name = "output" if answer["response"]["status_code"] == 200 else "error"
            answers[name].write(json.dumps(answer).encode() + b"\n")
            counts[name] += 1
    return counts


async def _answer(service: Service, endpoint: str, line: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(line["body"]).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "path": endpoint, "headers": headers}, receive)
    try:
        response = await HANDLERS[endpoint](service, request)
    except ApiError as error:
        response = error.response()
    except sqlite3.Error:
        raise
    except Exception as error:
        log.error("a line of a batch: %s", type(error).__name__)
        response = server_error().response()
    answer = {
        "status_code": response.status_code,
        "request_id": f"req_{secrets.token_hex(16)}",
        "body": json.loads(bytes(response.body)),
    }
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line["custom_id"],
        "response": answer,
        "error": None,
    }


def _check(path: Path, endpoint: str) -> None:
    """Raises ApiError that names the first line of a file that is not a request of a batch."""
    known: set[str] = set()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise invalid("The input file was deleted.") from None
    with file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_BODY_BYTES + 1), b""), start=1):
            if number > MAX_LINES:
                raise invalid(f"The file has more than {MAX_LINES} lines, the most that a batch may have.")
            if len(raw) > MAX_BODY_BYTES:
                raise invalid(f"Line {number} has more than {MAX_BODY_BYTES} bytes.")
            try:
                line = json.loads(raw)
                identity, request, _ = line["custom_id"], (line["method"], line["url"]), line["body"]
            except (ValueError, RecursionError, TypeError, KeyError):
                raise invalid(f"Line {number} is not an object with custom_id, method, url and body.") from None
            if request != ("POST", endpoint):
                raise invalid(f"Line {number} is not a POST to {endpoint}.")
            if not isinstance(identity, str) or identity in known:
                raise invalid(f"The custom_id of line {number} is not a unique string.")
            known.add(identity)
