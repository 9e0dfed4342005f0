"""The scoring client: which log-probabilities are missing, sent in batches, kept as soon as they arrive.

It knows the ``Scorer`` protocol and the store, and no provider. What it sends follows from what the store lacks, so
scoring a member again after a crash repeats at most the batches that were under way.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from .._util.clock import Clock, SystemClock
from ..attribution.matrices import finish
from ..core.losses import Reduction
from ..data.tokenizers import EncodedExample
from ..errors import RejectedError, ReplayError
from ..plan.inputs import TESTS
from ..providers.base import Hosting, ProbeReport, Probing, Scorer
from ..providers.probe import probe_model, tokens_of_test
from ..store import RunStore, ScoreBatch
from .cache import ScoredCache
from .sending import Asking, Batch, Budget, Sender

Progress = Callable[[int, int, int], None]
"""Called with a member, what is scored of it, and everything that is."""


class ScoringClient:
    """Scores members; ``concurrency`` is the most requests at once (default: the scorer's own limit), and rate limits
    lower it for a while (:mod:`daunce_api.score.slots`).

    What ``cache`` knows of is not sent, except for replicates. A model that is complete gets its row of losses
    (``reduction``). ``budget``: see :class:`.sending.Sender`. ``replayed``: the protocol of a recording that is
    replayed; an older one holds no tests of fine-tunes. ``base``: the model that fine-tunes are compared with.
    """

    def __init__(
        self,
        scorer: Scorer,
        store: RunStore,
        *,
        concurrency: int | None = None,
        clock: Clock | None = None,
        cache: ScoredCache | None = None,
        reduction: Reduction = "mean",
        budget: Budget | None = None,
        replayed: int | None = None,
        base: str | None = None,
    ) -> None:
        self._scorer = scorer
        self._cache = cache
        self._store = store
        limits = scorer.capabilities
        self.sender = Sender(
            scorer,
            store,
            concurrency=concurrency or limits.max_concurrent_requests,
            clock=clock or SystemClock(),
            budget=budget or Budget(),
        )
        # The requests of many members must not take turns on a server that holds a few models: every turn loads one.
        self._models = asyncio.Semaphore(limits.max_models or sys.maxsize)
        if isinstance(scorer, Hosting):
            scorer.record(store.hosted)
        self._reduction = reduction
        self._base = base
        self._tests_fine_tunes = replayed is None or replayed >= 2
        self._prepared: tuple[tuple[EncodedExample, ...], Batch] = ((), [])

    async def score_member(
        self,
        member: int,
        model: str,
        examples: Sequence[EncodedExample],
        checkpoint: int = 0,
        *,
        twice: Sequence[EncodedExample] = (),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Score what the store lacks for this member; the number of examples scored now. ``checkpoint`` numbers its
        models from the final one (0) backwards; ``twice`` are measured a second time (replicate 1) among
        the others, for the noise: a server that batches gives an example other values in company than alone.
        ``on_progress`` gets the numbers of scored examples and of all after every batch.

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
                before, total = len(prepared) - len(missing), len(prepared)

                def report(done: int) -> None:
                    if on_progress is not None:
                        on_progress(before + done, total)

                asking = Asking(self.sender, member, model, 0, checkpoint, report)
                scored = await self._score_missing(missing, asking, again, Asking(self.sender, member, model, 1))
        await self._finish(prepared, member, checkpoint)
        return scored

    async def measure(self, member: int, model: str, examples: Sequence[EncodedExample], replicate: int = 1) -> int:
        """Measure examples on top of a member's own scores, those that were not yet; the number measured now. It is
        booked on its own. Raises BudgetError at the cap, and what :meth:`score_member` raises."""
        missing = self._missing(await asyncio.to_thread(self._prepare, examples), member, replicate, 0)
        if not missing:
            return 0
        async with self._models:
            await self.sender.book(f"comparison of {model}", sum(len(e.ids) for _, e in missing), "score")
            return await self._score_missing(missing, Asking(self.sender, member, model, replicate))

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
        self._store.scores.save(fingerprint, [batch])
        tokens = sum(len(example.ids) for number, example in missing if number in known)
        self._store.scores.add_cached(member, checkpoint, len(known), tokens)
        return [item for item in missing if item[0] not in known]

    async def _score_missing(
        self, missing: Batch, asking: Asking, beside: Batch | None = None, other: Asking | None = None
    ) -> int:
        """Send what is missing, and what ``other`` asks for right behind its first batch."""
        capabilities = self._scorer.capabilities
        limits = capabilities.max_prompts_per_request, capabilities.max_tokens_per_request
        sent = [(asking, batch) for batch in batches(missing, *limits)]
        sent[1:1] = [(other or asking, batch) for batch in batches(beside or [], *limits)]
        await self.sender.score(sent)
        return asking.scored

    async def drain(self) -> None:
        """Wait until every answer that arrived is in the store, also after an error."""
        await self.sender.writer.drain()

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
            await self.sender.book(f"test of {model}", tokens, "probe")
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
            async with self.sender.slots.slot():
                tokens = self.tokens_of_test(model, [example])
                test = partial(probe_model, scorer, model, example, base=self._base)
                report = await self.sender.send(test, f"test {model}", tokens, "probe")
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
        self.sender.in_flight(-tokens)
        return report


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
