"""Requests for scores: sent in batches, repeated, paid for, and kept as soon as they are answered.

An answer that arrives while a transaction is being written waits for the next one, so that nothing stops for a sync.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from .._util.clock import Clock
from .._util.files import overwrite
from .._util.retry import Retrier, RetryPolicy
from ..data.tokenizers import EncodedExample
from ..errors import ContractError, ProviderError, RejectedError, StoreError, TransientError
from ..providers.base import Deferred, Metered, Scorer, TokenScores
from ..store import Purpose, RunStore, ScoreBatch
from .slots import AdaptiveSlots

RETRIES = RetryPolicy(first=0.5, longest=30.0, attempts=12, total=600.0)
"""Of one request for scores."""
IN_FLIGHT = "in_flight"
"""Inside the run folder: tokens that a process that is killed has sent and may have been billed for. The next one
sends them again, and books what this file holds: so the ledger is never less than the bill."""

Answer = TypeVar("Answer")
Batch = list[tuple[int, EncodedExample]]
"""Examples with their ids in the store."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What requests cost that come on top of what was reserved for a model: those that are sent again, and the test
    with the base model.

    ``usd_per_token`` of a prompt, answers included; ``cap`` dollars of the whole ledger, or None.
    """

    usd_per_token: float = 0.0
    cap: float | None = None


class GroupCommit:
    """One writer for many scoring tasks.

    :meth:`save` returns when its batch is on disk. A transaction runs in a thread, since a full sync takes
    milliseconds in which requests can go on; batches that arrive meanwhile share the next transaction.
    """

    def __init__(self, store: RunStore, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._waiting: list[tuple[ScoreBatch, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def save(self, batch: ScoreBatch) -> None:
        """Store a batch, all of it or none. Raises StoreError and RunChangedError as the store does."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((batch, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await done

    async def drain(self) -> None:
        """Wait until what was given so far is on disk, also that of tasks that were cancelled."""
        while self._writer is not None:
            await asyncio.wait({self._writer})

    async def _write(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                error: Exception | None = None
                try:
                    await asyncio.to_thread(self._store.scores.save, self._fingerprint, [entry for entry, _ in group])
                except Exception as caught:
                    error = caught
                for _, done in group:
                    if done.done():  # its task was cancelled; the batch is stored all the same
                        continue
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        finally:
            self._writer = None


class Sender:
    """What a run's scoring sends, within one bound on concurrency for all models together.

    A request is repeated by one policy (``RETRIES``), then its TransientError is raised; a request that waits keeps its
    place, so that a rate limit slows everything down instead of starting a storm. ``budget`` pays for what is sent
    again: reserved before it is sent, BudgetError at the cap.
    """

    def __init__(self, scorer: Scorer, store: RunStore, *, concurrency: int, clock: Clock, budget: Budget) -> None:
        self.scorer = scorer
        self.requests = 0
        """Requests sent so far, repeats included."""
        self._store = store
        self._concurrency = concurrency
        self._budget = budget
        self._retry = Retrier(RETRIES, clock)
        self.slots = AdaptiveSlots(concurrency, clock)
        self.writer = GroupCommit(store, scorer.fingerprint)
        self._full: StoreError | None = None
        if isinstance(scorer, Metered):
            scorer.watch(self.slots.observe)
        # A batch API's answers are found again and not paid for twice.
        self._counts = budget.usd_per_token > 0 and not isinstance(scorer, Deferred)
        self._sent_tokens = 0
        if self._counts and (left := _left_in_flight(store.run_dir)):
            usd = left * budget.usd_per_token
            store.ledger.add("again: what was in flight when an earlier process ended", usd, purpose="score")
            self.in_flight(0)

    async def score(self, batches: Sequence[tuple[Asking, Batch]]) -> None:
        """Send batches in their order and keep what is answered. After an error no new one is sent, those under way
        are still received and stored, and then it is raised."""
        queue = deque(batches)
        failures = list[Exception]()

        async def work() -> None:
            while queue and not failures:
                asking, batch = queue.popleft()
                try:
                    async with self.slots.slot():
                        if self._full is not None:  # an answer that cannot be kept is not sent for
                            raise self._full
                        if not failures:
                            await asking.batch(batch)
                except StoreError as error:
                    self._full = error
                    failures.append(error)
                except Exception as error:
                    failures.append(error)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(queue))):
                group.create_task(work())
        if failures:
            raise failures[0]

    async def send(
        self, request: Callable[[], Awaitable[Answer]], what: str, tokens: int, purpose: Purpose = "score"
    ) -> Answer:
        """Send a request until it is answered. What may have been acted on already is paid for again. The answer is in
        flight until whoever gets it has stored it; so is a request without an answer that was given up."""
        acted_on = False

        async def send() -> Answer:
            nonlocal acted_on
            if acted_on:
                await self.book(f"again: {what}", tokens, purpose)
            else:
                self.in_flight(tokens)
            self.requests += 1
            try:
                answer = await request()
            except TransientError as error:
                acted_on = error.status != 429
                if error.status == 429:
                    self.slots.limited()
                    self.in_flight(-tokens)
                raise
            except ContractError:
                raise  # answered, and paid for
            except ProviderError:
                self.in_flight(-tokens)
                raise
            except asyncio.CancelledError:
                # Its answer is lost, and the same command sends it again; paid for already, so no cap holds it.
                if usd := tokens * self._budget.usd_per_token:
                    with suppress(StoreError):
                        self._store.ledger.add(f"again: {what}", usd, purpose=purpose)
                        self.in_flight(-tokens)
                raise
            self.slots.succeeded()
            return answer

        return await self._retry(send, what)

    async def book(self, subject: str, tokens: int, purpose: Purpose) -> None:
        """Book a request that no reservation covers, before it is sent. Raises BudgetError at the cap."""
        usd = tokens * self._budget.usd_per_token
        if usd:
            add = self._store.ledger.add
            await asyncio.to_thread(add, subject, usd, purpose=purpose, cap=self._budget.cap)

    def in_flight(self, tokens: int) -> None:
        """Tokens are sent (or, where negative, answered and stored). Raises StoreError where that cannot be noted;
        without a price nothing is."""
        if not self._counts:
            return
        self._sent_tokens += tokens
        overwrite(self._store.run_dir / IN_FLIGHT, f"{self._sent_tokens:020d}".encode())


