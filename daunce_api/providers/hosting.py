"""Fine-tunes that must be put on a server before they can be scored: adapters, deployments.

A host holds a limited number of models. The one that was not used for the longest time makes room; one that is being
scored never does. All members of a run share one host, so a model stays while requests for it keep coming.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from .._util.clock import Clock, SystemClock
from .._util.retry import Retrier, RetryPolicy
from ..data.tokenizers import EncodedExample
from ..errors import DaunceError
from .base import Closing, HostRecords, Metered, ProbeReport, Probing, Scorer, ScorerCapabilities, TokenScores
from .calls import gone_already, noted_in
from .polling import Answer, Poll

UNLOADING = RetryPolicy(first=2.0, longest=10.0, attempts=3, total=60.0)
"""Retries of a model that could not be unloaded: what stays may be billed by the hour."""


class Host(Closing, ABC):
    """Puts models on a server and takes them off. ``limit`` is how many it holds at once; a model that is being loaded
    is looked at by ``poll`` until it is there.

    A subclass makes the provider's requests. What this process loaded is remembered by its id; what another process
    left is found by :meth:`listed`.
    """

    poll = Poll(5.0, 240)

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._known: dict[str, str] = {}

    @abstractmethod
    async def create(self, model: str) -> tuple[str, str, Answer]:
        """Have a model loaded: the name that it will answer under, the id of what loads it, the provider's answer.
        Loading one that is there already succeeds."""

    @abstractmethod
    async def delete(self, loaded: str, model: str) -> None:
        """Take it off the server; a 404 may be raised where it is gone."""

    @abstractmethod
    async def listed(self, model: str) -> Sequence[str]:
        """Ids under which a model is loaded, whoever loaded it."""

    async def read(self, loaded: str, model: str) -> Answer:
        """What the provider says of something that is being loaded, by its id."""
        return {}

    def ready(self, answer: Answer, model: str) -> bool:
        """Whether the answer says that the model is there. Raises RejectedError where it will never be."""
        return True

    def always_served(self, model: str) -> str | None:
        """The name that a model answers under without being loaded; None for one that has to be."""
        return None

    async def load(self, model: str) -> str:
        """Make a model answer requests; the name under which it does."""
        served, loaded, answer = await self.create(model)
        self._known[model] = loaded
        await self.poll.until(
            lambda latest: self.ready(latest, model), answer, lambda: self.read(loaded, model), f"model {model}"
        )
        return served

    async def unload(self, model: str) -> None:
        """Take off whatever is there of a model: loaded, half loaded, or left by another process. Nothing there is no
        error."""
        known = self._known.pop(model, None)
        for loaded in [known] if known else await self.listed(model):
            with gone_already():
                await self.delete(loaded, model)


@dataclass
class _Held:
    loaded: asyncio.Task[str]
    users: int = 0


@dataclass
class Pool:
    """The models on a host, least recently used first. A model that fails to load is unloaded again."""

    host: Host
    clock: Clock = field(default_factory=SystemClock)
    records: HostRecords | None = None
    _held: OrderedDict[str, _Held] = field(default_factory=OrderedDict)
    _left: dict[str, None] = field(default_factory=dict)
    """Models that may still be on the server although nobody uses them."""
    _leaving: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Models that are being unloaded. They occupy their place until they are gone; requests for others go on."""
    _free: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def serving(self, model: str) -> AsyncIterator[str]:
        """The served name of a model, kept loaded inside the block. Waits while every place is in use.

        A model that could not be loaded leaves no trace; the next caller tries again.
        """
        always = self.host.always_served(model)
        if always is not None:
            yield always
            return
        held = await self._acquire(model)
        try:
            try:
                served = await asyncio.shield(held.loaded)
            except Exception:
                if self._held.get(model) is held:
                    del self._held[model]
                raise
            yield served
        finally:
            async with self._free:
                held.users -= 1
                self._free.notify_all()

    async def _acquire(self, model: str) -> _Held:
        while True:
            async with self._free:
                held = self._held.get(model)
                room = len(self._held) + len(self._leaving) < self.host.limit
                if held is None and room and model not in self._leaving:
                    held = self._held[model] = _Held(asyncio.create_task(self._load(model)))
                if held is not None:
                    held.users += 1
                    self._held.move_to_end(model)
                    return held
                idle = next((name for name, h in self._held.items() if h.users == 0), None)
                if idle is None or room or self._leaving:
                    await self._free.wait()
                    continue
                leaving = asyncio.create_task(self._leave(idle, self._held.pop(idle)))
                self._leaving[idle] = leaving
            await asyncio.shield(leaving)

    async def _leave(self, model: str, held: _Held) -> None:
        """Unload a model while requests for others go on."""
        try:
            await self._drop(model, held)
        finally:
            async with self._free:
                del self._leaving[model]
                self._free.notify_all()

    async def _load(self, model: str) -> str:
        """Load a model after recording the intent; a failure or a closing pool undoes it."""
        if self.records is not None:
            self.records.load_intent(model)
        try:
            return await self.host.load(model)
        except BaseException:
            with suppress(DaunceError):  # it stays recorded, and closing tries again
                await self._put_off(model)
            raise

    async def take_off(self, model: str) -> None:
        """Unload a model, whoever loaded it. Raises the last failure after a few tries."""
        await Retrier(UNLOADING, self.clock)(lambda: self.host.unload(model), f"unload {model}")
        if self.records is not None:
            self.records.unloaded(model)

    async def _put_off(self, model: str) -> None:
        self._left[model] = None
        await self.take_off(model)
        del self._left[model]

    async def _drop(self, model: str, held: _Held) -> None:
        if not held.loaded.done():  # its users gave up
            held.loaded.cancel()
        (served,) = await asyncio.gather(held.loaded, return_exceptions=True)
        if isinstance(served, str):
            await self._put_off(model)

    async def close(self) -> None:
        """Unload everything that this pool loaded, then close the host. The first failure is raised at the end."""
        failure: DaunceError | None = None
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        for model in list(self._held):
            with suppress(DaunceError):  # tried once more below
                await self._drop(model, self._held.pop(model))
        for model in list(self._left):
            try:
                await self._put_off(model)
            except DaunceError as error:
                failure = failure or error
        await self.host.close()
        if failure is not None:
            raise failure


