"""Cancelling and cleaning: everything that the run made, nothing else, and the truth about the rest."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_trainer import CANCELLED, FAILED, HAPPY, RUNNING, Crash, FakeTrainer, Fault
from world import World

from daunce_api.errors import RejectedError, StopError
from daunce_api.providers.base import JobRequest
from daunce_api.store import RunStore
from daunce_api.train import CancelReport, CleanReport, cancel_jobs, clean_up


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def cancel(world: World, trainer: FakeTrainer | None = None) -> CancelReport:
    with world.open() as store:
        return asyncio.run(cancel_jobs(world.client(store, trainer)))


def clean(world: World, trainer: FakeTrainer | None = None) -> CleanReport:
    with world.open() as store:
        return asyncio.run(clean_up(world.client(store, trainer)))


def interrupt_at(world: World, call: str, fault: Fault, nth: int = 1) -> None:
    """Run until the nth call of a method crashes the client."""
    seen = 0

    def script(name: str) -> Fault | None:
        nonlocal seen
        seen += name == call
        return fault if name == call and seen == nth else None

    with pytest.raises(Crash):
        world.run(FakeTrainer(world.provider, script))


def statuses(store: RunStore) -> dict[str, str]:
    return {j.key: j.status for j in store.jobs.rows()}


def test_cancel_stops_what_runs_and_leaves_what_is_done(world: World) -> None:
    world.provider.states = lambda r: HAPPY if "-m0-" in r.key else (RUNNING,)
    with world.open() as store:

        async def until_one_is_ready() -> None:
            task = asyncio.create_task(world.training(store).run(world.on_ready))
            while not world.ready:  # noqa: ASYNC110
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(until_one_is_ready())
    report = cancel(world)
    assert report.cancelled == ["abc-m1-a1", "abc-m2-a1"]
    assert report.kept == {}
    assert sorted(j.status for j in world.provider.jobs.values()) == sorted(
        [CANCELLED, CANCELLED, world.provider.jobs["job-0"].status]
    )
    with world.open() as store:
        assert statuses(store) == {"abc-m0-a1": "succeeded", "abc-m1-a1": "cancelled", "abc-m2-a1": "cancelled"}


def test_a_cancelled_attempt_does_not_count_when_the_run_goes_on(world: World) -> None:
    world.settings = {"training": {"max_attempts": 1}}
    interrupt_at(world, "get", Fault.CRASH_BEFORE)
    cancel(world)
    assert world.run().left_out == {}


def test_clean_deletes_checkpoints_too_asked_for_or_not(world: World) -> None:
    world.provider.earlier = lambda request: 2 if "-m1-" in request.key else 0
    world.run()
    world.provider.keeps = {"ft-abc-m1-a1:step-1"}
    report = clean(world)
    assert report.models == ["ft-abc-m0-a1", "ft-abc-m1-a1:step-2", "ft-abc-m1-a1", "ft-abc-m2-a1"]
    assert report.kept == {"ft-abc-m1-a1:step-1": "the provider keeps the model"}
    world.provider.keeps = set()
    assert clean(world).models == ["ft-abc-m1-a1:step-1"]
    assert world.provider.models == {"base"}
    assert clean(world).models == []


def test_checkpoints_of_a_job_whose_final_model_vanished_are_deleted_as_well(world: World) -> None:
    world.settings = {"ensemble": {"checkpoints": 2}, "training": {"max_attempts": 1}}
    world.provider.earlier = lambda request: 1
    with world.open() as store:
        training = world.training(store)

        async def vanishing(member: int, model: str) -> None:
            assert list((await world.earlier(training, member)).values()) == [f"{model}:step-1"]
            if member == 1:
                world.provider.models.discard(model)
                raise RejectedError(f"no model {model}")

        asyncio.run(training.run(vanishing))
    assert "ft-abc-m1-a1:step-1" in clean(world).models
    assert world.provider.models == {"base"}


def test_cancel_finds_a_job_whose_submit_was_never_answered(world: World) -> None:
    interrupt_at(world, "submit", Fault.CRASH_AFTER)
    assert "abc-m0-a1" in cancel(world).cancelled
    assert not any(j.live for j in world.provider.jobs.values())


def test_cancel_frees_the_money_of_a_submit_that_never_arrived(world: World) -> None:
    world.settings = {"backend": {"max_concurrent_jobs": 1}}
    interrupt_at(world, "submit", Fault.CRASH_BEFORE)
    cancel(world)
    with world.open() as store:
        assert store.ledger.spent() == 0.0
        assert statuses(store) == {"abc-m0-a1": "cancelled"}


def test_a_job_that_cannot_be_cancelled_is_named(world: World) -> None:
    interrupt_at(world, "get", Fault.CRASH_BEFORE)
    world.provider.jobs["job-0"].states = (RUNNING,)
    world.provider.jobs["job-0"].stubborn = True
    report = cancel(world)
    assert report.kept == {"abc-m0-a1": "job job-0 is still running after a request to cancel it"}


def test_clean_deletes_all_and_only_what_the_run_made(world: World) -> None:
    world.provider.models.add("somebody-elses")
    world.provider.files["file-x"] = ("daunce-other-0123456789ab.jsonl", b"{}", 0.0)
    world.provider.states = lambda r: (RUNNING, FAILED) if r.key == "abc-m1-a1" else HAPPY
    outcome = world.run()
    report = clean(world)
    assert sorted(report.models) == sorted(outcome.models.values())
    assert len(report.files) == 3
    assert report.kept == {}
    assert world.provider.models == {"base", "somebody-elses"}
    assert set(world.provider.files) == {"file-x"}
    again = clean(world)
    assert (again.models, again.files, again.kept) == ([], [], {})


def test_clean_takes_the_target_model_that_the_run_trained(world: World) -> None:
    world.settings = {"ensemble": {"start_from": "target"}}
    world.run()
    assert "ft-abc-m-1-a1" in clean(world).models
    assert world.provider.models == {"base"}


def test_clean_finds_what_was_made_by_requests_without_an_answer(world: World) -> None:
    interrupt_at(world, "upload", Fault.CRASH_AFTER)
    clean(world)
    assert world.provider.files == {}
    interrupt_at(world, "submit", Fault.CRASH_AFTER)
    clean(world)
    assert not any(j.live for j in world.provider.jobs.values())
    assert world.provider.files == {}


def test_clean_deletes_the_late_model_of_a_job_that_was_given_up(world: World) -> None:
    create = world.provider.create

    def stubborn(request: JobRequest) -> object:
        job = create(request)
        job.stubborn = request.key == "abc-m0-a1"
        return job

    world.provider.create = stubborn  # type: ignore[method-assign, assignment]
    world.provider.states = lambda r: (RUNNING,) if r.key == "abc-m0-a1" else HAPPY
    world.run(job_timeout=100.0)
    world.provider.jobs["job-0"].states = HAPPY
    assert "ft-abc-m0-a1" in clean(world).models
    assert world.provider.models == {"base"}


def test_clean_says_what_it_could_not_delete(world: World) -> None:
    world.run()
    world.provider.keeps = {"ft-abc-m1-a1", "file-0"}
    report = clean(world)
    assert set(report.kept) == {"ft-abc-m1-a1", "file-0"}
    assert "ft-abc-m1-a1" in world.provider.models
    world.provider.keeps = set()
    assert (clean(world).models, clean(world).kept) == (["ft-abc-m1-a1"], {})


def test_a_refusal_is_named_and_the_rest_is_cleaned(world: World) -> None:
    world.run()
    calls = 0

    def script(call: str) -> Fault | None:
        nonlocal calls
        calls += call == "delete_model"
        return Fault.REJECTED if call == "delete_model" and calls == 2 else None

    report = clean(world, FakeTrainer(world.provider, script))
    assert report.kept == {"ft-abc-m1-a1": "delete_model refused"}
    assert len(report.models) == 2


def test_a_revoked_key_stops_cleaning(world: World) -> None:
    world.run()
    with pytest.raises(StopError):
        clean(world, FakeTrainer(world.provider, lambda call: Fault.STOP))