def _left_in_flight(folder: Path) -> int:
    """Tokens that an earlier process left in flight."""
    with suppress(OSError, ValueError):
        return max(0, int((folder / IN_FLIGHT).read_text(encoding="ascii")))
    return 0


@dataclass
class Asking:
    """The requests of one model; ``report`` is called with the number of examples that were scored so far."""

    sender: Sender
    member: int
    model: str
    replicate: int = 0
    checkpoint: int = 0
    report: Callable[[int], None] | None = None
    scored: int = 0

    async def batch(self, batch: Batch, *, again: bool = False) -> None:
        """Score and keep a batch; one that is refused is halved until the example at fault is alone.

        ``again``: the endpoint has answered for these examples before, and is paid once more.
        """
        sender = self.sender
        tokens = sum(len(example.ids) for _, example in batch)
        what = f"score member {self.member}"
        try:
            if again:
                await sender.book(f"again: {what}", tokens, "score")
            answers = await self._answers(batch, what, tokens)
        except (RejectedError, ContractError) as error:
            if len(batch) == 1 or error.status == 404:
                raise _named(error, self.member, batch) from error
            middle = len(batch) // 2
            answered = again or isinstance(error, ContractError)
            if isinstance(error, ContractError):  # the halves are booked again
                sender.in_flight(-tokens)
            await self.batch(batch[:middle], again=answered)
            await self.batch(batch[middle:], again=answered)
            return
        ids = np.array([number for number, _ in batch], np.int32)
        await sender.writer.save(ScoreBatch(self.member, self.replicate, self.checkpoint, ids, answers))
        if isinstance(sender.scorer, Deferred):
            await sender.scorer.release(self.model, [example for _, example in batch], self.replicate)
        self.scored += len(batch)
        if self.report is not None:
            self.report(self.scored)
        sender.in_flight(-tokens)

    async def _answers(self, batch: Batch, what: str, tokens: int) -> list[TokenScores]:
        scorer, model, examples = self.sender.scorer, self.model, [example for _, example in batch]

        async def ask() -> list[TokenScores]:
            if isinstance(scorer, Deferred):
                return await scorer.score_replicate(model, examples, self.replicate)
            return await scorer.score(model, examples)

        answers = await self.sender.send(ask, what, tokens)
        if len(answers) != len(examples):
            raise ContractError(f"the scorer gave {len(answers)} answers for {len(examples)} examples; none was used.")
        return answers


def _named(error: ProviderError, member: int, batch: Batch) -> ProviderError:
    where = f"member {member}"
    if len(batch) == 1:
        where += f", example {batch[0][1].example.id!r}"
    named = type(error)(f"{where}: {error} What was scored before is kept.")
    named.status = error.status
    return named
