"""One-token chat scoring by single requests or through OpenAI's Batch API: half the price, an answer within 24 hours.

A batch holds one model's requests and is found again by a mark, so a run that was interrupted reads the batch it paid
for instead of sending another. Lines that fail are asked again in a batch of their own; the others are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from ..._util.clock import Clock, SystemClock
from ...data.tokenizers import EncodedExample
from ...errors import CapabilityError, ContractError, DaunceError, ProviderError, RejectedError, TransientError
from ..base import Closing, Scorer, ScorerCapabilities, Swept, TokenScores
from ..contract import part_of
from ..registry import Context
from .batches import ENDPOINT, Batch, Batches, files_of
from .chat_token import ChatTokenOptions, ChatTokenScorer, open_tokenizer, scorer_capabilities
from .client import open_client

__all__ = ["open_scorer", "open_tokenizer", "scorer_capabilities"]

ROUNDS = 3
"""Times that requests which fail are submitted before a call gives up."""
MAX_BYTES = 200_000_000
"""Of a batch's input file; OpenAI's limit."""
ANOTHER_HOUR = 3600.0
"""Seconds until requests that failed in every round are worth another try."""

_ID_CHARACTERS = 48
"""Of an example's key, as ``custom_id``: short of OpenAI's limit of 64."""

Question = tuple[str, str, int]
"""Model, example key, replicate."""
Asked = dict[Question, EncodedExample]
Part = tuple[bytes, str]
"""The lines of one batch, and the mark that it is found again by."""


@dataclass(slots=True)
class _Left:
    """Files of a batch that was read, and the answers of it that are not safe elsewhere yet."""

    files: list[str]
    open: set[Question]


def open_scorer(context: Context) -> Scorer:
    """A one-token scorer of the config's endpoint, by single requests or through the Batch API."""
    options, capabilities = ChatTokenOptions.of(context.config), scorer_capabilities(context.config)
    client = open_client(context, options, concurrency=capabilities.max_concurrent_requests)
    if not options.batch_api:
        return ChatTokenScorer(client, context.config, capabilities, options)
    options = options.model_copy(update={"batch_api": False})
    scorer = ChatTokenScorer(client, context.config, options.capabilities(capabilities.provider), options)
    return BatchScorer(scorer, capabilities, poll_seconds=options.batch_poll_seconds)


