"""Scoring questions under the models that exist: no jobs; a model that is gone costs its member, not the question."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ..data.tokenizers import EncodedExample
from ..errors import RejectedError
from ..store import RunStore
from .client import ScoringClient
from .members import tokens_of

Models = Mapping[int, Mapping[int, str]]
"""By member (-1: the target, -2: the base) and checkpoint (0: the final model), the ids of models."""


class QuestionScoring:
    """Scores questions, each model's reserved before it is sent and settled after."""

    def __init__(
        self,
        client: ScoringClient,
        store: RunStore,
        *,
        exists: Callable[[str], Awaitable[bool]],
        usd_per_token: float,
        cap: float | None,
    ) -> None:
        """``exists``: whether the provider still has a model, asked where a request for it is refused."""
        self._client = client
        self._store = store
        self._exists = exists
        self._usd = usd_per_token
        self._cap = cap

    async def score(self, questions: Sequence[EncodedExample], models: Models) -> dict[int, str]:
        """Score what is missing; the members whose final model is gone, and why. Raises what the scoring client raises,
        and BudgetError at the cap; what was scored is kept."""
        gone: dict[int, str] = {}

        async def member(number: int, checkpoints: Mapping[int, str]) -> None:
            for checkpoint, model in sorted(checkpoints.items()):
                try:
                    await self._one(number, checkpoint, model, questions)
                except RejectedError as error:
                    if error.status != 404 and await self._exists(model):
                        raise
                    if checkpoint == 0:
                        gone[number] = str(error)
                        return
                    row = self._store.jobs.trained_by(number)
                    if row is not None:
                        self._store.jobs.checkpoint_gone(row.key, checkpoint, str(error))

        try:
            async with asyncio.TaskGroup() as group:
                for number, checkpoints in models.items():
                    group.create_task(member(number, checkpoints))
        except BaseExceptionGroup as errors:
            await self._client.drain()
            raise errors.exceptions[0] from errors
        return gone

    async def _one(self, member: int, checkpoint: int, model: str, questions: Sequence[EncodedExample]) -> None:
        scores, ledger = self._store.scores, self._store.ledger
        missing = [e for e in questions if not scores.has_all(scores.find_ids([e]), member, checkpoint=checkpoint)]
        if not missing:
            return
        tokens = tokens_of(missing) + self._client.tokens_of_test(model, missing)
        subject = f"questions of member {member}, checkpoint {checkpoint}"
        before = scores.cached_tokens(member, checkpoint)
        ledger.reserve(subject, tokens * self._usd, purpose="ask", cap=self._cap)
        await self._client.score_member(member, model, missing, checkpoint)
        saved = (scores.cached_tokens(member, checkpoint) - before) * self._usd
        ledger.settle(subject, max(0.0, ledger.unsettled().get(subject, 0.0) - saved))
