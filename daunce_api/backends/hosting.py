"""Fine-tunes that must be put on a server before they can be scored: adapters, deployments.

A host holds a limited number of models. The one that was not used for the longest time makes room; one that is being
scored never does. All members of a run share one host, so a model stays while requests for it keep coming.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

from ..errors import ProviderError
from ..tokens import EncodedExample
from .base import Metered, ProbeReport, Probing, Scorer, ScorerCapabilities, TokenScores


class Host(Protocol):
    """Puts models on a server and takes them off. ``limit`` is how many it holds at once."""

    limit: int

    async def load(self, model: str) -> str:
        """Make a model answer requests; the name under which it does. Loading one that is there already succeeds."""
        ...

    async def unload(self, model: str, served: str) -> None:
        """Take it off; one that is gone already is no error."""
        ...

    async def close(self) -> None: ...


@dataclass
class _Held:
    loaded: asyncio.Task[str]
    users: int = 0


@dataclass
class Pool:
    """The models on a host, least recently used first."""

    host: Host
    _held: OrderedDict[str, _Held] = field(default_factory=OrderedDict)
    _free: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def serving(self, model: str) -> AsyncIterator[str]:
        """The served name of a model, kept loaded inside the block. Waits while every place is in use.

        A model that could not be loaded leaves no trace; the next caller tries again.
        """
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
        async with self._free:
            while True:
                held = self._held.get(model)
                if held is not None:
                    break
                if len(self._held) < self.host.limit:
                    held = self._held[model] = _Held(asyncio.create_task(self.host.load(model)))
                    break
                idle = next((name for name, h in self._held.items() if h.users == 0), None)
                if idle is None:
                    await self._free.wait()
                else:
                    await self._drop(idle)
            held.users += 1
            self._held.move_to_end(model)
            return held

    async def _drop(self, model: str) -> None:
        held = self._held.pop(model)
        # One whose users gave up may still be on its way.
        (served,) = await asyncio.gather(held.loaded, return_exceptions=True)
        if isinstance(served, str):
            await self.host.unload(model, served)

    async def close(self) -> None:
        """Unload everything that this pool loaded, then close the host. The first failure is raised at the end."""
        failure: ProviderError | None = None
        for model in list(self._held):
            try:
                await self._drop(model)
            except ProviderError as error:
                failure = failure or error
        await self.host.close()
        if failure is not None:
            raise failure


class HostedScorer:
    """A scorer of models that a host has to load first. Closing it unloads them and closes the scorer."""

    def __init__(self, scorer: Scorer, host: Host) -> None:
        self.inner = scorer
        self.pool = Pool(host)

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

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer, where the inner scorer shows them."""
        if isinstance(self.inner, Metered):
            self.inner.watch(observer)

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.pool.close()
        finally:
            await self.inner.__aexit__(kind, error, trace)


class ProbedHostedScorer(HostedScorer):
    """The same, of a scorer that can test its endpoint."""

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """As the inner scorer, on the model's served name."""
        if not isinstance(self.inner, Probing):
            return ProbeReport(False, "this scorer has no test of its endpoint")
        async with self.pool.serving(model) as served:
            return await self.inner.probe(served, example)


def hosted(scorer: Scorer, host: Host) -> HostedScorer:
    """A scorer whose models are loaded by a host; it can be probed where the scorer can."""
    return ProbedHostedScorer(scorer, host) if isinstance(scorer, Probing) else HostedScorer(scorer, host)
