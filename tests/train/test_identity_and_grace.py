"""Whose answer it is, what "not there" means for a new thing, and what `cancel` needs."""

from __future__ import annotations

import asyncio
import doctest
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeProvider, FakeTrainer, Fault
from world import World

from daunce_api.errors import NotEnoughMembersError, RejectedError, StopError, UnknownJobsError
from daunce_api.providers import contract, identity
from daunce_api.providers.base import Job, JobEcho, JobRequest, JobStatus
from daunce_api.providers.identity import contradiction, count, refines
from daunce_api.providers.replay import session as protocol
from daunce_api.train import EventKind, cancel_jobs
from daunce_api.train.patient import names_missing

FIELDS = frozenset(("key", "file_id", "model", "seed", "hyperparameters"))
REQUEST = JobRequest("abc-m3-a1", "org/base", "file-1", 7, {"n_epochs": 3, "rate": 0.1, "batch_size": "auto"}, "s")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def echo(**changes: Any) -> Job:
    return Job("j", JobStatus.QUEUED, echo=JobEcho(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"key": "abc-m3-a1", "file_id": "file-1", "model": "org/base", "seed": 7},
        {"model": "base"},
        {"model": "org/base-2026-08-07"},
        {"hyperparameters": {"n_epochs": 3.0, "rate": 0.1000000001, "batch_size": 16, "extra": 1}},
        {"hyperparameters": {"n_epochs": "auto"}},
    ],
)
def test_an_answer_may_refine_its_request(changes: dict[str, Any]) -> None:
    assert contradiction(REQUEST, echo(**changes), FIELDS) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "abc-m30-a1"},
        {"key": "abc-m3-a2"},
        {"file_id": "file-10"},
        {"seed": 8},
        {"model": "org/base-mini"},
        {"model": "other/base"},
        {"hyperparameters": {"n_epochs": 4}},
        {"hyperparameters": {"rate": 0.2}},
    ],
)
def test_and_not_contradict_it(changes: dict[str, Any]) -> None:
    assert contradiction(REQUEST, echo(**changes), FIELDS) is not None
    assert contradiction(REQUEST, echo(**changes), ()) is None, "only what the provider is known to repeat is compared"


def test_names_and_counts() -> None:
    assert refines("gpt-4o", "gpt-4o-2024-08-06")
    assert not refines("gpt-4o", "gpt-4o-mini")
    assert not refines("gpt-4o-2024-08-06", "gpt-4o-2024-11-20")
    assert [count(v) for v in (-1, 2**63, 1.5, None, 0)] == [None, None, None, None, 0]


@pytest.mark.parametrize(
    ("status", "text", "missing"),
    [
        (400, "invalid training_file: not found", True),
        (404, "No such File object: file-1", True),
        (400, "file-1 is still being processed", True),
        (400, "n_epochs must be below 10", False),
        (403, "training file not found", False),
    ],
)
def test_which_refusals_speak_of_a_missing_file(status: int, text: str, missing: bool) -> None:
    error = RejectedError(text)
    error.status = status
    assert names_missing(error, "file-1") is missing


def test_docstring_examples() -> None:
    assert doctest.testmod(identity).failed == 0
    assert doctest.testmod(protocol).failed == 0
    assert doctest.testmod(contract).failed == 0


@pytest.mark.parametrize("invisible", [0.0, 30.0, 250.0])
def test_a_new_job_that_is_404_is_waited_for(world: World, invisible: float) -> None:
    world.provider.invisible = invisible
    world.provider.listing_lag = invisible
    outcome = world.run()
    assert len(world.provider.jobs) == len(outcome.models) == 3
    assert any(e.kind is EventKind.NOT_YET for e in world.events) is (invisible > 0)
    with world.open() as store:
        assert store.ledger.spent() == 3.0


def test_a_new_model_that_is_404_is_waited_for_and_scored_again(world: World) -> None:
    tries: dict[int, int] = {}

    async def on_ready(member: int, model: str) -> None:
        tries[member] = tries.get(member, 0) + 1
        if world.provider.clock.now() < 200:
            error = RejectedError(f"{model} not found")
            error.status = 404
            raise error

    with world.open() as store:
        asyncio.run(world.training(store).run(on_ready))
        assert len(store.jobs.ready_models()) == 3
    assert len(world.provider.jobs) == 3
    assert min(tries.values()) > 1


def test_a_member_that_succeeds_later_is_no_longer_left_out(world: World) -> None:
    world.settings = {"training": {"max_attempts": 1}}
    world.provider.states = lambda r: (JobStatus.FAILED,) if "-m1-" in r.key else (JobStatus.SUCCEEDED,)
    assert world.run().left_out.keys() == {1}
    with world.open() as store:
        assert store.jobs.left_out().keys() == {1}
    world.settings = {"training": {"max_attempts": 2}}
    world.provider.states = lambda r: (JobStatus.SUCCEEDED,)
    world.run()
    with world.open() as store:
        assert store.jobs.left_out() == {}


def test_a_submit_that_leaves_no_trace_ends_with_a_sentence(world: World) -> None:
    trainer = FakeTrainer(world.provider, lambda call: Fault.LOST_BEFORE if call == "submit" else None)
    with pytest.raises(StopError, match=r"was sent 5 times.*daunce doctor"):
        world.run(trainer)
    assert world.provider.jobs == {}


def test_cancel_needs_a_store_and_a_trainer_and_stops_what_the_store_does_not_know(world: World) -> None:
    provider: FakeProvider = world.provider
    provider.states = lambda request: (JobStatus.RUNNING,)
    provider.files["file-x"] = ("x", b"x", 0.0)
    stranger = provider.create(JobRequest("abc-m7-a1", "base", "file-x", 1, {}, "s"))
    with world.open() as store:
        with pytest.raises(UnknownJobsError, match=rf"{stranger.id} \(abc-m7-a1\): running") as raised:
            asyncio.run(world.training(store).run())
        assert (raised.value.exit_code, raised.value.jobs) == (4, (stranger.id,))
        assert len(provider.jobs) == 1, "nothing was submitted"
        report = asyncio.run(cancel_jobs(world.client(store)))
    assert report.unknown == {stranger.id: "abc-m7-a1 is not known to this run folder: cancelled"}
    assert not stranger.live


def test_an_unknown_job_is_adopted_only_where_it_is_the_runs_own(world: World) -> None:
    world.run()
    with world.open() as store:
        store._db.execute("DELETE FROM jobs WHERE member = 1")  # what a lost end of the store would have held
    with pytest.raises(UnknownJobsError, match="--adopt"):
        world.run()
    assert world.run(adopt=True).models.keys() == {0, 1, 2}
    assert len(world.provider.jobs) == 3
    with world.open() as store:
        store._db.execute("DELETE FROM jobs WHERE member = 1")
    (job,) = world.provider.of_member(1)
    job.request = JobRequest("abc-m1-a1", "base", job.request.file_id, 12345, {}, "s")  # another seed: not this run's
    with pytest.raises((UnknownJobsError, NotEnoughMembersError), match=job.id):
        world.run(adopt=True)
