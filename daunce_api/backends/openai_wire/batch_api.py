"""One-token chat scoring through OpenAI's Batch API: half the list price, an answer within 24 hours.

A batch holds one model's requests. Its metadata carries a hash of what is asked, so a run that was interrupted finds
the batch it paid for instead of sending another. Lines that fail are asked again in a batch of their own; the others
are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ...clock import Clock, SystemClock
from ...errors import AmbiguousSubmitError, RejectedError, TransientError
from ...tokens import EncodedExample
from ..base import ScorerCapabilities, TokenScores
from .chat_token import ChatTokenScorer

ROUNDS = 3
"""Batches tried for a request that fails."""
KEY_FIELD = "daunce_batch"

_FAILED = {"failed", "cancelled"}
_ENDED = _FAILED | {"completed", "expired"}
_LOOKUPS = 3
_LIST_LIMIT = 100


class BatchScorer:
    """``Scorer`` that sends the requests of a :class:`ChatTokenScorer` as batches. Closing it closes that scorer.

    ``score`` returns when the batch has ended. What has been answered stays known for the life of the scorer, so
    that repeating a call after an error asks only for the rest.
    """

    def __init__(self, scorer: ChatTokenScorer, *, poll_seconds: float = 60.0, clock: Clock | None = None) -> None:
        self._scorer = scorer
        self._client = scorer.client
        self._poll_seconds = poll_seconds
        self._clock = clock or SystemClock()
        self._known: dict[tuple[str, str], TokenScores] = {}

    @property
    def capabilities(self) -> ScorerCapabilities:
        return self._scorer.capabilities

    @property
    def fingerprint(self) -> str:
        return self._scorer.fingerprint

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer."""
        self._scorer.watch(observer)

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """The scores of every example, in order.

        Raises RejectedError where the batch or a request of it is refused, TransientError where requests still fail
        after all rounds, ContractError for an answer that does not hold what was asked for.
        """
        failures: dict[str, str] = {}
        for round_number in range(ROUNDS):
            missing = {e.key: e for e in batch if (model, e.key) not in self._known}
            if not missing:
                break
            failures = await self._round(model, missing, round_number)
        missing_now = [e for e in batch if (model, e.key) not in self._known]
        if missing_now:
            first = missing_now[0]
            said = self._client.clean(failures.get(first.key[:_ID_CHARACTERS], "no answer"))
            raise TransientError(
                f"{len(missing_now)} of {len(batch)} requests of the batch failed {ROUNDS} times, the first for "
                f"example {first.example.id!r}: {said}. The answers to the others are kept."
            )
        return [self._known[model, e.key] for e in batch]

    async def _round(self, model: str, missing: dict[str, EncodedExample], round_number: int) -> dict[str, str]:
        """One batch: keeps what it answers, returns what it says of the lines that failed."""
        content = self._lines(model, missing)
        mark = hashlib.sha256(content + str(round_number).encode()).hexdigest()[:32]
        job = await self._find(mark) or await self._submit(content, mark)
        while job.get("status") not in _ENDED:
            await self._clock.sleep(self._poll_seconds)
            call = self._client.sdk.batches.with_raw_response.retrieve(str(job["id"]))
            job = await self._client.json(call, doing=f"reading batch {job['id']}", needs={"status": str})
        if job["status"] in _FAILED:
            raise RejectedError(self._client.clean(f"batch {job['id']} {job['status']}: {_problems(job)}"))
        by_id = {key[:_ID_CHARACTERS]: example for key, example in missing.items()}
        failures: dict[str, str] = {}
        for name in ("output_file_id", "error_file_id"):
            if isinstance(job.get(name), str):
                for line in await self._read(job[name]):
                    example = by_id.get(str(line.get("custom_id")))
                    if example is not None:
                        self._keep(model, example, line, failures)
        return failures

    def _lines(self, model: str, missing: dict[str, EncodedExample]) -> bytes:
        records = [
            {
                "custom_id": key[:_ID_CHARACTERS],
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": self._scorer.request(model, example),
            }
            for key, example in sorted(missing.items())
        ]
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()

    async def _find(self, mark: str) -> dict[str, Any] | None:
        """A batch with this mark that has not failed, by its metadata."""
        after: dict[str, Any] = {}
        while True:
            call = self._client.sdk.batches.with_raw_response.list(limit=_LIST_LIMIT, **after)
            page = await self._client.json(call, doing="listing batches", needs={"data": list})
            listed = [b for b in page["data"] if isinstance(b, dict) and isinstance(b.get("id"), str)]
            for job in listed:
                metadata = job.get("metadata")
                if isinstance(metadata, dict) and metadata.get(KEY_FIELD) == mark and job.get("status") not in _FAILED:
                    return job
            if not page.get("has_more") or not listed:
                return None
            after = {"after": listed[-1]["id"]}

    async def _submit(self, content: bytes, mark: str) -> dict[str, Any]:
        upload = self._client.sdk.files.with_raw_response.create(
            file=(f"daunce-batch-{mark}.jsonl", content, "application/jsonl"), purpose="batch"
        )
        file = await self._client.json(upload, doing="uploading a batch", needs={"id": str})
        call = self._client.sdk.batches.with_raw_response.create(
            input_file_id=file["id"],
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={KEY_FIELD: mark},
        )
        try:
            return await self._client.json(
                call, doing="creating a batch", submit=True, needs={"id": str, "status": str}
            )
        except AmbiguousSubmitError as error:
            unanswered = error
        for _ in range(_LOOKUPS):
            await self._clock.sleep(self._poll_seconds)
            found = await self._find(mark)
            if found is not None:
                return found
        raise TransientError(f"{unanswered} No batch with this mark appeared; it is sent again.")

    async def _read(self, file_id: str) -> Iterator[dict[str, Any]]:
        content = await self._client.content(
            self._client.sdk.files.with_raw_response.content(file_id), doing=f"reading {file_id}"
        )
        return (line for raw in content.splitlines() if (line := _object(raw)) is not None)

    def _keep(self, model: str, example: EncodedExample, line: dict[str, Any], failures: dict[str, str]) -> None:
        response = line.get("response")
        body = response.get("body") if isinstance(response, dict) else None
        if isinstance(body, dict) and isinstance(response, dict) and response.get("status_code") == 200:
            self._known[model, example.key] = self._scorer.read(model, example, body)
            return
        problem = line.get("error") or (body.get("error") if isinstance(body, dict) else None)
        said = problem.get("message") if isinstance(problem, dict) else problem
        failures[example.key[:_ID_CHARACTERS]] = str(said or "no answer")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._scorer.__aexit__(kind, error, trace)


_ID_CHARACTERS = 48
"""Of an example's key, as ``custom_id``: short of OpenAI's limit of 64."""


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _problems(job: dict[str, Any]) -> str:
    found = job.get("errors")
    listed = found.get("data") if isinstance(found, dict) else None
    messages = [str(e["message"]) for e in listed or () if isinstance(e, dict) and e.get("message")]
    return "; ".join(messages[:3]) or "the provider gave no reason"
