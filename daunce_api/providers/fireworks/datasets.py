"""Data sets at Fireworks, which hold one training file each and are validated before a job may use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..._util.clock import Clock
from ...errors import ProviderError, RejectedError, TransientError
from ..refusals import gone_already
from ..sdk_calls import SdkCalls

if TYPE_CHECKING:
    from fireworks import AsyncFireworks

READY = "READY"
"""State of a data set that jobs may use."""

_POLL_SECONDS = 5.0
_FAULTS = {"INVALID_ARGUMENT", "OUT_OF_RANGE", "DATA_LOSS"}
"""Codes of a status that says that the file itself is at fault."""


def dataset_id_of(name: str) -> str:
    """The id of the data set that holds a file: lower case, letters, digits and hyphens."""
    stem = name.removesuffix(".jsonl").lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in stem)


class DataSets:
    """Uploads and states of data sets, by their ids. ``polls`` looks at one are five seconds apart."""

    def __init__(self, sdk: AsyncFireworks, calls: SdkCalls, clock: Clock, polls: int) -> None:
        self._sdk = sdk
        self._calls = calls
        self._clock = clock
        self._polls = polls

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
        send = self._sdk.datasets.upload(dataset, file=(name, content, "application/jsonl"), timeout=600.0)
        try:
            await self._calls.call(send, doing=f"uploading {name}")
        except RejectedError as error:
            if not exists:
                raise
            refused = error  # its file may have arrived the first time
        await self._until_ready(dataset, refused)
        return dataset

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
        for _ in range(self._polls):
            if answer.get("state") == READY:
                return
            found = answer.get("status")
            if isinstance(found, dict) and found.get("code") in _FAULTS:
                said = self._calls.failures.clean(str(found.get("message") or found["code"]))
                raise RejectedError(f"Fireworks finds fault with data set {dataset}: {said}")
            await self._clock.sleep(_POLL_SECONDS)
            answer = await self._read(dataset)
        if refused is not None:
            raise refused
        raise TransientError(f"data set {dataset} was not ready after {self._polls * _POLL_SECONDS:.0f} seconds.")

    async def _read(self, dataset: str) -> dict[str, Any]:
        return await self._calls.fields(self._sdk.datasets.get(dataset), doing=f"reading data set {dataset}")
