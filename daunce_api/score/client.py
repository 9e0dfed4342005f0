"""The scoring client: which log-probabilities are missing, asked for in batches, kept as soon as they arrive.

It knows the ``Scorer`` protocol and the store, and no provider. What it sends follows from what the store lacks, so
scoring a member again after a crash repeats at most the batches that were under way.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

import numpy as np
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from .._util.clock import Clock, SystemClock
from ..data.tokenizers import EncodedExample
from ..errors import ContractError, ProviderError, RejectedError, ReplayError, StoreError, TransientError
from ..providers.base import Deferred, Hosting, Metered, ProbeReport, Probing, Scorer, TokenScores
from ..store import RunStore, ScoreBatch
from .cache import ScoredCache
from .leases import ModelLeases
from .slots import AdaptiveSlots
from .writer import GroupCommit

PROBE_VALUE = "scorer_probe"
"""Key in the store under which the endpoint's one-time test is kept."""

PROBED_MEMBER = 0

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try of a request, and the most between two; doubled in between."""

Answer = TypeVar("Answer")
Batch = list[tuple[int, EncodedExample]]
"""Examples with their ids in the store."""
Keep = Callable[[Batch, Sequence[TokenScores]], Awaitable[None]]
Progress = Callable[[int, int, int], None]


class ScoringClient:
    """Scores members with one bound on concurrency for all of them together.

    ``concurrency`` is the most requests at once (default: the scorer's own limit); rate limits lower it for a while
    (:mod:`daunce_api.score.slots`). What ``cache`` knows is not asked for, except for replicates. A request is tried
    at most ``attempts`` times and waits ``patience`` seconds in all, then its TransientError is raised; a request
    that waits keeps its place, so that a rate limit slows everything down instead of starting a storm.
    ``on_progress`` gets (member, scored examples, all examples) after every batch.
    """

    def __init__(
        self,
        scorer: Scorer,
        store: RunStore,
        *,
        concurrency: int | None = None,
        clock: Clock | None = None,
        attempts: int = 12,
        patience: float = 600.0,
        on_progress: Progress | None = None,
        cache: ScoredCache | None = None,
    ) -> None:
        self._scorer = scorer
        self._cache = cache
        self._store = store
        self._concurrency = concurrency or scorer.capabilities.max_concurrent_requests
        self._writer = GroupCommit(store, scorer.fingerprint)
        self._clock = clock or SystemClock()
        self._slots = AdaptiveSlots(self._concurrency, self._clock)
        self._leases = ModelLeases(scorer.capabilities.max_models)
        if isinstance(scorer, Metered):
            scorer.watch(self._slots.observe)
        if isinstance(scorer, Hosting):
            scorer.record(store.hosted)
        self._attempts = attempts
        self._patience = patience
        self._on_progress = on_progress
        self._jitter = random.Random()
        self._probing = asyncio.Lock()
        self._full: StoreError | None = None
        self._prepared: tuple[tuple[EncodedExample, ...], Batch] = ((), [])
        self.requests = 0
        """Requests sent so far, repeats included."""

    async def score_member(
        self, member: int, model: str, examples: Sequence[EncodedExample], replicate: int = 0, checkpoint: int = 0
    ) -> int:
        """Score what the store lacks for this member; the number of examples scored now. ``checkpoint`` numbers its
        models from the final one (0) backwards.

        Examples with equal token ids and targets are sent once. Each batch is stored in one transaction when it
        arrives. After an error no new batch is sent, those under way are still received and stored, and then the
        error is raised: TransientError (given up), RejectedError and ContractError (naming the example), StopError.
        """
        given = tuple(examples)
        if self._prepared[0] != given:  # kept, since every member is asked the same
            self._prepared = (given, self._prepare(given))
        return await self._score(member, model, self._prepared[1], replicate, checkpoint)

    async def _score(self, member: int, model: str, prepared: Batch, replicate: int, checkpoint: int) -> int:
        done = self._store.scores.measured(member, replicate, checkpoint)
        missing = [item for item in prepared if item[0] >= done.size or not done[item[0]]]
        cache = self._cached(replicate)
        if cache is not None and missing:
            answers = cache.lookup(self._scorer.fingerprint, model, (example.key for _, example in missing))
            known = {number: answers[example.key] for number, example in missing if example.key in answers}
            batch = ScoreBatch(member, replicate, checkpoint, np.array([*known], np.int32), list(known.values()))
            self._store.scores.save(self._scorer.fingerprint, [batch])
            if known:
                tokens = sum(len(example.ids) for number, example in missing if number in known)
                self._store.scores.add_cached(member, checkpoint, len(known), tokens)
            missing = [item for item in missing if item[0] not in known]
        if not missing:
            return 0
        async with self._leases.lease(model):
            return await self._score_missing(member, model, prepared, missing, replicate, checkpoint)

    async def _score_missing(
        self, member: int, model: str, prepared: Batch, missing: Batch, replicate: int, checkpoint: int
    ) -> int:
        if member == PROBED_MEMBER and replicate == 0:
            await self.probe(model, missing[0][1])
        cache = self._cached(replicate)
        capabilities = self._scorer.capabilities
        queue = deque(batches(missing, capabilities.max_prompts_per_request, capabilities.max_tokens_per_request))
        scored, failures = 0, list[Exception]()

        async def keep(batch: Batch, answers: Sequence[TokenScores]) -> None:
            nonlocal scored
            ids = np.array([number for number, _ in batch], np.int32)
            await self._writer.save(ScoreBatch(member, replicate, checkpoint, ids, answers))
            if cache is not None:
                answered = {example.key: answer for (_, example), answer in zip(batch, answers, strict=True)}
                cache.save(self._scorer.fingerprint, model, answered)
            if isinstance(self._scorer, Deferred):
                await self._scorer.release(model, [example for _, example in batch], replicate)
            scored += len(batch)
            if self._on_progress is not None:
                self._on_progress(member, len(prepared) - len(missing) + scored, len(prepared))

        async def work() -> None:
            while queue and not failures:
                batch = queue.popleft()
                try:
                    async with self._slots:
                        if self._full is not None:  # an answer that cannot be kept is not asked for
                            raise self._full
                        await self._score_batch(member, model, batch, replicate, keep)
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
        return scored

    async def drain(self) -> None:
        """Wait until every answer that arrived is in the store, also after an error."""
        await self._writer.drain()

    def _prepare(self, examples: Sequence[EncodedExample]) -> Batch:
        """Distinct examples with their ids, those with equal beginnings beside each other (servers cache prefixes)."""
        distinct = dict(zip(self._store.scores.ids_of(examples).tolist(), examples, strict=True))
        return sorted(distinct.items(), key=lambda item: (item[1].ids, item[1].targets))

    def _cached(self, replicate: int) -> ScoredCache | None:
        """The cache; none for a replicate, which is there to be measured again."""
        return self._cache if replicate == 0 else None

    async def probe_noise(self, member: int, model: str, examples: Sequence[EncodedExample], count: int) -> int:
        """Score the first ``count`` distinct examples a second time (replicate 1); see ``measure_noise``."""
        return await self._score(member, model, self._prepare(examples[:count]), replicate=1, checkpoint=0)

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport | None:
        """Have the scorer test its endpoint with one model and one example, once a run; the report, or None where
        the scorer has no test.

        Best called with the base model before anything is trained. Otherwise member 0 is tested when it is scored: a
        fixed one, not the first to be ready, so that a replay sends the same requests. Raises ContractError where the
        endpoint fails the test; an endpoint that does not serve the model is tested with member 0.
        """
        scorer = self._scorer
        if not isinstance(scorer, Probing):
            return None
        async with self._leases.lease(model), self._probing:
            known = self._store.get_value(PROBE_VALUE)
            if known is not None:
                return ProbeReport(known["checked"], known["detail"], known["largest_difference"])
            try:
                report = await self._tried(lambda: scorer.probe(model, example))
            except RejectedError as error:
                return ProbeReport(False, f"the endpoint could not be tested with {model}: {error}")
            except ReplayError as error:
                raise ReplayError(
                    f"{error} The request is part of the endpoint's test, which recordings of earlier versions lack: "
                    "make a new one with daunce run CONFIG --record NEW_DIR."
                ) from error
            self._store.set_value(PROBE_VALUE, asdict(report))
            return report

    async def _score_batch(self, member: int, model: str, batch: Batch, replicate: int, keep: Keep) -> None:
        """Score and keep a batch; one that is refused is halved until the example at fault is alone."""
        try:
            answers = await self._ask(model, batch, replicate)
        except (RejectedError, ContractError) as error:
            if len(batch) == 1 or error.status == 404:
                raise _named(error, member, batch) from error
            middle = len(batch) // 2
            await self._score_batch(member, model, batch[:middle], replicate, keep)
            await self._score_batch(member, model, batch[middle:], replicate, keep)
        else:
            await keep(batch, answers)

    async def _ask(self, model: str, batch: Batch, replicate: int) -> list[TokenScores]:
        scorer, examples = self._scorer, [example for _, example in batch]
        if isinstance(scorer, Deferred):
            answers = await self._tried(lambda: scorer.score_replicate(model, examples, replicate))
        else:
            answers = await self._tried(lambda: scorer.score(model, examples))
        if len(answers) != len(examples):
            raise ContractError(f"the scorer gave {len(answers)} answers for {len(examples)} examples; none was used.")
        return answers

    async def _tried(self, request: Callable[[], Awaitable[Answer]]) -> Answer:
        """Send a request until it is answered, within the limits of the constructor."""
        retrying = AsyncRetrying(
            sleep=self._clock.sleep,
            retry=retry_if_exception_type(TransientError),
            wait=self._wait,
            stop=self._stop,
            reraise=True,
        )

        async def send() -> Answer:
            self.requests += 1
            try:
                answer = await request()
            except TransientError as error:
                if error.status == 429:
                    self._slots.limited()
                raise
            self._slots.succeeded()
            return answer

        try:
            return await retrying(send)
        except TransientError as error:
            raise TransientError(
                f"{error} Given up after {retrying.statistics['attempt_number']} tries and "
                f"{retrying.statistics['idle_for']:.0f} seconds of waiting. Everything scored so far is kept; run the "
                "same command again to go on.",
                error.retry_after,
            ) from error

    def _wait(self, state: RetryCallState) -> float:
        """What the server asks for and a little more, or twice as long as before; spread so that requests that
        failed together do not come back together."""
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after if isinstance(error, TransientError) else None
        if asked is not None:
            return asked + self._jitter.uniform(0.0, 0.1 * asked + 0.05)
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (state.attempt_number - 1))
        return self._jitter.uniform(0.5 * longest, longest)

    def _stop(self, state: RetryCallState) -> bool:
        # Waits are added up instead of read from a clock: tenacity's own limit looks at real time.
        return state.attempt_number >= self._attempts or state.idle_for + state.upcoming_sleep > self._patience


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
