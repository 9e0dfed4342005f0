"""A small run against the fake provider, as the tests need it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_trainer import FakeProvider, FakeTrainer

from daunce_api._util.retry import RetryPolicy
from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.subsets import Ensemble, plan_ensemble
from daunce_api.plan import JobCosts
from daunce_api.store import RunStore
from daunce_api.train import Event, JobClient, Training
from daunce_api.train.patient import JOB_RETRIES, PollPolicy

MANIFEST = RunConfig.from_mapping({"data": {"train": "-", "test": "-"}}).model_dump(mode="json")
TOKENS, USD = 100, 0.01
"""Each job of the fake provider trains 100 tokens for a dollar."""


@dataclass(frozen=True)
class Outcome:
    """What training left in the store: models by member, and why members were left out."""

    models: dict[int, str]
    left_out: dict[int, str]

    @classmethod
    def of(cls, store: RunStore) -> Outcome:
        return cls(store.jobs.ready_models(), store.jobs.left_out())


@dataclass
class World:
    """One run folder and one provider; ``run`` is one life of the client process."""

    folder: Path
    provider: FakeProvider = field(default_factory=FakeProvider)
    members: int = 3
    n_train: int = 10
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    priced: bool = True
    retries: RetryPolicy = JOB_RETRIES
    events: list[Event] = field(default_factory=list)
    ready: list[tuple[int, str]] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        content: dict[str, Any] = {
            "data": {"train": "a.jsonl", "test": "b.jsonl"},
            "backend": {"model": "base"},
            "ensemble": {"members": self.members},
        }
        for section, values in self.settings.items():
            content[section] = {**content.get(section, {}), **values}
        return RunConfig.from_mapping(content, base=self.folder)

    @property
    def dataset(self) -> Dataset:
        return Dataset.from_records([{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(self.n_train)])

    @property
    def ensemble(self) -> Ensemble:
        return plan_ensemble(self.n_train, self.members, 0.5, self.seed)

    def open(self) -> RunStore:
        store = RunStore.create_or_open(self.folder, {"config": MANIFEST, "n": self.n_train}, run_key="abc")
        store._db.execute("PRAGMA synchronous = OFF")  # these tests kill the process at most, not the machine
        return store

    def client(self, store: RunStore, trainer: FakeTrainer | None = None, **polls: float) -> JobClient:
        members = range(-1, self.members)
        return JobClient(
            trainer or FakeTrainer(self.provider),
            store,
            costs=JobCosts(dict.fromkeys(members, TOKENS), USD) if self.priced else None,
            cap=self.config.budget.max_usd,
            on_event=self.events.append,
            clock=self.provider.clock,
            retries=self.retries,
            polls=PollPolicy(**polls),
            rng=random.Random(0),
        )

    def training(
        self, store: RunStore, trainer: FakeTrainer | None = None, *, adopt: bool = False, **polls: float
    ) -> Training:
        client = self.client(store, trainer, **polls)
        return Training(client, ensemble=self.ensemble, dataset=self.dataset, config=self.config, adopt=adopt)

    async def earlier(self, training: Training, member: int) -> dict[int, str]:
        """The member's models before its final one, as scoring asks for them."""
        return await training._client.earlier_models(member, self.config.ensemble.checkpoints)

    async def on_ready(self, member: int, model: str) -> None:
        self.ready.append((member, model))

    def run(self, trainer: FakeTrainer | None = None, *, adopt: bool = False, **polls: float) -> Outcome:
        with self.open() as store:
            asyncio.run(self.training(store, trainer, adopt=adopt, **polls).run(self.on_ready))
            return Outcome.of(store)

    def requests(self, member: int) -> list[dict[str, Any]]:
        """What the provider was asked for, of one member, in order."""
        return [
            {"key": j.request.key, "model": j.request.model, "seed": j.request.seed}
            for j in self.provider.of_member(member)
        ]
