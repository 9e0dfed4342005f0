"""Random histories: whatever happens in whatever order, nothing is paid twice, lost, or beyond the cap.

A history is a sequence of lives of the client process. In each life faults hit the provider's calls (before or after
the provider acted) and the process may die at any call, at any wait, before or after any write to the store. After
each life the promises are checked at the provider, which is the one that sends the bill.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FAILED, HAPPY, QUEUED, RUNNING, Crash, FakeProvider, FakeTrainer, Fault
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from world import USD, World

from daunce_api.errors import BudgetError, DaunceError, NotEnoughMembersError
from daunce_api.providers.base import JobRequest, JobStatus
from daunce_api.store import RunStore
from daunce_api.train import Training, cancel_jobs, clean_up
from daunce_api.train.training import OnReady

FAULTS = [f for f in Fault if f is not Fault.REJECTED]
NEVER = 10**9


class DyingStore:
    """Makes a store's process die at its nth write: before it reaches the disk, or right after."""

    def __init__(self, store: RunStore, writes: int, after: bool) -> None:
        self.left, self.after = writes, after
        database = store._db
        self.original = database.transaction
        database.transaction = self.transaction  # type: ignore[method-assign]
        self.depth = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        outermost = self.depth == 0
        if outermost:
            self.left -= 1
            if self.left < 0 or (self.left == 0 and not self.after):
                raise Crash
        self.depth += 1
        try:
            with self.original():
                yield
        finally:
            self.depth -= 1
        if outermost and self.left == 0 and self.after:
            raise Crash


class Histories(RuleBasedStateMachine):
    """``lag``: how far the provider's lists are behind; ``cap``: what may be spent; ``slots``: jobs at once."""

    @initialize(
        lag=st.sampled_from([0.0, 20.0]),
        cap=st.sampled_from([None, 2.0, 4.0, 6.0]),
        slots=st.integers(1, 3),
        from_target=st.booleans(),
        failing=st.sets(st.sampled_from(["abc-m0-a1", "abc-m1-a1", "abc-m1-a2", "abc-m2-a3"]), max_size=3),
        checkpoints=st.integers(1, 3),
    )
    def begin(
        self, lag: float, cap: float | None, slots: int, from_target: bool, failing: set[str], checkpoints: int
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="daunce-history-"))
        self.failing = failing

        def states(request: JobRequest) -> tuple[JobStatus, ...]:
            return (QUEUED, RUNNING, FAILED) if request.key in failing else HAPPY

        self.provider = FakeProvider(states=states, listing_lag=lag, max_concurrent=slots)
        self.provider.earlier = lambda request: 0 if "-m2-" in request.key else 2
        self.cap = cap
        self.world = World(self.folder / "run", self.provider, members=4)
        self.world.settings = {
            "budget": {"max_usd": cap},
            "ensemble": {"start_from": "target" if from_target else "base", "checkpoints": checkpoints},
            "training": {"max_attempts": 3},
        }

    def live(self, trainer: FakeTrainer, dies_at: int, after: bool) -> None:
        """One life of the process, whatever its end."""
        with self.world.open() as store:
            training = self.world.training(store, trainer)
            DyingStore(store, dies_at, after)
            with suppress(Crash, DaunceError):
                asyncio.run(training.run(self.asking(training)))

    def asking(self, training: Training) -> OnReady:
        """What scoring does first: ask which models there are besides the final one."""

        async def on_ready(member: int, model: str) -> None:
            await self.world.on_ready(member, model)
            if member >= 0:
                found = await self.world.earlier(training, member)
                asked = self.world.config.ensemble.checkpoints
                expected = [(1, f"{model}:step-2"), (2, f"{model}:step-1")][: asked - 1] if member != 2 else []
                assert list(found.items()) == expected

        return on_ready

    @rule(
        faults=st.dictionaries(st.integers(0, 40), st.sampled_from(FAULTS), max_size=6),
        dies_at=st.one_of(st.just(NEVER), st.integers(1, 40)),
        after=st.booleans(),
    )
    def a_life(self, faults: dict[int, Fault], dies_at: int, after: bool) -> None:
        count = iter(range(NEVER))
        self.live(FakeTrainer(self.provider, lambda call: faults.get(next(count))), dies_at, after)

    @rule(faults=st.dictionaries(st.integers(0, 10), st.sampled_from(FAULTS), max_size=2))
    def a_cancellation(self, faults: dict[int, Fault]) -> None:
        count = iter(range(NEVER))
        trainer = FakeTrainer(self.provider, lambda call: faults.get(next(count)))
        with self.world.open() as store, suppress(Crash, DaunceError):
            asyncio.run(cancel_jobs(self.world.client(store, trainer)))

    @rule()
    def time_passes(self) -> None:
        for job in self.provider.jobs.values():
            job.looks += 1

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "provider"):
            return
        jobs = self.provider.jobs.values()
        keys = Counter(j.request.key for j in jobs)
        assert max(keys.values(), default=0) <= 1, f"submitted twice: {keys}"
        uploads = Counter(self.provider.uploads)
        assert max(uploads.values(), default=0) <= 1, f"uploaded twice: {uploads}"
        for member in range(-1, 4):
            live = sum(j.live for j in self.provider.of_member(member))
            assert live <= 1, f"member {member} has {live} live jobs"
        assert self.provider.most_live <= self.provider.max_concurrent
        if self.cap is not None:
            assert len(jobs) * USD * 100 <= self.cap + 1e-9
        with RunStore.open(self.world.folder, read_only=True) if self.world.folder.exists() else _nothing() as store:
            if store is not None:
                rows = {j.key: j for j in store.jobs.rows()}
                assert {j.request.key for j in jobs} <= rows.keys(), "a job that the store does not know"
                for job in jobs:
                    row = rows[job.request.key]
                    assert row.job_id in (None, job.id)
                    assert row.job_id is not None or row.status == "intent"
                    known = store.jobs.checkpoints(row.key)
                    assert known is None or list(known) == self.provider.earlier_models(job)
                assert self.cap is None or store.ledger.spent() <= self.cap

    def teardown(self) -> None:
        """Left alone, the run ends: every member trained, or left out for a reason; nothing hangs, nothing leaks."""
        if not hasattr(self, "provider"):
            return
        try:
            trainer = FakeTrainer(self.provider)
            with self.world.open() as store:
                training = self.world.training(store, trainer)
                # A cap or a target model that keeps failing may end the run before every member has had its turn.
                with suppress(BudgetError, NotEnoughMembersError):
                    asyncio.run(training.run(self.asking(training)))
                    assert store.jobs.ready_models().keys() - {-1} | store.jobs.left_out().keys() == set(range(4))
                self.promises()
                asyncio.run(clean_up(self.world.client(store, trainer)))
                assert not any(j.live for j in self.provider.jobs.values())
                assert self.provider.models == {"base"}
                assert self.provider.files == {}
        finally:
            shutil.rmtree(self.folder)


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


_COMMON: dict[str, Any] = {
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


class TestHistories(Histories.TestCase):
    settings = settings(max_examples=25, stateful_step_count=6, **_COMMON)


@pytest.mark.long
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=600, stateful_step_count=12, **_COMMON)
