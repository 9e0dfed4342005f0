"""Data sets at Fireworks, which hold one training file each and are validated before a job may use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2

from ...errors import ProviderError, RejectedError, TransientError
from ..calls import Calls, gone_already
from ..polling import Answer, Poll

if TYPE_CHECKING:
    from fireworks import AsyncFireworks

READY = "READY"
"""State of a data set that jobs may use."""

LARGEST_UPLOAD = 150_000_000
"""Bytes that Fireworks takes in one request; larger files go to an address that it signs."""
UPLOAD_TIMEOUT = 600.0
FILE_FAULTS = {"INVALID_ARGUMENT", "OUT_OF_RANGE", "DATA_LOSS"}
"""Codes of a status that says that the file itself is at fault."""


def dataset_id_of(name: str) -> str:
    """The id of the data set that holds a file: lower case, letters, digits and hyphens."""
    stem = name.removesuffix(".jsonl").lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in stem)


class DataSets:
    """Uploads and states of data sets, by their ids."""

    def __init__(self, sdk: AsyncFireworks, calls: Calls, poll: Poll) -> None:
        self._sdk = sdk
        self._calls = calls
        self._poll = poll

    async def state(self, dataset: str) -> str | None:
        """A data set's state; None where there is none of this id."""
        with gone_already():
            return str((await self._read(dataset)).get("state"))
        return None

    async def upload(self, name: str, content: bytes) -> str:
        """Create a data set for a file, upload it and wait until jobs may use it; its id.

        Raises RejectedError where Fireworks finds fault with the file, TransientError where it takes too long.
        """
        dataset = dataset_id_of(name)
        lines = content.count(b"\n")
        chat = content.lstrip().startswith(b'{"messages"')
        create = self._sdk.datasets.create(
            dataset_id=dataset,
            dataset={"user_uploaded": {}, "example_count": str(lines), "format": "CHAT" if chat else "COMPLETION"},
        )
        exists = False
        try:
            await self._calls.call(create, doing=f"creating data set {dataset}")
        except ProviderError as error:
            # 409: it exists, from an upload that was interrupted; its file is sent again.
            if error.status != 409:
                raise
            exists = True
        refused: RejectedError | None = None
        try:
            await self._send(dataset, name, content)
        except RejectedError as error:
            if not exists:
                raise
            refused = error  # its file may have arrived the first time
        await self._until_ready(dataset, refused)
        return dataset

    async def _send(self, dataset: str, name: str, content: bytes) -> None:
        """Send the file: in one request to Fireworks, or, where it is too large for that, to the address it signs."""
        datasets, doing = self._sdk.datasets, f"uploading {name}"
        if len(content) <= LARGEST_UPLOAD:
            call = datasets.upload(dataset, file=(name, content, "application/jsonl"), timeout=UPLOAD_TIMEOUT)
            await self._calls.call(call, doing=doing)
            return
        size = str(len(content))
        signed = datasets.get_upload_endpoint(dataset, filename_to_size={name: size})
        urls = (await self._calls.fields(signed, doing=doing)).get("filenameToSignedUrls")
        url = urls.get(name) if isinstance(urls, dict) else None
        if not isinstance(url, str):
            raise self._calls.malformed(doing, False, "no address for the file")
        headers = {"content-type": "application/octet-stream", "x-goog-content-length-range": f"{size},{size}"}
        async with httpx2.AsyncClient(timeout=UPLOAD_TIMEOUT) as http:
            await self._calls.request(http, "PUT", url, doing=doing, content=content, headers=headers)

    async def _until_ready(self, dataset: str, refused: RejectedError | None) -> None:
        """Have the upload validated and wait until the data set is ready: before that, jobs on it are refused."""
        answer = await self._read(dataset)
        if answer.get("state") != READY:
            try:
                call = self._sdk.datasets.validate_upload(dataset, body={})
                await self._calls.call(call, doing=f"validating data set {dataset}")
            except RejectedError as error:
                refused = refused or error  # also said of one that is being validated already
            answer = await self._read(dataset)

        def ready(latest: Answer) -> bool:
            status = latest.get("status")
            if latest.get("state") != READY and isinstance(status, dict) and status.get("code") in FILE_FAULTS:
                reason = self._calls.clean(str(status.get("message") or status["code"]))
                raise RejectedError(f"Fireworks finds fault with data set {dataset}: {reason}")
            return latest.get("state") == READY

        try:
            await self._poll.until(
                ready, answer, lambda: self._read(dataset), f"data set {dataset}", late=TransientError
            )
        except TransientError:
            if refused is not None:
                raise refused from None
            raise

    async def _read(self, dataset: str) -> dict[str, Any]:
        return await self._calls.fields(self._sdk.datasets.get(dataset), doing=f"reading data set {dataset}")
