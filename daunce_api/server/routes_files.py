"""``/v1/files``: training files in, result files out."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from .api_errors import ApiError, invalid, missing, not_found
from .gate import MAX_FILE_BYTES
from .paging import page
from .service import Service
from .state import Row, new_id

PURPOSES = ("fine-tune", "batch")
MAX_PAGE = 10_000
_COPY_BYTES = 1 << 20


def file_object(row: Row) -> dict[str, Any]:
    """OpenAI's ``file``."""
    kept = {name: row[name] for name in ("id", "bytes", "created_at", "filename", "purpose")}
    return {**kept, "object": "file", "status": "processed"}


async def create(service: Service, request: Request) -> Response:
    """Upload: multipart with ``file`` and ``purpose``."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise invalid("Files are uploaded as multipart/form-data.")
    async with request.form(max_files=1, max_fields=8) as form:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise missing("file")
        if purpose is None:
            raise missing("purpose")
        if purpose not in PURPOSES:
            raise invalid(f"This server accepts files with purpose {' or '.join(PURPOSES)} only.", param="purpose")
        unknown = sorted(set(form) - {"file", "purpose"})
        if unknown:
            name = unknown[0][:100]
            raise invalid(f"'{name}' is not supported by this server.", param=name, code="unknown_parameter")
        if not upload.size:
            raise invalid("The file is empty.", param="file")
        if upload.size > MAX_FILE_BYTES:
            raise ApiError(413, f"The file has {upload.size} bytes; the limit is {MAX_FILE_BYTES}.", param="file")
        identity = new_id("file")
        path = service.state.file_path(identity)
        try:
            await asyncio.to_thread(_write, upload.file, path)
            row = service.state.add_file(identity, _display_name(upload.filename), str(purpose))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    service.injector.born(identity)
    return JSONResponse(file_object(row))


async def listing(service: Service, request: Request) -> Response:
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("Invalid value for 'order': must be asc or desc.", param="order")
    purpose = request.query_params.get("purpose")
    where, values = ("deleted=0", []) if purpose is None else ("deleted=0 AND purpose=?", [purpose])
    return page(
        service,
        request,
        "files",
        file_object,
        where=where,
        values=values,
        usual=MAX_PAGE,
        largest=MAX_PAGE,
        ascending=order == "asc",
        kind="file",
    )


async def retrieve(service: Service, request: Request) -> Response:
    return JSONResponse(file_object(_file(service, request)))


async def delete(service: Service, request: Request) -> Response:
    row = _file(service, request)
    service.state.delete_file(row["id"])
    return JSONResponse({"id": row["id"], "object": "file", "deleted": True})


async def content(service: Service, request: Request) -> Response:
    row = _file(service, request)
    # Never rendered by a browser, whatever the file holds.
    headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
    return FileResponse(service.state.file_path(row["id"]), headers=headers, media_type="application/octet-stream")


def _file(service: Service, request: Request) -> Row:
    identity = request.path_params["file_id"]
    row = service.file(identity)
    if row is None:
        raise not_found("File object", identity, "id")
    return row


def _write(source: BinaryIO, path: Path) -> None:
    """Copy an upload to its place, and to the disk. It becomes a file when it gets its row."""
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)
        target.flush()
        os.fsync(target.fileno())


def _display_name(given: str | None) -> str:
    """The last part of a file name, printable; it is shown and searched for, never opened."""
    name = (given or "").replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "_" for c in name)[:255] or "file.jsonl"
