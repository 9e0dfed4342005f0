"""What some scorers can do besides scoring; whoever uses an ability asks with ``isinstance`` whether it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..data.tokenizers import EncodedExample
from .base import Job, Scorer, TokenScores


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a scorer found out about its endpoint. ``checked`` is False where the endpoint gives no means to check;
    ``largest_difference`` is in nats, between two ways to ask for the same number."""

    checked: bool
    detail: str
    largest_difference: float | None = None


@runtime_checkable
class Metered(Protocol):
    """A scorer that shows the headers of its endpoint's answers, in which rate limits are told."""

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer."""
        ...


class HostRecords(Protocol):
    """Keeps which models may stand on a server, so that they can be taken off after a crash too."""

    def load_intent(self, model: str) -> None:
        """To be written before a model is asked for; one that is there already stays."""
        ...

    def unloaded(self, model: str) -> None:
        """The server no longer holds the model."""
        ...


@runtime_checkable
class Hosting(Protocol):
    """A scorer that puts models on a server for as long as they are scored."""

    def record(self, records: HostRecords) -> None:
        """Keep in ``records`` what is put on the server and taken off."""
        ...

    async def take_off(self, models: Sequence[str]) -> dict[str, str]:
        """Take off what an earlier process left there; why not, by model, where that failed."""
        ...


@runtime_checkable
class Listing(Protocol):
    """A trainer that can list what a run made at the provider."""

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job whose key (``Job.echo.key``) begins with ``run_key``, whatever became of it. New jobs may be
        missing for ``grace_seconds``."""
        ...

    async def reach_jobs(self) -> None:
        """The cheapest request to the provider's jobs. Raises what a listing raises."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A scorer that can test its endpoint's numbers against the endpoint's own generation."""

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Raises ContractError where the endpoint returns numbers that are not what they seem (shifted by one)."""
        ...


@dataclass(slots=True)
class Swept:
    """What was deleted at a provider; ``kept`` names what could not be, and why."""

    files: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Deferred(Protocol):
    """A scorer whose answers come hours later and stay at the provider until they are safe, so that an interrupted run
    finds what it has paid for."""

    @property
    def immediate(self) -> Scorer:
        """The scorer of the same numbers that answers at once, for whoever only looks at the endpoint."""
        ...

    async def score_replicate(self, model: str, batch: Sequence[EncodedExample], replicate: int) -> list[TokenScores]:
        """As ``score``; ``replicate`` tells measurements of the same examples apart."""
        ...

    async def release(self, model: str, batch: Sequence[EncodedExample], replicate: int) -> None:
        """The answers to these examples are on disk: what the provider keeps of them may be deleted."""
        ...

    async def sweep(self, models: Sequence[str]) -> Swept:
        """Stop what is under way for these models, and delete what earlier calls left at the provider."""
        ...
