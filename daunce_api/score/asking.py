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


async def score_questions(
    client: ScoringClient,
    store: RunStore,
    questions: Sequence[EncodedExample],
    models: Models,
    *,
    exists: Callable[[str], Awaitable[bool]],
    usd_per_token: float,
    cap: float | None,
) -> dict[int, str]:
    """Score what is missing, each model's reserved before it is sent and settled after; the members whose final model
    is gone, and why. ``exists``: whether the provider still has a model, asked where a request for it is refused.

    Raises what the scoring client raises, and BudgetError at the cap; what was scored is kept.
    """
    gone: dict[int, str] = {}

    async def one(member: int, checkpoint: int, model: str) -> None:
        scores, ledger = store.scores, store.ledger
        missing = [e for e in questions if not scores.has_all(scores.find_ids([e]), member, checkpoint=checkpoint)]
        if not missing:
            return
        tokens = tokens_of(missing) + client.tokens_of_test(model, missing)
        subject = f"questions of member {member}, checkpoint {checkpoint}"
        before = scores.cached_tokens(member, checkpoint)
        ledger.reserve(subject, tokens * usd_per_token, purpose="ask", cap=cap)
        await client.score_member(member, model, missing, checkpoint)
        saved = (scores.cached_tokens(member, checkpoint) - before) * usd_per_token
        ledger.settle(subject, max(0.0, ledger.unsettled().get(subject, 0.0) - saved))

    async def all_of(member: int, checkpoints: Mapping[int, str]) -> None:
        for checkpoint, model in sorted(checkpoints.items()):
            try:
                await one(member, checkpoint, model)
            except RejectedError as error:
                if error.status != 404 and await exists(model):
                    raise
                if checkpoint == 0:
                    gone[member] = str(error)
                    return
                row = store.jobs.trained_by(member)
                if row is not None:
                    store.jobs.checkpoint_gone(row.key, checkpoint, str(error))

    try:
        async with asyncio.TaskGroup() as group:
            for number, checkpoints in models.items():
                group.create_task(all_of(number, checkpoints))
    except BaseExceptionGroup as errors:
        await client.drain()
        raise errors.exceptions[0] from errors
    return gone
