"""One execution of a run: train, score each member as soon as it is there, stop when there are enough."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

from ._util.clock import Clock
from .attribution.from_store import Material, assemble, complete_members
from .config import RunConfig
from .core import MINIMUM_MEMBERS, SelfLDS, StopRule
from .data.tokenizers import EncodedExample
from .errors import MembersAlikeError, RejectedError
from .plan import Plan
from .providers.registry import Backend, open_backend
from .providers.replay import Session
from .providers.replay.protocol import PROTOCOL
from .score.cache import open_cache
from .score.client import FINE_TUNE_PROBE_VALUE, PROBE_VALUE, Budget, Progress, ScoringClient
from .score.health import Comparison
from .store import TARGET, RunStore
from .train import Event, EventKind, JobClient, OnEvent, Training


class Execution:
    """The objects that live only while a run trains and scores; everything that lasts is in the store."""

    def __init__(
        self,
        config: RunConfig,
        material: Material,
        store: RunStore,
        plan: Plan,
        *,
        on_event: OnEvent | None = None,
        on_progress: Progress | None = None,
        clock: Clock | None = None,
        adopt: bool = False,
    ) -> None:
        self._config = config
        self._material = material
        self._store = store
        self._plan = plan
        self._on_event = on_event
        self._on_progress = on_progress
        self._clock = clock
        self._adopt = adopt
        self._protocol = PROTOCOL
        self._history: dict[int, SelfLDS] = {}
        self._order: list[int] = []
        self._comparison = Comparison(store)
        self._shares: dict[int, tuple[int, int]] = {}

    def training(self, backend: Backend) -> Training:
        """The jobs of this run, at an opened backend."""
        client = JobClient(
            backend.trainer,
            self._store,
            costs=self._plan.costs,
            cap=self._config.budget.max_usd,
            on_event=self._on_event,
            clock=self._clock,
            protocol=self._protocol,
        )
        return Training(
            client,
            ensemble=self._material.ensemble,
            dataset=self._material.train,
            config=self._config,
            adopt=self._adopt,
        )

    async def train_and_score(self, session: Session | None = None) -> None:
        """Everything that is missing; opens no backend where nothing is.

        Raises MembersAlikeError as soon as two members show that the endpoint does not serve the fine-tunes. What it
        answered for them is forgotten, so that the same call asks again.
        """
        try:
            await self._train_and_score(session)
        except MembersAlikeError as error:
            raise self._discarded(error) from error

    async def _train_and_score(self, session: Session | None) -> None:
        finished = complete_members(self._store, self._material)
        await self._compare(finished)
        if len(finished) == self._material.ensemble.members or self._enough(finished) is not None:
            return
        recording: AbstractContextManager[Any] = session or nullcontext()
        if session is not None:
            self._clock = self._clock or session.clock
            self._protocol = session.protocol
            if session.not_checked and self._on_event is not None:
                listed = ", ".join(session.not_checked)
                text = f"The recording is older than these checks, which are left out: {listed}."
                self._on_event(Event(EventKind.NOT_CHECKED, text))
        # A recording holds every request, so nothing may be answered from elsewhere while one is made or replayed.
        cache = None if session is not None else open_cache(self._config)
        with recording, cache or nullcontext():
            async with open_backend(
                self._config, replaying=session is not None and session.replaying, protocol=self._protocol
            ) as backend:
                self._client = ScoringClient(
                    backend.scorer,
                    self._store,
                    concurrency=self._config.scoring.concurrency,
                    clock=self._clock,
                    on_progress=self._progressed,
                    cache=cache,
                    reduction=self._config.attribution.loss,
                    budget=Budget(self._usd_per_token, self._config.budget.max_usd),
                )
                self._training = self.training(backend)
                base = self._config.backend.model
                self._plan.check_model(await self._training.model_info(base))
                if backend.scorer.capabilities.max_models is None:
                    # Before anything is paid for. An endpoint that has to load each model is tested with member 0.
                    await self._client.probe(base, self._shortest)
                try:
                    await self._training.run(
                        self._score,
                        finished=finished,
                        one_first=not backend.scorer.capabilities.fine_tunes_verified,
                    )
                except MembersAlikeError:
                    await self._client.drain()
                    raise
        await self._compare(complete_members(self._store, self._material))

    def _discarded(self, error: MembersAlikeError) -> MembersAlikeError:
        """Set the scores aside that may not be those of their models."""
        store = self._store
        members = sorted({m for m, _, _ in store.scores.models()}) if error.members is None else error.members
        store.scores.set_aside(members, str(error), suspect=True)
        if error.members is None:  # an endpoint that served something else is tested again
            store.set_value(PROBE_VALUE, None)
            store.set_value(FINE_TUNE_PROBE_VALUE, None)
        return MembersAlikeError(
            f"{error} What was scored of {_listed(members)} is set aside; the models are kept. Once the endpoint "
            "serves them, run the same command: it asks for these scores again, and they are paid for again.",
            members,
        )

    def _progressed(self, member: int, done: int, total: int) -> None:
        """Progress over all models of a member."""
        before, models = self._shares[member]
        if self._on_progress is not None:
            self._on_progress(member, before * total + done, models * total)

    @cached_property
    def _shortest(self) -> EncodedExample:
        """What the endpoint is tested with: any example will do, the same one every time, cheap."""
        return min(self._material.encoded, key=lambda e: (len(e.ids), e.ids, e.targets))

    async def _score(self, member: int, model: str) -> None:
        """Everything that is asked of one member's models, as soon as they are there."""
        config, material = self._config, self._material
        if member == TARGET:
            if config.scoring.target:
                self._shares[member] = (0, 1)
                await self._score_final(member, model)
            return
        earlier = await self._training.checkpoints(member)
        self._shares[member] = (0, 1 + len(earlier))
        await self._score_final(member, model)
        for rank, (number, checkpoint) in enumerate(earlier.items(), start=1):
            self._shares[member] = (rank, 1 + len(earlier))
            await self._score_checkpoint(member, number, checkpoint)
        members = complete_members(self._store, material)
        if not self._comparison.due(len(members)) and config.ensemble.stop is None:
            return
        await self._compare(members, self._client)
        reason = self._enough(members)
        if reason is not None:
            self._training.halt(reason)

    async def _score_final(self, member: int, model: str) -> None:
        config, material = self._config, self._material
        if material.is_scored(self._store, member):
            return
        with self._booked(f"scoring of member {member}", member):
            if member != TARGET:
                # Before the scores: a model that has them all is never asked again.
                await self._client.probe_noise(member, model, material.encoded_train, config.scoring.noise_probe)
            await self._client.score_member(member, model, material.encoded)

    async def _score_checkpoint(self, member: int, number: int, model: str) -> None:
        """One of the models from before the end of the member's job; one that is gone is left out."""
        material = self._material
        if material.is_scored(self._store, member, number):
            return
        with self._booked(f"scoring of member {member}, checkpoint {number}", member, number):
            while True:
                try:
                    await self._client.score_member(member, model, material.encoded, checkpoint=number)
                except RejectedError as error:
                    if await self._training.is_not_yet(model, error):
                        continue
                    if not await self._training.checkpoint_is_gone(member, number, model, error):
                        raise
                return

    def _booked(self, subject: str, member: int, checkpoint: int = 0) -> AbstractContextManager[None]:
        usd = self._plan.scoring_usd_per_model or 0.0
        probed = checkpoint == 0 and member != TARGET
        tokens = self._tokens + (self._probe_tokens if probed else 0)
        return booked(self._store, subject, usd, tokens, member, checkpoint, cap=self._config.budget.max_usd)

    @cached_property
    def _tokens(self) -> int:
        return tokens_of(self._material.encoded)

    @property
    def _usd_per_token(self) -> float:
        return (self._plan.scoring_usd_per_model or 0.0) / (self._tokens + self._probe_tokens)

    @cached_property
    def _probe_tokens(self) -> int:
        return tokens_of(self._material.encoded_train[: self._config.scoring.noise_probe])

    async def _compare(self, members: list[int], client: ScoringClient | None = None) -> None:
        """Compare the first complete members with each other, before more of them are paid for."""
        if len(members) >= 2 and (client is None or self._comparison.due(len(members))):
            attribution = await asyncio.to_thread(assemble, self._store, self._material, self._config)
            await self._comparison.look(attribution, client, self._material.encoded_train)

    def _enough(self, members: list[int]) -> str | None:
        """Why no further member is needed, by ``ensemble.stop``; looks at every ``check_every``-th complete member."""
        stop = self._config.ensemble.stop
        if stop is None:
            return None
        # In the order of completion, so that each look holds the members of the looks before it.
        self._order += [k for k in members if k not in self._order]
        latest = len(members) // stop.check_every * stop.check_every
        for count in (latest - stop.check_every, latest):
            if count >= MINIMUM_MEMBERS and count not in self._history:
                attribution = assemble(self._store, self._material, self._config)
                rows = [attribution.members.index(k) for k in self._order[:count]]
                quality = attribution.of_members(rows).self_lds
                if quality is not None:
                    self._history[count] = quality
        rule = StopRule(stop.self_lds, stop.surely, stop.plateau, stop.min_members)
        return rule.reason([self._history[count] for count in sorted(self._history)])


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
) -> Iterator[None]:
    """Reserve the price ``usd`` of scoring one model, of so many ``tokens``, before; after it, book what was not in the
    cache, by its share of the tokens. What fails keeps its reservation."""
    store.ledger.reserve(subject, usd, purpose="score", cap=cap)
    yield
    saved = usd * min(1.0, store.scores.cached_tokens(member, checkpoint) / tokens)
    # The reservation holds what earlier measurements of this model were billed, too.
    store.ledger.settle(subject, max(0.0, store.ledger.unsettled().get(subject, usd) - saved))


def tokens_of(examples: Sequence[EncodedExample]) -> int:
    """Tokens of the distinct examples."""
    return sum(len(example.ids) for example in {e.key: e for e in examples}.values())


def _listed(members: Sequence[int]) -> str:
    numbers = [str(k) for k in members if k != TARGET]
    named = f"member{'' if len(numbers) == 1 else 's'} {', '.join(numbers)}"
    return f"{named} and the target model" if TARGET in members else named
