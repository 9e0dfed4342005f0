"""Scoring a run's models: members as soon as they exist, questions under those that do; money is reserved before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import RejectedError
from ..store import TARGET, Purpose, RunStore
from ..train import JobClient
from .client import Progress, ScoringClient

Models = Mapping[int, Mapping[int, str]]
"""By member (-1: the target, -2: the base) and checkpoint (0: the final model), the ids of models."""


@dataclass(frozen=True, eq=False)
class MemberScoring:
    """Everything that is asked of one member's models: the questions, then the training ``examples``.

    ``usd_per_model``: dollars of measuring one model once; ``usd_again``: of what a member is measured on twice.
    """

    client: ScoringClient
    store: RunStore
    jobs: JobClient
    config: RunConfig
    questions: Sequence[EncodedExample]
    examples: Sequence[EncodedExample]
    usd_per_model: float | None = None
    usd_again: float | None = None
    purpose: Purpose = "score"
    on_progress: Progress | None = None

    @cached_property
    def asked(self) -> tuple[EncodedExample, ...]:
        """What each model is measured on."""
        return (*self.questions, *self.examples)

    @cached_property
    def shortest(self) -> EncodedExample:
        """What the endpoint is tested with: any example will do, the same one every time, cheap."""
        return min(self.asked, key=lambda e: (len(e.ids), e.ids, e.targets))

    async def member(self, member: int, model: str) -> None:
        """Score what is missing of a member's final model and its earlier checkpoints."""
        wanted = 1 if member == TARGET else self.config.ensemble.checkpoints
        models = {0: model, **await self.jobs.earlier_models(member, wanted)}
        for rank, (number, checkpoint) in enumerate(models.items()):
            await self._model(member, number, checkpoint, rank, len(models))

    async def _model(self, member: int, number: int, model: str, rank: int, models: int) -> None:
        """One of the member's models; one from before the end of its job that is gone is left out."""
        store, jobs, asked = self.store, self.jobs, self.asked
        if store.scores.has_all(store.scores.find_ids(asked), member, checkpoint=number):
            return
        twice = self.examples[: self.config.scoring.noise_probe] if number == 0 and member != TARGET else ()
        usd = (self.usd_per_model or 0.0) + (self.usd_again or 0.0 if twice else 0.0)
        tokens = tokens_of(asked) + tokens_of(twice)
        subject = f"scoring of member {member}" + (f", checkpoint {number}" if number else "")

        def progressed(done: int, total: int) -> None:
            if self.on_progress is not None:
                self.on_progress(member, rank * total + done, models * total)

        cap = self.config.budget.max_usd
        with booked(store, subject, usd, tokens, member, number, cap=cap, purpose=self.purpose):
            while True:
                try:
                    await self.client.score_member(member, model, asked, number, twice=twice, on_progress=progressed)
                except RejectedError as error:
                    if number == 0:
                        raise
                    if await jobs.is_not_yet(model, error):
                        continue
                    if not await jobs.checkpoint_is_gone(member, number, model, error):
                        raise
                return


async def score_questions(
    client: ScoringClient,
    store: RunStore,
    jobs: JobClient,
    questions: Sequence[EncodedExample],
    models: Models,
    *,
    usd_per_token: float,
    cap: float | None,
    on_progress: Progress | None = None,
) -> dict[int, str]:
    """Score questions under the models that exist: what is missing, each model's reserved before it is sent and settled
    after; the members whose final model is gone, and why.

    Raises what the scoring client raises, and BudgetError at the cap; what was scored is kept.
    """
    scores = store.scores
    gone: dict[int, str] = {}

    async def one(member: int, checkpoint: int, model: str) -> None:
        missing = [e for e in questions if not scores.has_all(scores.find_ids([e]), member, checkpoint=checkpoint)]
        if not missing:
            return
        tokens = tokens_of(missing) + client.tokens_of_test(model, missing)
        subject = f"questions of member {member}, checkpoint {checkpoint}"
        before = scores.cached_tokens(member, checkpoint)
        report = None if on_progress is None else partial(on_progress, member)
        usd = tokens * usd_per_token
        with booked(store, subject, usd, tokens, member, checkpoint, cap=cap, purpose="ask", before=before):
            await client.score_member(member, model, missing, checkpoint, on_progress=report)

    async def all_of(member: int, checkpoints: Mapping[int, str]) -> None:
        for checkpoint, model in sorted(checkpoints.items()):
            try:
                await one(member, checkpoint, model)
            except RejectedError as error:
                if checkpoint and await jobs.checkpoint_is_gone(member, checkpoint, model, error):
                    continue
                if checkpoint or (error.status != 404 and await jobs.model_exists(model)):
                    raise
                gone[member] = str(error)
                return

    try:
        async with asyncio.TaskGroup() as group:
            for number, checkpoints in models.items():
                group.create_task(all_of(number, checkpoints))
    except BaseExceptionGroup as errors:
        await client.drain()
        raise errors.exceptions[0] from errors
    return gone


@contextmanager
def booked(
    store: RunStore,
    subject: str,
    usd: float,
    tokens: int,
    member: int,
    checkpoint: int = 0,
    *,
    cap: float | None,
    purpose: Purpose = "score",
    before: int = 0,
) -> Iterator[None]:
    """Reserve the price ``usd`` of scoring one model on ``tokens`` tokens; afterwards, settle what was not in the
    cache, by its share of the tokens (``before``: those that had come from there for other examples). What fails keeps
    its reservation."""
    store.ledger.reserve(subject, usd, purpose=purpose, cap=cap)
    yield
    saved = usd * min(1.0, (store.scores.cached_tokens(member, checkpoint) - before) / tokens)
    # The reservation holds what earlier measurements of this model were billed, too.
    store.ledger.settle(subject, max(0.0, store.ledger.unsettled().get(subject, usd) - saved))


def tokens_of(examples: Sequence[EncodedExample]) -> int:
    """Tokens of the distinct examples."""
    return sum(len(example.ids) for example in {e.key: e for e in examples}.values())