class BatchScorer(Closing):
    """``Deferred`` scorer: sends the requests of a scorer of single requests as batches. Closing it closes that scorer.

    ``score`` returns when its batches have ended. Answers that a call got and could not return, since others failed,
    are used by the next call; what was returned is forgotten, so that asking again measures again.
    """

    def __init__(
        self,
        scorer: ChatTokenScorer,
        capabilities: ScorerCapabilities,
        *,
        poll_seconds: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        self._scorer = scorer
        self.fingerprint = scorer.fingerprint
        self.capabilities = capabilities
        self._client = scorer.client
        self._batches = Batches(scorer.client, poll_seconds=poll_seconds, clock=clock or SystemClock())
        self._known: dict[Question, TokenScores] = {}
        self._refused: dict[Question, DaunceError] = {}
        self._left: list[_Left] = []

    @property
    def immediate(self) -> ChatTokenScorer:
        """The scorer of the same numbers by single requests, at their full price."""
        return self._scorer

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer."""
        self._scorer.watch(observer)

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """:meth:`score_replicate` of the first measurement."""
        return await self.score_replicate(model, batch, 0)

    async def score_replicate(self, model: str, batch: Sequence[EncodedExample], replicate: int) -> list[TokenScores]:
        """The scores of every example, in order.

        Raises RejectedError where a batch is refused or the provider will never answer a request of it, ContractError
        for an answer that does not hold what was requested, TransientError where requests still fail after
        ``ROUNDS`` batches of this call. The answers to the others are kept.
        """
        asked = {(model, e.key, replicate): e for e in batch}
        said: dict[Question, str] = {}
        read: set[str] = set()
        rounds = 0
        while True:
            for question in asked:
                if question in self._refused:
                    raise self._refused[question]
            missing = {q: e for q, e in asked.items() if q not in self._known}
            if not missing:
                break
            parts = self._parts(model, missing, replicate)
            found = [(part, await self._batches.find(part[1], read)) for part in parts]
            if any(job is None for _, job in found):
                if rounds == ROUNDS:
                    raise self._given_up(missing, said, len(batch))
                rounds += 1
            jobs = [(mark, job or await self._batches.submit(content, model, mark)) for (content, mark), job in found]
            await self._take(model, jobs, asked, said, read)
        answers = [self._known[model, e.key, replicate] for e in batch]
        for question in asked:
            del self._known[question]
        return answers

    async def release(self, model: str, batch: Sequence[EncodedExample], replicate: int) -> None:
        """The answers to these examples are on disk: delete the provider's files once all of theirs are."""
        kept = {(model, e.key, replicate) for e in batch}
        done = []
        for left in self._left:
            left.open -= kept
            if not left.open:
                done += left.files
        self._left = [left for left in self._left if left.open]
        await self._batches.forget(done)

    async def sweep(self, models: Sequence[str]) -> Swept:
        """Cancel batches that ask these models, and delete their files."""
        return await self._batches.sweep(models)

    async def _take(
        self, model: str, jobs: Sequence[tuple[str, Batch]], asked: Asked, said: dict[Question, str], read: set[str]
    ) -> None:
        """Wait for batches and keep what they answer; all are read before a refusal of one is raised."""
        by_id = {question[1][:_ID_CHARACTERS]: question for question in asked}
        failure: ProviderError | None = None
        for mark, job in jobs:
            try:
                ended = await self._batches.ended(job, model, mark)
            except RejectedError as error:
                failure = failure or error
                continue
            answered: set[Question] = set()
            for line in await self._batches.lines(ended):
                question = by_id.get(str(line.get("custom_id")))
                if question is None:
                    continue
                try:
                    self._known[question] = self._answer(model, asked[question], line)
                    answered.add(question)
                except TransientError as error:
                    said[question] = str(error)
                except (RejectedError, ContractError, CapabilityError) as error:
                    self._refused[question] = error
                except ProviderError as error:  # no credit, no permission, a daily limit: nothing else will do better
                    failure = error
            # Only now: a batch that could not be read is one to come back to.
            read.add(str(ended["id"]))
            if answered:
                self._left.append(_Left(files_of(ended), answered))
            else:
                await self._batches.forget(files_of(ended))
        if failure is not None:
            raise failure

    def _parts(self, model: str, missing: Asked, replicate: int) -> Iterator[Part]:
        """Groups of lines within the limit on bytes, always the same for the same question."""
        lines: list[bytes] = []
        size = 0
        for (_, key, _), example in sorted(missing.items()):
            record = {
                "custom_id": key[:_ID_CHARACTERS],
                "method": "POST",
                "url": ENDPOINT,
                "body": self._scorer.request(model, example),
            }
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
            if lines and size + len(line) > MAX_BYTES:
                yield _part(lines, replicate)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        yield _part(lines, replicate)

    def _answer(self, model: str, example: EncodedExample, line: dict[str, Any]) -> TokenScores:
        """The scores in a line of an answer. Raises what a single request with this answer would."""
        body, status = part_of(line, "response", "body"), part_of(line, "response", "status_code")
        if status == 200 and isinstance(body, dict):
            return self._scorer.read(model, example, body)
        doing = f"scoring example {example.example.id!r} under {model}"
        if isinstance(status, int) and status >= 400:
            raise self._client.calls.from_status(status, httpx2.Response(status, json=body), doing)
        message = part_of(line, "error", "message") or line.get("error")
        raise TransientError(self._client.calls.clean(f"{self._client.provider} did not answer {doing}: {message}"))

    def _given_up(self, missing: Asked, said: Mapping[Question, str], count: int) -> TransientError:
        question, example = next(iter(missing.items()))
        return TransientError(
            f"{len(missing)} of {count} requests of the batch failed {ROUNDS} times, the first for example "
            f"{example.example.id!r}: {said.get(question, 'no answer')} The answers to the others are kept.",
            ANOTHER_HOUR,
        )

    async def close(self) -> None:
        await self._client.close()


def _part(lines: Sequence[bytes], replicate: int) -> Part:
    content = b"".join(lines)
    # Without the replicate, a second measurement would be answered by the first one's batch: no noise at all.
    return content, hashlib.sha256(content + str(replicate).encode()).hexdigest()[:32]