class HostedScorer(Closing):
    """A scorer whose models a host has to load first. Closing it unloads them and closes the scorer."""

    def __init__(self, scorer: Scorer, host: Host, *, clock: Clock | None = None) -> None:
        self.inner = scorer
        self.pool = Pool(host, clock or SystemClock())

    @property
    def capabilities(self) -> ScorerCapabilities:
        return replace(self.inner.capabilities, max_models=self.pool.host.limit)

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """As the inner scorer, under the name that the host gave the model."""
        async with self.pool.serving(model) as served:
            return await self.inner.score(served, batch)

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """As the inner scorer, on the model's served name."""
        if not isinstance(self.inner, Probing):
            return ProbeReport(False, "this scorer has no test of its endpoint")
        async with self.pool.serving(model) as served:
            return await self.inner.probe(served, example)

    def record(self, records: HostRecords) -> None:
        """Keep in ``records`` what is put on the server and taken off."""
        self.pool.records = records

    async def take_off(self, models: Sequence[str]) -> dict[str, str]:
        """Take off what an earlier process left on the server; why not, by model, where that failed.

        Raises StopError where credentials do not allow it.
        """
        kept: dict[str, str] = {}
        for model in models:
            with noted_in(kept, model):
                await self.pool.take_off(model)
        return kept

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer, where the inner scorer shows them."""
        if isinstance(self.inner, Metered):
            self.inner.watch(observer)

    async def close(self) -> None:
        try:
            await self.pool.close()
        finally:
            await self.inner.__aexit__(None, None, None)
