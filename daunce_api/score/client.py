"""The scoring client: which log-probabilities are missing, sent in batches, kept as soon as they arrive.

It knows the ``Scorer`` protocol and the store, and no provider. What it sends follows from what the store lacks, so
scoring a member again after a crash repeats at most the batches that were under way.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from .._util.clock import Clock, SystemClock
from .._util.retry import Retrier, RetryPolicy
from ..attribution.matrices import finish
from ..core.losses import Reduction
from ..data.tokenizers import EncodedExample
from ..errors import ContractError, ProviderError, RejectedError, ReplayError, StoreError, TransientError
from ..plan.inputs import TESTS
from ..providers.base import Deferred, Hosting, Metered, ProbeReport, Probing, Scorer, TokenScores
from ..providers.probe import probe_model, tokens_of_test
from ..store import RunStore, ScoreBatch
from ..store.ledger import Purpose
from .cache import ScoredCache
from .in_flight import InFlight
from .slots import AdaptiveSlots
from .writer import GroupCommit

RETRIES = RetryPolicy(first=0.5, longest=30.0, attempts=12, total=600.0)
"""Of one request for scores."""

Answer = TypeVar("Answer")
Batch = list[tuple[int, EncodedExample]]
"""Examples with their ids in the store."""
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """What requests cost that come on top of what was reserved for a model: those that are sent again, and the test
    with the base model.

    ``usd_per_token`` of a prompt, answers included; ``cap`` dollars of the whole ledger, or None.
    """

    usd_per_token: float = 0.0
    cap: float | None = None


class ScoringClient:
    """Scores members with one bound on concurrency for all of them together.

    ``concurrency`` is the most requests at once (default: the scorer's own limit); rate limits lower it for a while
    (:mod:`daunce_api.score.slots`). What ``cache`` knows of is not sent, except for replicates. A request is
    repeated by one policy (``RETRIES``), then its TransientError is raised; a request that waits keeps its place, so
    that a rate limit slows everything down instead of starting a storm. ``on_progress`` gets
    (member, scored examples, all examples) after every batch of a member's own scores. A model that is complete gets
    its row of losses (``reduction``). ``budget`` pays for what is sent again: reserved before it is sent, BudgetError
    at the cap. ``replayed``: the protocol of a recording that is replayed; an older one holds no tests of fine-tunes.
    ``base``: the model that fine-tunes are compared with.
    """

    def __init__(
        self,
        scorer: Scorer,
        store: RunStore,
        *,
        concurrency: int | None = None,
        clock: Clock | None = None,
        on_progress: Progress | None = None,
        cache: ScoredCache | None = None,
        reduction: Reduction = "mean",
        budget: Budget | None = None,
        replayed: int | None = None,
        base: str | None = None,
    ) -> None:
        self._scorer = scorer
        self._cache = cache
        self._store = store
        self._concurrency = concurrency or scorer.capabilities.max_concurrent_requests
        self._writer = GroupCommit(store, scorer.fingerprint)
        clock = clock or SystemClock()
        self._retry = Retrier(RETRIES, clock)
        self._slots = AdaptiveSlots(self._concurrency, clock)
        # The requests of many members must not take turns on a server that holds a few models: every turn loads one.
        self._models = asyncio.Semaphore(scorer.capabilities.max_models or sys.maxsize)
        if isinstance(scorer, Metered):
            scorer.watch(self._slots.observe)
        if isinstance(scorer, Hosting):
            scorer.record(store.hosted)
        self._on_progress = on_progress
        self._reduction = reduction
        self._budget = budget or Budget()
        # A batch API's answers are found again and not paid for twice.
        priced = self._budget.usd_per_token > 0 and not isinstance(scorer, Deferred)
        self._in_flight = InFlight(store.run_dir, counts=priced)
        if priced and (left := self._in_flight.left()):
            usd = left * self._budget.usd_per_token
            store.ledger.add("again: what was in flight when an earlier process ended", usd, purpose="score")
            self._in_flight.clear()
        self._base = base
        self._tests_fine_tunes = replayed is None or replayed >= 2
        self._full: StoreError | None = None
        self._prepared: tuple[tuple[EncodedExample, ...], Batch] = ((), [])
        self.requests = 0
        """Requests sent so far, repeats included."""

    async def score_member(
        self,
        member: int,
        model: str,
        examples: Sequence[EncodedExample],
        checkpoint: int = 0,
        *,
        twice: Sequence[EncodedExample] = (),
    ) -> int:
        """Score what the store lacks for this member; the number of examples scored now. ``checkpoint`` numbers its
        models from the final one (0) backwards; ``twice`` are measured a second time (replicate 1) among
        the others, for the noise: a server that batches gives an example other values in company than alone.

        The endpoint is tested with every model once, before any of its values is stored. Examples with equal token ids
        and targets are sent once. Each batch is stored in one transaction when it arrives. After an error no new batch
        is sent, those under way are still received and stored, and then the error is raised: TransientError (given
        up), RejectedError and ContractError (naming the example), StopError, BudgetError (something would have to be
        sent again).
        """
        given = tuple(examples)
        if self._prepared[0] is not examples and self._prepared[0] != given:  # every member is scored on the same
            self._prepared = (given, await asyncio.to_thread(self._prepare, given))
        prepared = self._prepared[1]
        again = self._missing(self._prepare(twice), member, 1, 0)
        missing = self._missing(prepared, member, 0, checkpoint)
        if missing and self._cache is not None:
            missing = await asyncio.to_thread(self._from_elsewhere, self._cache, member, model, missing, checkpoint)
        scored = 0
        if again or missing:
            async with self._models:
                if self._tests_fine_tunes:
                    await self._test(model, min((e for _, e in prepared), key=lambda e: (len(e.ids), e.ids)))
                asking = _Asking(self, member, model, 0, checkpoint, len(prepared), len(prepared) - len(missing))
                scored = await self._score_missing(missing, asking, again, _Asking(self, member, model, 1))
        await self._finish(prepared, member, checkpoint)
        return scored

    async def measure(self, member: int, model: str, examples: Sequence[EncodedExample], replicate: int = 1) -> int:
        """Measure examples on top of a member's own scores, those that were not yet; the number measured now. It is
        booked on its own. Raises BudgetError at the cap, and what :meth:`score_member` raises."""
        missing = self._missing(await asyncio.to_thread(self._prepare, examples), member, replicate, 0)
        if not missing:
            return 0
        async with self._models:
            await self._book(f"comparison of {model}", sum(len(e.ids) for _, e in missing), "score")
            return await self._score_missing(missing, _Asking(self, member, model, replicate))

    def _missing(self, prepared: Batch, member: int, replicate: int, checkpoint: int) -> Batch:
        done = self._store.scores.measured(member, replicate, checkpoint)
        return [item for item in prepared if item[0] >= done.size or not done[item[0]]]

    async def _finish(self, prepared: Batch, member: int, checkpoint: int) -> None:
        """Keep the losses of a model that is complete."""
        ids = np.array([number for number, _ in prepared], np.int32)
        if ids.size and not self._store.scores.has_row(ids, member, checkpoint):
            await asyncio.to_thread(finish, self._store, ids, member, checkpoint, self._reduction)

    def _from_elsewhere(self, cache: ScoredCache, member: int, model: str, missing: Batch, checkpoint: int) -> Batch:
        """Take over what another run holds; what is still missing."""
        examples = [example for _, example in missing]
        fingerprint, here = self._scorer.fingerprint, self._store.run_dir
        answers = cache.lookup(fingerprint, model, examples, besides=here)
        cache.note(fingerprint, model, here, member, checkpoint)
        known = {number: answers[example.key] for number, example in missing if example.key in answers}
        if not known:
            return missing
        batch = ScoreBatch(member, 0, checkpoint, np.array([*known], np.int32), list(known.values()))
        self._store.scores.save(self._scorer.fingerprint, [batch])
        tokens = sum(len(example.ids) for number, example in missing if number in known)
        self._store.scores.add_cached(member, checkpoint, len(known), tokens)
        return [item for item in missing if item[0] not in known]

    async def _score_missing(
        self, missing: Batch, asking: _Asking, beside: Batch | None = None, other: _Asking | None = None
    ) -> int:
        """Send what is missing, and what ``other`` asks for right behind its first batch."""
        capabilities = self._scorer.capabilities
        limits = capabilities.max_prompts_per_request, capabilities.max_tokens_per_request
        sent = [(asking, batch) for batch in batches(missing, *limits)]
        sent[1:1] = [(other or asking, batch) for batch in batches(beside or [], *limits)]
        queue = deque(sent)
        failures = list[Exception]()

        async def work() -> None:
            while queue and not failures:
                asker, batch = queue.popleft()
                try:
                    async with self._slots.slot():
                        if self._full is not None:  # an answer that cannot be kept is not sent for
                            raise self._full
                        if not failures:
                            await asker.batch(batch)
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
        return asking.scored

    async def drain(self) -> None:
        """Wait until every answer that arrived is in the store, also after an error."""
        await self._writer.drain()

    def _prepare(self, examples: Sequence[EncodedExample]) -> Batch:
        """Distinct examples with their ids, those with equal beginnings beside each other (servers cache prefixes)."""
        distinct = dict(zip(self._store.scores.ids_of(examples).tolist(), examples, strict=True))
        return sorted(distinct.items(), key=lambda item: (item[1].ids, item[1].targets))

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport | None:
        """Have the scorer test its endpoint with one model and one example, once a run; the report, or None where
        the scorer has no test.

        Best called with the base model before anything is trained: it is booked on its own. Every other model is
        tested before its first value is stored, as an endpoint can be right for the base and wrong for adapters.
        Raises ContractError where the endpoint fails the test; an endpoint that does not serve the model is not tested.
        """
        if tokens := self.tokens_of_test(model, [example]):
            await self._book(f"test of {model}", tokens, "probe")
        return await self._test(model, example)

    def tokens_of_test(self, model: str, examples: Sequence[EncodedExample]) -> int:
        """Tokens of testing the endpoint with a model before it is scored on ``examples``; 0 where it was tested."""
        if not isinstance(self._scorer, Probing) or model in self._store.get_value(TESTS, {}):
            return 0
        return tokens_of_test(min(len(e.ids) for e in examples))

    async def _test(self, model: str, example: EncodedExample) -> ProbeReport | None:
        scorer, reports = self._scorer, self._store.get_value(TESTS, {})
        if not isinstance(scorer, Probing):
            return None
        if model in reports:
            return ProbeReport(**reports[model])
        try:
            async with self._slots.slot():
                tokens = self.tokens_of_test(model, [example])
                test = partial(probe_model, scorer, model, example, base=self._base)
                report = await self._send(test, f"test {model}", tokens, "probe")
        except RejectedError as error:
            return ProbeReport(False, f"the endpoint could not be tested with {model}: {error}")
        except ReplayError as error:
            raise ReplayError(
                f"{error} The request is part of the endpoint's test, which recordings of earlier versions lack: "
                "make a new one with daunce run CONFIG --record NEW_DIR."
            ) from error
        assert report is not None
        kept = asdict(replace(report, generated=None))
        self._store.set_value(TESTS, {**self._store.get_value(TESTS, {}), model: kept})
        self._in_flight.add(-tokens)
        return report

    async def _send(
        self, request: Callable[[], Awaitable[Answer]], what: str, tokens: int, purpose: Purpose = "score"
    ) -> Answer:
        """Send a request until it is answered. What may have been acted on already is paid for again. The answer is in
        flight until whoever gets it has stored it; so is a request without an answer that was given up."""
        acted_on = False

        async def send() -> Answer:
            nonlocal acted_on
            if acted_on:
                await self._book(f"again: {what}", tokens, purpose)
            else:
                self._in_flight.add(tokens)
            self.requests += 1
            try:
                answer = await request()
            except TransientError as error:
                acted_on = error.status != 429
                if error.status == 429:
                    self._slots.limited()
                    self._in_flight.add(-tokens)
                raise
            except ContractError:
                raise  # answered, and paid for
            except ProviderError:
                self._in_flight.add(-tokens)
                raise
            except asyncio.CancelledError:
                # Its answer is lost, and the same command sends it again; paid for already, so no cap holds it.
                if usd := tokens * self._budget.usd_per_token:
                    with suppress(StoreError):
                        self._store.ledger.add(f"again: {what}", usd, purpose=purpose)
                        self._in_flight.add(-tokens)
                raise
            self._slots.succeeded()
            return answer

        return await self._retry(send, what)

    async def _book(self, subject: str, tokens: int, purpose: Purpose) -> None:
        """Book a request that no reservation covers, before it is sent. Raises BudgetError at the cap."""
        usd = tokens * self._budget.usd_per_token
        if usd:
            book = self._store.ledger.add
            await asyncio.to_thread(book, subject, usd, purpose=purpose, cap=self._budget.cap)


class _Asking:
    """The requests of one model."""

    def __init__(
        self,
        client: ScoringClient,
        member: int,
        model: str,
        replicate: int,
        checkpoint: int = 0,
        total: int = 0,
        before: int = 0,
    ) -> None:
        self._client = client
        self._member = member
        self._model = model
        self._replicate = replicate
        self._checkpoint = checkpoint
        self._total = total
        self._before = before
        self.scored = 0

    async def batch(self, batch: Batch, *, again: bool = False) -> None:
        """Score and keep a batch; one that is refused is halved until the example at fault is alone.

        ``again``: the endpoint has answered for these examples before, and is paid once more.
        """
        tokens = sum(len(example.ids) for _, example in batch)
        what = f"score member {self._member}"
        try:
            if again:
                await self._client._book(f"again: {what}", tokens, "score")
            answers = await self._answers(batch, what, tokens)
        except (RejectedError, ContractError) as error:
            if len(batch) == 1 or error.status == 404:
                raise _named(error, self._member, batch) from error
            middle = len(batch) // 2
            answered = again or isinstance(error, ContractError)
            if isinstance(error, ContractError):  # the halves are booked again
                self._client._in_flight.add(-tokens)
            await self.batch(batch[:middle], again=answered)
            await self.batch(batch[middle:], again=answered)
        else:
            await self._keep(batch, answers)
            self._client._in_flight.add(-tokens)

    async def _answers(self, batch: Batch, what: str, tokens: int) -> list[TokenScores]:
        scorer, model, examples = self._client._scorer, self._model, [example for _, example in batch]
        if isinstance(scorer, Deferred):
            answers = await self._client._send(
                lambda: scorer.score_replicate(model, examples, self._replicate), what, tokens
            )
        else:
            answers = await self._client._send(lambda: scorer.score(model, examples), what, tokens)
        if len(answers) != len(examples):
            raise ContractError(f"the scorer gave {len(answers)} answers for {len(examples)} examples; none was used.")
        return answers

    async def _keep(self, batch: Batch, answers: Sequence[TokenScores]) -> None:
        client = self._client
        ids = np.array([number for number, _ in batch], np.int32)
        await client._writer.save(ScoreBatch(self._member, self._replicate, self._checkpoint, ids, answers))
        if isinstance(client._scorer, Deferred):
            await client._scorer.release(self._model, [example for _, example in batch], self._replicate)
        self.scored += len(batch)
        if client._on_progress is not None and self._replicate == 0:
            client._on_progress(self._member, self._before + self.scored, self._total)


def batches(items: Batch, max_prompts: int, max_tokens: int | None) -> list[Batch]:
    """Consecutive groups of at most ``max_prompts`` examples and ``max_tokens`` tokens (one example may exceed it)."""
    result: list[Batch] = []
    tokens = 0
    for item in items:
        length = len(item[1].ids)
        full = not result or len(result[-1]) == max_prompts or (max_tokens is not None and tokens + length > max_tokens)
        if full:
            result.append([])
            tokens = 0
        result[-1].append(item)
        tokens += length
    return result


def _named(error: ProviderError, member: int, batch: Batch) -> ProviderError:
    where = f"member {member}"
    if len(batch) == 1:
        where += f", example {batch[0][1].example.id!r}"
    named = type(error)(f"{where}: {error} What was scored before is kept.")
    named.status = error.status
    return named
