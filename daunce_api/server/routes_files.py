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

from . import paging
from .api_errors import ApiError, invalid, not_found
from .scheduler import Scheduler
from .service import Service
from .state import Row, new_id, now

PURPOSES = ("fine-tune", "batch")
MAX_PAGE = 10_000
_COPY_BYTES = 1 << 20


def file_object(row: Row) -> dict[str, Any]:
    """OpenAI's ``file``."""
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
    }


class FileRoutes:
    def __init__(self, service: Service, scheduler: Scheduler) -> None:
        self._service = service
        self._scheduler = scheduler
        self._state = service.state

    def _file(self, request: Request) -> Row:
        identity = request.path_params["file_id"]
        row = self._state.file(identity)
        if row is None or self._service.hidden("file", identity):
            raise not_found("File object", identity, "id")
        return row

    async def create(self, request: Request) -> Response:
        """Upload: multipart with ``file`` and ``purpose: fine-tune``."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise invalid("Files are uploaded as multipart/form-data.")
        async with request.form(max_files=1, max_fields=8) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise invalid("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
            if purpose is None:
                raise invalid(
                    "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
                )
            if purpose not in PURPOSES:
                raise invalid(f"This server takes files with purpose {' or '.join(PURPOSES)} only.", param="purpose")
            unknown = sorted(set(form) - {"file", "purpose"})
            if unknown:
                name = unknown[0][:100]
                raise invalid(f"'{name}' is not supported by this server.", param=name, code="unknown_parameter")
            size = upload.size or 0
            if size == 0:
                raise invalid("The file is empty.", param="file")
            if size > self._service.settings.max_file_bytes:
                limit = self._service.settings.max_file_bytes
                raise ApiError(413, f"The file has {size} bytes; the limit is {limit}.", param="file")
            identity = new_id("file")
            path = self._state.file_path(identity)
            await asyncio.to_thread(_keep, upload.file, path)
            try:
                self._state.insert(
                    "files",
                    id=identity,
                    filename=_display_name(upload.filename),
                    bytes=size,
                    purpose=purpose,
                    created_at=now(),
                )
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        self._service.born(identity)
        self._scheduler.warm()
        row = self._state.file(identity)
        if row is None:
            raise not_found("File object", identity, "id")
        return JSONResponse(file_object(row))

    async def listing(self, request: Request) -> Response:
        limit = paging.integer(request, "limit", MAX_PAGE, MAX_PAGE)
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("Invalid value for 'order': must be asc or desc.", param="order")
        conditions, values = ["deleted=0"], []
        purpose = request.query_params.get("purpose")
        if purpose is not None:
            conditions.append("purpose=?")
            values.append(purpose)
        page = self._state.page(
            "files",
            where=" AND ".join(conditions),
            parameters=values,
            after=paging.after(request),
            limit=limit,
            ascending=order == "asc",
        )
        rows, more = paging.found(page)
        rows = [r for r in rows if not self._service.hidden("file", r["id"], listed=True)]
        return JSONResponse(
            {
                "object": "list",
                "data": [file_object(r) for r in rows],
                "first_id": rows[0]["id"] if rows else "",
                "last_id": rows[-1]["id"] if rows else "",
                "has_more": more,
            }
        )

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(file_object(self._file(request)))

    async def delete(self, request: Request) -> Response:
        row = self._file(request)
        self._state.delete_file(row["id"])
        return JSONResponse({"id": row["id"], "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        row = self._file(request)
        # Never rendered by a browser, whatever the file holds.
        headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
        return FileResponse(self._state.file_path(row["id"]), headers=headers, media_type="application/octet-stream")


def _keep(source: BinaryIO, path: Path) -> None:
    """Copy an upload to its place: under another name, forced to the disk, then renamed."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
            target.flush()
            os.fsync(target.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _display_name(given: str | None) -> str:
    """The last part of a file name, printable; it is shown and searched for, never opened."""
    name = (given or "").replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "_" for c in name)[:255] or "file.jsonl"
