"""Scores of a store by the keys of their examples, for tests that plant or compare a few."""

from __future__ import annotations

from collections.abc import Mapping

from daunce_api.providers.base import TokenScores
from daunce_api.store import RunStore, ScoreBatch


def put(
    store: RunStore,
    member: int,
    replicate: int,
    fingerprint: str,
    scores: Mapping[str, TokenScores],
    checkpoint: int = 0,
) -> None:
    """Save scores by example key; an example that the store does not know has ten tokens."""
    ids = store.scores.register(dict.fromkeys(scores, 10))
    store.scores.save(fingerprint, [ScoreBatch(member, replicate, checkpoint, ids, list(scores.values()))])


def by_key(store: RunStore, member: int, replicate: int = 0, checkpoint: int = 0) -> dict[str, TokenScores]:
    """All scores of a model that are in use."""
    keys = dict(store._db.execute("SELECT id, key FROM examples"))
    return {keys[i]: s for i, s in store.scores.load(member, replicate, checkpoint).scores().items()}


def members_scored(store: RunStore) -> list[int]:
    """Members of which anything in use is measured, ascending."""
    return sorted({member for member, _, _ in store.scores.models()})
