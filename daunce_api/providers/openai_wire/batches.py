"""Batches at a provider of OpenAI's Batch API: found again by their mark, submitted, waited for, read, deleted.

A batch's metadata holds a mark (a hash of what is asked) and the model that is asked. Its files hold the users'
prompts; the names of input files carry a hash of the model, so that what an interrupted run left can be found.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import suppress
from typing import Any, Final

from ..._util.clock import Clock
from ...errors import AmbiguousSubmitError, DailyLimitError, ProviderError, RejectedError, StopError, TransientError
from ..base import Swept
from ..calls import NO_REASON, gone_already, noted_in
from ..contract import json_of, part_of
from .client import WireClient

KEY_FIELD, MODEL_FIELD = "daunce_batch", "daunce_model"
ENDPOINT: Final = "/v1/chat/completions"

_ENDED = {"failed", "completed", "expired", "cancelled"}
_FILES = ("input_file_id", "output_file_id", "error_file_id")
_LOOKS = 3
_LIMIT_POLLS = 10
"""Polls between two tries of a batch that has to wait for others to end."""
_FAILED_POLLS = 10
LONGEST_WAIT = 3 * 86_400.0
"""Seconds after which a batch that has not ended is given up: it was to end within one day."""
_UPLOAD_TIMEOUT = 600.0
_LIST_LIMIT, _FILES_PAGE = 100, 1000
_METADATA_CHARACTERS = 512

Batch = dict[str, Any]
"""A batch as the provider describes it."""


class Batches:
    """The batches of one endpoint. Polls are ``poll_seconds`` apart."""

    def __init__(self, client: WireClient, *, poll_seconds: float, clock: Clock) -> None:
        self._client = client
        self._files = client.sdk.files.with_raw_response
        self._batches = client.sdk.batches.with_raw_response
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._uploaded: dict[str, str] = {}

    async def find(self, mark: str, read: Collection[str] = ()) -> Batch | None:
        """A batch with this mark that is under way or has answers, and is none of those in ``read``."""
        async for batch in self._listed():
            if part_of(batch, "metadata", KEY_FIELD) != mark or batch["id"] in read:
                continue
            if batch.get("status") not in _ENDED or isinstance(batch.get("output_file_id"), str):
                return batch
        return None

    async def submit(self, content: bytes, model: str, mark: str) -> Batch:
        """Upload the lines and make a batch of them. What is sent again is not uploaded again, and a file that is
        refused is deleted."""
        if mark not in self._uploaded:
            upload = self._files.create(
                file=(f"{_prefix(model)}{mark}.jsonl", content, "application/jsonl"),
                purpose="batch",
                timeout=_UPLOAD_TIMEOUT,
            )
            self._uploaded[mark] = (await self._client.json(upload, doing="uploading a batch", needs={"id": str}))["id"]
        file_id = self._uploaded[mark]
        try:
            batch = await self._create(file_id, model, mark)
        except (RejectedError, StopError, DailyLimitError):
            del self._uploaded[mark]
            await self.forget([file_id])
            raise
        del self._uploaded[mark]
        return batch

    async def ended(self, batch: Batch, model: str, mark: str) -> Batch:
        """The batch once it has ended, with whatever it answered.

        One that was turned away because too many tokens are waiting already is submitted again once others may have
        ended. Raises RejectedError where it is refused, or too large for that limit by itself, and StopError where it
        does not end in ``LONGEST_WAIT``.
        """
        alone, give_up = 0, self._clock.now() + LONGEST_WAIT
        while True:
            batch = await self._polled(batch, give_up)
            if batch["status"] != "failed":
                return batch
            if not _is_limited(batch):
                raise RejectedError(self._client.calls.clean(f"batch {batch['id']} failed: {_problems(batch)}"))
            alone = 0 if await self._others_under_way() else alone + 1
            if alone == _LOOKS:
                raise RejectedError(
                    self._client.calls.clean(
                        f"batch {batch['id']} is too large, with no other under way: {_problems(batch)}"
                    )
                )
            await self._clock.sleep(_LIMIT_POLLS * self._poll_seconds)
            batch = await self._create(str(batch["input_file_id"]), model, mark)

    async def _polled(self, batch: Batch, give_up: float) -> Batch:
        """The batch once it is final. In a day of polls some fail; only many in a row are an error."""
        failures = 0
        while batch.get("status") not in _ENDED:
            if self._clock.now() >= give_up:
                raise StopError(
                    self._client.calls.clean(
                        f"batch {batch['id']} is still {batch.get('status')} after {LONGEST_WAIT / 86_400:.0f} days, "
                        "though it was to end within one. Everything so far is kept. Cancel it at the provider, then "
                        "run the same command again: what it has answered is used, and the rest is requested anew."
                    )
                )
            await self._clock.sleep(self._poll_seconds)
            call = self._batches.retrieve(str(batch["id"]))
            try:
                batch = await self._client.json(call, doing=f"reading batch {batch['id']}", needs={"status": str})
            except TransientError:
                failures += 1
                if failures == _FAILED_POLLS:
                    raise
            else:
                failures = 0
        return batch

    async def lines(self, batch: Batch) -> list[dict[str, Any]]:
        """The lines of its answers and of its errors; none from a file that is gone."""
        found = []
        for name in ("output_file_id", "error_file_id"):
            file_id = batch.get(name)
            if not isinstance(file_id, str):
                continue
            call = self._files.content(file_id)
            with gone_already():
                content = await self._client.content(call, doing=f"reading {file_id}")
                found += [line for raw in content.splitlines() if isinstance(line := json_of(raw), dict)]
        return found

    async def forget(self, file_ids: Iterable[str]) -> None:
        """Delete files; what cannot be deleted now is left for :meth:`sweep`."""
        for file_id in file_ids:
            with suppress(ProviderError):
                await self._delete(file_id)

    async def sweep(self, models: Collection[str]) -> Swept:
        """Cancel the batches that ask these models, and delete their files."""
        swept = Swept()
        prefixes = tuple(_prefix(model) for model in models)
        there: dict[str, str] = {}
        listing = self._files.list
        async for file in self._client.pages(listing, doing="listing files", limit=_FILES_PAGE):
            there[file["id"]] = str(file.get("filename"))
        ours = {file_id for file_id, name in there.items() if name.startswith(prefixes)}
        asked = {model[:_METADATA_CHARACTERS] for model in models}
        async for batch in self._listed():
            if part_of(batch, "metadata", KEY_FIELD) is None or part_of(batch, "metadata", MODEL_FIELD) not in asked:
                continue
            ours.update(file_id for file_id in files_of(batch) if file_id in there)
            if batch.get("status") not in _ENDED:
                await self._cancel(batch["id"], swept)
        for file_id in sorted(ours):
            with noted_in(swept.kept, file_id):
                if await self._delete(file_id):
                    swept.files.append(file_id)
                else:
                    swept.kept[file_id] = f"the provider keeps the file {there[file_id]}"
        return swept

    async def _cancel(self, batch_id: str, swept: Swept) -> None:
        call = self._batches.cancel(batch_id)
        with noted_in(swept.kept, batch_id):
            answer = await self._client.json(call, doing=f"cancelling batch {batch_id}")
            if answer.get("status") not in _ENDED:
                swept.kept[batch_id] = (
                    f"batch {batch_id} is being cancelled and may still leave answers; clean again in some minutes"
                )

    async def _create(self, file_id: str, model: str, mark: str) -> Batch:
        call = self._batches.create(
            input_file_id=file_id,
            endpoint=ENDPOINT,
            completion_window="24h",
            metadata={KEY_FIELD: mark, MODEL_FIELD: model[:_METADATA_CHARACTERS]},
        )
        try:
            batch = await self._client.json(
                call, doing="creating a batch", submit=True, needs={"id": str, "status": str}
            )
            return {"input_file_id": file_id, **batch}
        except AmbiguousSubmitError as error:
            unanswered = error
        for _ in range(_LOOKS):
            await self._clock.sleep(self._poll_seconds)
            found = await self.find(mark)
            if found is not None and found.get("input_file_id") == file_id:
                return found
        raise TransientError(f"{unanswered} No batch with this mark appeared; it is sent again.")

    async def _others_under_way(self) -> bool:
        async for batch in self._listed():
            if batch.get("status") not in _ENDED:
                return True
        return False

    def _listed(self) -> AsyncIterator[Batch]:
        listing = self._batches.list
        return self._client.pages(listing, doing="listing batches", limit=_LIST_LIMIT)

    async def _delete(self, file_id: str) -> bool:
        return await self._client.delete(self._files.delete(file_id), doing=f"deleting file {file_id}")


def files_of(batch: Batch) -> list[str]:
    """Ids of the files that a batch has: its lines, its answers, its errors."""
    return [batch[name] for name in _FILES if isinstance(batch.get(name), str)]


def _prefix(model: str) -> str:
    return f"daunce-batch-{hashlib.sha256(model.encode()).hexdigest()[:12]}-"


def _is_limited(batch: Batch) -> bool:
    """Whether a failed batch only has to wait: the provider bounds the tokens of all batches that are under way."""
    return any(error.get("code") == "token_limit_exceeded" for error in _errors(batch))


def _problems(batch: Batch) -> str:
    messages = [str(error["message"]) for error in _errors(batch) if error.get("message")]
    return "; ".join(messages[:3]) or NO_REASON


def _errors(batch: Batch) -> list[dict[str, Any]]:
    return [error for error in part_of(batch, "errors", "data") or () if isinstance(error, dict)]
