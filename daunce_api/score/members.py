"""Scoring the members of a run: each as soon as it has a model, everything that it lacks; money reserved before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import RejectedError
from ..store import TARGET, RunStore
from ..store.ledger import Purpose
from ..train.models import Models
from .client import Progress, ScoringClient

IsScored = Callable[[int, int], bool]
"""Whether a member's checkpoint is measured on everything that it is asked about."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What every model of a run is scored on: ``first`` (questions) before ``then`` (training examples, if any)."""

    first: Sequence[EncodedExample]
    then: Sequence[EncodedExample]

    @property
    def all(self) -> tuple[EncodedExample, ...]:
        return (*self.first, *self.then)


class MemberScoring:
    """Everything that is asked of one member's models. ``usd_per_model``: dollars of measuring one model once;
    ``usd_again``: of what a member is measured on twice."""

    def __init__(
        self,
        client: ScoringClient,
        store: RunStore,
        config: RunConfig,
        asked: Asked,
        is_scored: IsScored,
        *,
        usd_per_model: float | None,
        usd_again: float | None,
        cap: float | None,
        purpose: Purpose = "score",
        on_progress: Progress | None = None,
    ) -> None:
        self._client = client
        self._store = store
        self._config = config
        self._asked = asked
        self._is_scored = is_scored
        self._usd = usd_per_model or 0.0
        self._usd_again = usd_again or 0.0
        self._cap = cap
        self._purpose = purpose
        self._on_progress = on_progress
        self._shares: dict[int, tuple[int, int]] = {}

    def progressed(self, member: int, done: int, total: int) -> None:
        """Progress over all models of a member; for the client's ``on_progress``."""
        before, models = self._shares.get(member, (0, 1))
        if self._on_progress is not None:
            self._on_progress(member, before * total + done, models * total)

    @cached_property
    def shortest(self) -> EncodedExample:
        """What the endpoint is tested with: any example will do, the same one every time, cheap."""
        return min(self._asked.all, key=lambda e: (len(e.ids), e.ids, e.targets))

    async def member(self, member: int, model: str, models: Models) -> None:
        """Score what is missing of a member's final model and its earlier checkpoints."""
        earlier: Mapping[int, str] = {} if member == TARGET else await models.checkpoints(member)
        self._shares[member] = (0, 1 + len(earlier))
        await self._final(member, model)
        for rank, (number, checkpoint) in enumerate(earlier.items(), start=1):
            self._shares[member] = (rank, 1 + len(earlier))
            await self._checkpoint(member, number, checkpoint, models)

    async def _final(self, member: int, model: str) -> None:
        if self._is_scored(member, 0):
            return
        twice = self._asked.then[: self._config.scoring.noise_probe] if member != TARGET else ()
        with self._booked(f"scoring of member {member}", member, twice=twice):
            await self._client.score_member(member, model, self._asked.all, twice=twice)

    async def _checkpoint(self, member: int, number: int, model: str, models: Models) -> None:
        """One of the models from before the end of the member's job; one that is gone is left out."""
        if self._is_scored(member, number):
            return
        with self._booked(f"scoring of member {member}, checkpoint {number}", member, number):
            while True:
                try:
                    await self._client.score_member(member, model, self._asked.all, number)
                except RejectedError as error:
                    if await models.is_not_yet(model, error):
                        continue
                    if not await models.checkpoint_is_gone(member, number, model, error):
                        raise
                return

    @contextmanager
    def _booked(
        self, subject: str, member: int, checkpoint: int = 0, twice: Sequence[EncodedExample] = ()
    ) -> Iterator[None]:
        usd, tokens = self._usd + (self._usd_again if twice else 0.0), tokens_of(self._asked.all) + tokens_of(twice)
        with booked(self._store, subject, usd, tokens, member, checkpoint, cap=self._cap, purpose=self._purpose):
            yield


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
) -> Iterator[None]:
    """Reserve the price ``usd`` of scoring one model on ``tokens`` tokens; afterwards, settle what was not in the
    cache, by its share of the tokens. What fails keeps its reservation."""
    store.ledger.reserve(subject, usd, purpose=purpose, cap=cap)
    yield
    saved = usd * min(1.0, store.scores.cached_tokens(member, checkpoint) / tokens)
    # The reservation holds what earlier measurements of this model were billed, too.
    store.ledger.settle(subject, max(0.0, store.ledger.unsettled().get(subject, usd) - saved))


def tokens_of(examples: Sequence[EncodedExample]) -> int:
    """Tokens of the distinct examples."""
    return sum(len(example.ids) for example in {e.key: e for e in examples}.values())
