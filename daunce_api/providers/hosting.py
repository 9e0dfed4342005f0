"""Fine-tunes that must be put on a server before they can be scored: adapters, deployments.

A host holds a limited number of models. The one that was not used for the longest time makes room; one that is being
scored never does. All members of a run share one host, so a model stays while requests for it keep coming.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self

from .._util.clock import Clock, SystemClock
from .._util.retry import Retrier, RetryPolicy
from ..data.tokenizers import EncodedExample
from ..errors import DaunceError, ProviderError, RejectedError, StopError, TransientError
from .abilities import HostRecords, Metered, ProbeReport, Probing
from .base import Scorer, ScorerCapabilities, TokenScores

UNLOADING = RetryPolicy(first=2.0, longest=10.0, attempts=3, total=60.0)
"""How often a model that could not be unloaded is tried again: what stays may be paid for by the hour."""


class Host(Protocol):
    """Puts models on a server and takes them off. ``limit`` is how many it holds at once."""

    limit: int

    async def load(self, model: str) -> str:
        """Make a model answer requests; the name under which it does. Loading one that is there already succeeds."""
        ...

    async def unload(self, model: str) -> None:
        """Take off whatever is there of a model: loaded, half loaded, or left by another process. Nothing there is no
        error."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Polling:
    """Waits for a host: looks at it at most ``polls`` times, ``seconds`` apart."""

    clock: Clock
    seconds: float
    polls: int

    async def until(
        self,
        ready: Callable[[Mapping[str, Any]], bool],
        answer: Mapping[str, Any],
        look: Callable[[], Awaitable[Mapping[str, Any]]],
        what: str,
    ) -> None:
        """Look until the latest answer says that ``what`` is ready; a look that fails for the moment is no answer,
        since loading goes on. Raises RejectedError where it takes too long, and what ``ready`` raises."""
        first: Mapping[str, Any] | None = answer

        async def check() -> None:
            nonlocal first
            latest, first = first, None
            if not ready(await look() if latest is None else latest):
                raise _NotReadyError(f"{what} is not ready")

        minutes = self.polls * self.seconds / 60
        policy = RetryPolicy(
            self.seconds, self.seconds, self.polls + 1, total=self.seconds * (self.polls + 1), jitter=False
        )
        try:
            await Retrier(policy, self.clock)(check, f"wait for {what}")
        except TransientError as error:
            raise RejectedError(f"{what} was not ready after {minutes:.0f} minutes.") from error


class _NotReadyError(TransientError):
    """The host is still at work."""


@dataclass
class _Held:
    loaded: asyncio.Task[str]
    users: int = 0


@dataclass
class Pool:
    """The models on a host, least recently used first. What does not load is taken off again."""

    host: Host
    clock: Clock = field(default_factory=SystemClock)
    records: HostRecords | None = None
    _held: OrderedDict[str, _Held] = field(default_factory=OrderedDict)
    _left: dict[str, None] = field(default_factory=dict)
    """Models of which something may be on the server although nobody holds them."""
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
                    held = self._held[model] = _Held(asyncio.create_task(self._load(model)))
                    break
                idle = next((name for name, h in self._held.items() if h.users == 0), None)
                if idle is None:
                    await self._free.wait()
                else:
                    await self._drop(idle)
            held.users += 1
            self._held.move_to_end(model)
            return held

    async def _load(self, model: str) -> str:
        """Load a model, written down before; whatever ends this early (a failure, a closing pool) undoes it."""
        if self.records is not None:
            self.records.load_intent(model)
        try:
            return await self.host.load(model)
        except BaseException:
            with suppress(DaunceError):  # it stays written down, and closing tries again
                await self._put_off(model)
            raise

    async def take_off(self, model: str) -> None:
        """Take a model off the server, whoever put it there. Raises the last failure after some tries."""
        await Retrier(UNLOADING, self.clock)(lambda: self.host.unload(model), f"unload {model}")
        if self.records is not None:
            self.records.unloaded(model)

    async def _put_off(self, model: str) -> None:
        self._left[model] = None
        await self.take_off(model)
        del self._left[model]

    async def _drop(self, model: str) -> None:
        held = self._held.pop(model)
        if not held.loaded.done():  # its users gave up
            held.loaded.cancel()
        (served,) = await asyncio.gather(held.loaded, return_exceptions=True)
        if isinstance(served, str):
            await self._put_off(model)

    async def close(self) -> None:
        """Unload everything that this pool loaded, then close the host. The first failure is raised at the end."""
        failure: DaunceError | None = None
        for model in list(self._held):
            with suppress(DaunceError):  # tried once more below
                await self._drop(model)
        for model in list(self._left):
            try:
                await self._put_off(model)
            except DaunceError as error:
                failure = failure or error
        await self.host.close()
        if failure is not None:
            raise failure


class HostedScorer:
    """A scorer of models that a host has to load first. Closing it unloads them and closes the scorer."""

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

    def record(self, records: HostRecords) -> None:
        """Keep in ``records`` what is put on the server and taken off."""
        self.pool.records = records

    async def take_off(self, models: Sequence[str]) -> dict[str, str]:
        """Take off what an earlier process left on the server; why not, by model, where that failed.

        Raises StopError where credentials do not allow it.
        """
        kept: dict[str, str] = {}
        for model in models:
            try:
                await self.pool.take_off(model)
            except StopError:
                raise
            except ProviderError as error:
                kept[model] = str(error)
        return kept

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
