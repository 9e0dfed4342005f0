"""What a run does when all goes well, and when jobs, the provider or the user do not."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import CANCELLED, FAILED, HAPPY, QUEUED, RUNNING, Crash, FakeProvider, FakeTrainer, Fault
from world import TOKENS, World

from daunce_api._util.clock import InstantClock
from daunce_api.errors import (
    BudgetError,
    ContractError,
    DailyLimitError,
    NotEnoughMembersError,
    RejectedError,
    StopError,
    TransientError,
)
from daunce_api.plan import JobCosts
from daunce_api.providers.base import Job, JobRequest, JobStatus, TokenScores
from daunce_api.store import RunStore
from daunce_api.train import EventKind, Training, clean_up
from tests.store_rows import by_key, put


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def once(*faults: tuple[str, Fault | None]) -> Any:
    """A script that gives each listed fault to the next call of its method."""
    left = list(faults)

    def script(call: str) -> Fault | None:
        for i, (name, fault) in enumerate(left):
            if name == call:
                del left[i]
                return fault
        return None

    return script


def test_a_run_trains_every_member_on_its_subset_with_its_seed(world: World) -> None:
    outcome = world.run()
    assert outcome.models == {k: f"ft-abc-m{k}-a1" for k in range(3)}
    assert outcome.left_out == {}
    assert sorted(world.ready) == sorted(outcome.models.items())
    for k in range(3):
        (job,) = world.provider.of_member(k)
        assert job.request.seed == world.ensemble.seeds_K[k]
        assert job.request.model == "base"
        assert job.request.suffix == f"run-abc-m{k}"
        content = world.provider.files[job.request.file_id][1]
        assert content == world.dataset.training_file(world.ensemble.subset(k).tolist(), "last")
    with world.open() as store:
        assert store.ledger.spent() == 3.0
        assert store.ledger.unsettled() == {}


def test_the_same_call_again_asks_the_provider_for_nothing(world: World) -> None:
    world.run()
    trainer = FakeTrainer(world.provider, lambda call: Fault.STOP)
    assert world.run(trainer).models == {k: f"ft-abc-m{k}-a1" for k in range(3)}
    assert trainer.calls == []
    assert len(world.ready) == 6


def test_growing_the_ensemble_trains_the_new_members_only(world: World) -> None:
    world.run()
    world.members = 5
    assert set(world.run().models) == set(range(5))
    assert len(world.provider.jobs) == 5


def test_no_more_jobs_than_the_provider_takes_at_once(world: World) -> None:
    world.members, world.n_train = 12, 12
    world.run()
    assert world.provider.most_live == 3
    world.settings = {"backend": {"max_concurrent_jobs": 2}}
    other = replace(world, folder=world.folder / "b", provider=FakeProvider())
    other.run()
    assert other.provider.most_live == 2


def test_identical_subsets_are_uploaded_once(world: World) -> None:
    world.n_train, world.members = 2, 8  # subsets of one of two examples: at most two files
    world.provider.upload_seconds = 5.0  # so that members ask for the same file while it is on its way
    world.run()
    assert len(world.provider.uploads) == len(set(world.provider.uploads)) == 2
    assert all(n.startswith("daunce-abc-") and n.endswith(".jsonl") for n in world.provider.uploads)


def test_scoring_starts_while_other_jobs_run(world: World) -> None:
    world.settings = {"backend": {"max_concurrent_jobs": 1}}
    running_at_call: list[int] = []

    async def on_ready(member: int, model: str) -> None:
        running_at_call.append(len(world.provider.jobs))
        await world.provider.clock.sleep(1000)

    with world.open() as store:
        asyncio.run(world.training(store).run(on_ready))
    assert running_at_call == [1, 2, 3]
    jobs = list(world.provider.jobs.values())
    assert jobs[2].created < 1000  # the third job was created while the first member was still being scored


def test_a_failed_job_is_tried_again_with_the_same_seed_and_another_key(world: World) -> None:
    world.provider.states = lambda r: (FAILED,) if r.key == "abc-m1-a1" else HAPPY
    assert world.run().models[1] == "ft-abc-m1-a2"
    seed = int(world.ensemble.seeds_K[1])
    assert world.requests(1) == [
        {"key": "abc-m1-a1", "model": "base", "seed": seed},
        {"key": "abc-m1-a2", "model": "base", "seed": seed},
    ]
    assert len(world.provider.uploads) == 3


def test_a_member_that_keeps_failing_is_left_out_and_said(world: World) -> None:
    world.provider.states = lambda r: (RUNNING, FAILED) if "-m1-" in r.key else HAPPY
    outcome = world.run()
    assert set(outcome.models) == {0, 2}
    assert outcome.left_out == {1: "bad luck (attempt 3)"}
    assert len(world.requests(1)) == 3
    assert [e.message for e in world.events if e.kind is EventKind.LEFT_OUT] == [
        "member 1 is left out: bad luck (attempt 3)"
    ]
    assert world.run().left_out == outcome.left_out  # attempts are counted over runs
    assert len(world.requests(1)) == 3
    world.settings = {"training": {"max_attempts": 4}}
    world.run()
    assert len(world.requests(1)) == 4


def test_too_few_members_end_the_run(world: World) -> None:
    world.settings = {"training": {"min_members": 3, "max_attempts": 1}}
    world.provider.states = lambda r: (FAILED,) if "-m1-" in r.key else HAPPY
    with pytest.raises(NotEnoughMembersError, match=r"only 2 of 3 members .*\n  member 1: bad luck"):
        world.run()


def test_a_job_cancelled_by_somebody_else_counts_as_a_failed_attempt(world: World) -> None:
    world.provider.states = lambda r: (QUEUED, CANCELLED) if r.key == "abc-m0-a1" else HAPPY
    assert world.run().models[0] == "ft-abc-m0-a2"


def test_members_start_from_the_target_model_when_asked(world: World) -> None:
    world.settings = {
        "ensemble": {"start_from": "target"},
        "training": {"hyperparameters": {"n_epochs": 1}, "target_hyperparameters": {"n_epochs": 4}},
    }
    outcome = world.run()
    assert outcome.models[-1] == "ft-abc-m-1-a1"
    (target,) = world.provider.of_member(-1)
    assert target.request.hyperparameters == {"n_epochs": 4}
    assert target.request.seed == world.ensemble.target_seed
    assert target.request.suffix == "run-abc-target"
    assert world.provider.files[target.request.file_id][1] == world.dataset.training_file(range(10), "last")
    for k in range(3):
        (job,) = world.provider.of_member(k)
        assert job.request.model == "ft-abc-m-1-a1"
        assert job.request.hyperparameters == {"n_epochs": 1}
    assert (-1, "ft-abc-m-1-a1") in world.ready


def test_an_existing_target_model_is_used_and_never_deleted(world: World) -> None:
    world.provider.models.add("mine")
    world.settings = {"ensemble": {"start_from": "target", "target_model": "mine"}}
    outcome = world.run()
    assert -1 not in outcome.models
    assert {r["model"] for k in range(3) for r in world.requests(k)} == {"mine"}
    assert world.provider.of_member(-1) == []
    with world.open() as store:
        asyncio.run(clean_up(world.client(store)))
    assert world.provider.models == {"base", "mine"}


def test_without_a_target_model_there_are_no_members(world: World) -> None:
    world.settings = {"ensemble": {"start_from": "target"}, "training": {"max_attempts": 2}}
    world.provider.states = lambda r: (FAILED,)
    with pytest.raises(NotEnoughMembersError, match=r"target model.*bad luck"):
        world.run()
    assert len(world.provider.jobs) == 2


def test_a_lost_answer_to_a_submit_finds_the_job_and_submits_no_second_one(world: World) -> None:
    world.provider.listing_lag = 10.0
    world.run(FakeTrainer(world.provider, once(("submit", Fault.LOST_AFTER), ("submit", Fault.LOST_BEFORE))))
    assert Counter(j.request.key for j in world.provider.jobs.values()) == {f"abc-m{k}-a1": 1 for k in range(3)}
    assert sum(e.kind is EventKind.FOUND for e in world.events) == 1


def test_a_lost_answer_to_an_upload_uploads_nothing_twice(world: World) -> None:
    world.provider.listing_lag = 10.0
    world.run(FakeTrainer(world.provider, once(("upload", Fault.LOST_AFTER), ("upload", Fault.LOST_BEFORE))))
    assert len(world.provider.uploads) == len(set(world.provider.uploads)) == 3


@pytest.mark.parametrize(("call", "fault"), [("upload", Fault.CRASH_AFTER), ("submit", Fault.CRASH_AFTER)])
def test_a_crash_before_the_answer_is_recorded_repeats_nothing(world: World, call: str, fault: Fault) -> None:
    world.provider.listing_lag = 10.0
    with pytest.raises(Crash):
        world.run(FakeTrainer(world.provider, once((call, fault))))
    world.run()
    assert len(world.provider.uploads) == len(world.provider.jobs) == 3


def test_rate_limits_are_waited_for_as_long_as_told(world: World) -> None:
    trainer = FakeTrainer(world.provider, once(("submit", Fault.RATE_LIMIT)))
    trainer.retry_after = 47.0
    world.run(trainer)
    (waiting,) = [e.message for e in world.events if e.kind is EventKind.WAITING]
    seconds = float(waiting.split("Next try in ")[1].split(" s")[0])
    assert 47.0 <= seconds <= 47.0 * 1.1 + 0.5
    assert trainer.calls.count("find_job") == 0  # a 429 was not acted on: no need to look


def test_a_wait_of_hours_parks_the_run(world: World) -> None:
    trainer = FakeTrainer(world.provider, once(("submit", Fault.RATE_LIMIT)))
    trainer.retry_after = 20_000.0
    with pytest.raises(DailyLimitError, match=r"no further request for 5 h 33 min"):
        world.run(trainer)


def test_a_provider_that_stays_away_ends_the_run_with_a_way_on(world: World) -> None:
    trainer = FakeTrainer(world.provider, lambda call: Fault.LOST_BEFORE if call == "get" else None)
    with pytest.raises(TransientError, match=r"Given up after \d+ tries.*run the same command again"):
        world.run(trainer)
    assert 3000 <= world.provider.clock.now() <= 4000
    assert trainer.calls.count("get") < 300  # backing off, not hammering
    world.run()
    assert len(world.provider.jobs) == 3


def test_a_daily_limit_parks_after_the_live_jobs_are_done(world: World) -> None:
    world.members = 5
    script = once(("submit", None), ("submit", None), ("submit", Fault.DAILY))
    with pytest.raises(DailyLimitError, match=r"daily limit of jobs reached.*Run the same command again"):
        world.run(FakeTrainer(world.provider, script))
    assert len({k for k, _ in world.ready}) == len(world.provider.jobs) == 2
    assert set(world.run().models) == set(range(5))
    assert len(world.provider.jobs) == 5


def test_a_daily_limit_in_scoring_parks_too(world: World) -> None:
    async def on_ready(member: int, model: str) -> None:
        raise DailyLimitError("too many scoring requests today.")

    with world.open() as store, pytest.raises(DailyLimitError, match="scoring requests"):
        asyncio.run(world.training(store).run(on_ready))


def test_a_revoked_key_stops_at_once(world: World) -> None:
    trainer = FakeTrainer(world.provider, once(("get", Fault.STOP)))
    with pytest.raises(StopError, match="revoked"):
        world.run(trainer)
    assert len(world.provider.jobs) <= 3
    world.run()
    assert len(world.provider.jobs) == 3


def test_a_refused_submit_takes_the_member_out_without_paying(world: World) -> None:
    outcome = world.run(FakeTrainer(world.provider, once(("submit", Fault.REJECTED))))
    assert len(outcome.left_out) == 1
    assert "submit refused" in next(iter(outcome.left_out.values()))
    with world.open() as store:
        assert store.ledger.spent() == 2.0


def test_a_refused_file_takes_the_member_out_without_paying(world: World) -> None:
    outcome = world.run(FakeTrainer(world.provider, once(("upload", Fault.REJECTED))))
    assert len(outcome.left_out) == 1
    with world.open() as store:
        assert store.ledger.spent() == 2.0


def test_a_job_that_is_refused_for_what_it_asks_is_not_tried_again(world: World) -> None:
    world.provider.refuses = lambda request: "-m1-" in request.key
    outcome = world.run()
    assert outcome.left_out == {1: "bad luck"}
    assert [job["key"] for job in world.requests(1)] == ["abc-m1-a1"]


def test_a_job_refused_because_its_file_vanished_is_tried_with_a_new_one(world: World) -> None:
    def refuses(request: JobRequest) -> bool:
        if request.key != "abc-m1-a1":
            return False
        del world.provider.files[request.file_id]
        return True

    world.provider.refuses = refuses
    assert world.run().models[1] == "ft-abc-m1-a2"


def test_checkpoints_are_looked_up_once_and_fewer_are_said(world: World) -> None:
    world.settings = {"ensemble": {"checkpoints": 3}}
    world.provider.earlier = lambda request: {"0": 4, "1": 1, "2": 0}[request.key[5]]
    trainer = FakeTrainer(world.provider, once(("checkpoints", Fault.LOST_AFTER)))
    found: dict[int, dict[int, str]] = {}

    def live() -> None:
        with world.open() as store:
            training = world.training(store, trainer)

            async def ask(member: int, model: str) -> None:
                found[member] = await world.earlier(training, member)

            asyncio.run(training.run(ask))

    live()
    expected = {0: {1: "ft-abc-m0-a1:step-4", 2: "ft-abc-m0-a1:step-3"}, 1: {1: "ft-abc-m1-a1:step-1"}, 2: {}}
    assert found == expected
    assert sorted(e.message for e in world.events if e.kind is EventKind.FEWER_MODELS) == [
        "member 1 has 2 of the 3 models that ensemble.checkpoints asks for",
        "member 2 has 1 of the 3 models that ensemble.checkpoints asks for",
    ]
    assert trainer.calls.count("checkpoints") == 4
    live()
    assert found == expected
    assert trainer.calls.count("checkpoints") == 4


def test_without_checkpoints_asked_for_nobody_looks_for_them(world: World) -> None:
    world.provider.earlier = lambda request: 2
    trainer = FakeTrainer(world.provider)
    with world.open() as store:
        training = world.training(store, trainer)
        asyncio.run(training.run())
        assert asyncio.run(world.earlier(training, 0)) == {}
    assert "checkpoints" not in trainer.calls


def test_a_job_that_the_provider_forgot_has_no_checkpoints(world: World) -> None:
    world.settings = {"ensemble": {"checkpoints": 2}}
    world.provider.earlier = lambda request: 1
    world.run()
    world.provider.jobs["job-0"].gone = True
    with world.open() as store:
        training = world.training(store)
        (member,) = (j.member for j in store.jobs.rows() if j.job_id == "job-0")
        assert asyncio.run(world.earlier(training, member)) == {}
        assert store.jobs.earlier_models(member, 2) == {}


def test_a_member_that_was_cleaned_up_half_scored_is_scored_anew(world: World) -> None:
    """Scores of two models never mix, even if the second comes from the same request."""
    world.run()
    with world.open() as store:
        put(store, 1, 0, "f", {"a": TokenScores((-1.0,))})
        asyncio.run(clean_up(world.client(store)))
    assert world.run().models[1] == "ft-abc-m1-a2"
    with world.open() as store:
        assert by_key(store, 1).keys() == set()


def test_a_file_that_vanished_is_uploaded_again(world: World) -> None:
    world.n_train, world.members = 2, 2  # two possible subsets, so later members share a file with earlier ones
    world.run()
    world.provider.files.clear()
    world.members = 6
    outcome = world.run()
    assert outcome.left_out == {}
    assert any(model.endswith("-a2") for model in outcome.models.values())
    assert len(world.provider.uploads) <= 4


def test_a_job_that_vanished_is_a_failed_attempt(world: World) -> None:
    def script(call: str) -> Fault | None:
        if call == "get":
            job = world.provider.jobs["job-0"]
            job.gone = job.looks >= 1
        return None

    outcome = world.run(FakeTrainer(world.provider, script))
    assert outcome.left_out == {}
    assert len(world.provider.jobs) == 4
    with world.open() as store:
        (lost,) = [j for j in store.jobs.rows() if j.status == "failed"]
    assert (lost.error or "").startswith("lost track of the job: the provider does not show job-0 after 5 min")


def test_a_withheld_model_is_waited_for_and_then_a_failed_attempt(world: World) -> None:
    def states(request: JobRequest) -> tuple[JobStatus, ...]:
        return HAPPY

    world.provider.states = states
    trainer = FakeTrainer(world.provider)
    create = world.provider.create

    def withholding(request: JobRequest) -> Any:
        job = create(request)
        job.withheld = request.key == "abc-m0-a1"
        return job

    world.provider.create = withholding  # type: ignore[method-assign]
    outcome = world.run(trainer)
    assert outcome.models[0] == "ft-abc-m0-a2"
    assert any("withheld" in e.message for e in world.events if e.kind is EventKind.FAILED)
    assert world.provider.clock.now() >= 600


def test_a_stuck_job_is_cancelled_and_tried_again(world: World) -> None:
    world.provider.states = lambda r: (RUNNING,) if r.key == "abc-m0-a1" else HAPPY
    outcome = world.run(job_timeout=100.0)
    assert outcome.models[0] == "ft-abc-m0-a2"
    assert world.provider.jobs["job-0"].status is CANCELLED


@pytest.mark.parametrize(("own_queue", "attempt"), [(False, 2), (True, 1)])
def test_a_long_queue_for_ones_own_machines_is_waited_for(world: World, own_queue: bool, attempt: int) -> None:
    def states(request: JobRequest) -> tuple[JobStatus, ...]:
        return (*[QUEUED] * 40, RUNNING, JobStatus.SUCCEEDED) if request.key == "abc-m0-a1" else HAPPY

    world.provider.states = states
    world.provider.own_queue = own_queue
    assert world.run(job_timeout=100.0).models[0] == f"ft-abc-m0-a{attempt}"
    assert world.provider.clock.now() > 100


def test_a_job_that_runs_too_long_is_cancelled_however_long_it_was_queued(world: World) -> None:
    world.provider.states = lambda r: (*[QUEUED] * 40, RUNNING) if r.key == "abc-m0-a1" else HAPPY
    world.provider.own_queue = True
    assert world.run(job_timeout=100.0).models[0] == "ft-abc-m0-a2"
    assert world.provider.jobs["job-0"].status is CANCELLED


def test_a_stuck_job_that_cannot_be_cancelled_is_given_up(world: World) -> None:
    world.provider.states = lambda r: (RUNNING,) if r.key == "abc-m0-a1" else HAPPY
    create = world.provider.create

    def stubborn(request: JobRequest) -> Any:
        job = create(request)
        job.stubborn = True
        return job

    world.provider.create = stubborn  # type: ignore[method-assign]
    assert world.run(job_timeout=100.0).models[0] == "ft-abc-m0-a2"
    assert any("cancelling did not end it" in e.message for e in world.events)


def test_a_model_deleted_under_us_is_trained_again_and_its_scores_forgotten(world: World) -> None:
    with world.open() as store:

        async def on_ready(member: int, model: str) -> None:
            if model == "ft-abc-m1-a1":
                put(store, 1, 0, "f", {"a": TokenScores((-1.0,))})
                world.provider.models.discard(model)
                raise RejectedError("model_not_found")
            put(store, member, 0, "f", {"b": TokenScores((-1.0,))})

        asyncio.run(world.training(store).run(on_ready))
        assert store.jobs.ready_models()[1] == "ft-abc-m1-a2"
        assert by_key(store, 1).keys() == {"b"}


def test_a_refused_scoring_request_is_no_reason_to_train_again(world: World) -> None:
    async def on_ready(member: int, model: str) -> None:
        raise RejectedError("prompt too long")

    with world.open() as store, pytest.raises(RejectedError, match="prompt too long"):
        asyncio.run(world.training(store).run(on_ready))
    assert len(world.provider.jobs) <= 3


def test_a_mistake_in_scoring_wins_over_what_follows_from_it(world: World) -> None:
    async def on_ready(member: int, model: str) -> None:
        raise ZeroDivisionError

    with world.open() as store, pytest.raises(ZeroDivisionError):
        asyncio.run(world.training(store).run(on_ready))


def test_the_cap_holds_before_every_submit(world: World) -> None:
    world.settings = {"budget": {"max_usd": 2.5}}
    with pytest.raises(BudgetError, match=r"budget\.max_usd"):
        world.run()
    assert len(world.provider.jobs) == 2
    assert len(world.ready) == 2  # what was paid for is handed over
    world.settings = {"budget": {"max_usd": 3.0}}
    assert len(world.run().models) == 3


def test_a_failed_job_without_a_bill_keeps_its_reservation(world: World) -> None:
    world.settings = {"budget": {"max_usd": 3.0}, "backend": {"max_concurrent_jobs": 1}}
    world.provider.states = lambda r: (FAILED,) if r.key == "abc-m0-a1" else HAPPY
    with pytest.raises(BudgetError):
        world.run()
    assert len(world.provider.jobs) == 3


def test_reported_tokens_are_what_is_booked(world: World) -> None:
    world.provider.trained_tokens = 50
    world.run()
    with world.open() as store:
        assert store.ledger.spent() == 1.5


def test_a_job_that_ended_just_before_a_crash_is_booked_later(world: World) -> None:
    with world.open() as store:
        store.ledger.reserve("abc-m0-a1", 1.0, purpose="train")
        store.jobs.intent("abc-m0-a1", 0, 1, "{}")
        store.jobs.submitted("abc-m0-a1", "job-x")
        store.jobs.state("abc-m0-a1", JobStatus.SUCCEEDED, "ft-x", trained_tokens=25)
    world.run()
    with world.open() as store:
        assert store.ledger.spent() == 2.25
        assert store.ledger.unsettled() == {}


def test_a_cap_without_a_price_is_refused(world: World) -> None:
    world.settings, world.priced = {"budget": {"max_usd": 1.0}}, False
    with pytest.raises(BudgetError, match="price"):
        world.run()
    assert world.provider.uploads == []


def test_cancellation_leaves_a_run_that_goes_on(world: World) -> None:
    world.provider.states = lambda r: (RUNNING,) * 10 + HAPPY

    async def interrupted(store: RunStore) -> None:
        task = asyncio.create_task(world.training(store).run(world.on_ready))
        while len(world.provider.jobs) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with world.open() as store:
        asyncio.run(interrupted(store))
        assert store.transitions()[-1].subject == "interrupted"
    (event,) = [e for e in world.events if e.kind is EventKind.INTERRUPTED]
    assert "run the same command again" in event.message
    assert "`daunce cancel`" in event.message
    world.run()
    assert len(world.provider.jobs) == 3


def test_live_jobs_are_taken_up_before_new_ones_are_made(world: World) -> None:
    world.members, world.n_train = 6, 12
    script = once(("submit", None), ("submit", None), ("submit", Fault.CRASH_AFTER))
    with pytest.raises(Crash):
        world.run(FakeTrainer(world.provider, script))
    for job in world.provider.jobs.values():
        job.states = (RUNNING,) * 5 + HAPPY
    world.settings = {"backend": {"max_concurrent_jobs": 3}}
    world.run()
    assert world.provider.most_live <= 3
    assert len(world.provider.jobs) == 6


def test_halting_submits_no_more_and_waits_for_the_rest(world: World) -> None:
    world.members, world.n_train = 8, 8
    world.settings = {"backend": {"max_concurrent_jobs": 2}}
    with world.open() as store:
        training = world.training(store)

        async def on_ready(member: int, model: str) -> None:
            if len(store.jobs.ready_models()) >= 3:
                training.halt()

        asyncio.run(training.run(on_ready))
        models = store.jobs.ready_models()
    assert 3 <= len(models) <= 5
    assert len(world.provider.jobs) == len(models)


def test_finished_members_are_left_alone_even_without_their_models(world: World) -> None:
    world.run()
    with world.open() as store:
        asyncio.run(clean_up(world.client(store)))
        asyncio.run(world.training(store).run(world.on_ready, finished=range(3)))
        assert store.jobs.ready_models() == {}
    assert len(world.provider.jobs) == 3


def test_time_is_simulated_in_order() -> None:
    clock, woke = InstantClock(), []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woke.append((seconds, clock.now()))

    async def main() -> None:
        await asyncio.gather(*(sleeper(s) for s in (3.0, 1.0, 2.0)))

    asyncio.run(main())
    assert woke == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_a_model_is_looked_for_patiently_and_missed_clearly(world: World) -> None:
    script = once(("model_info", Fault.LOST_BEFORE), ("model_info", Fault.RATE_LIMIT))
    with world.open() as store:
        client = world.client(store, FakeTrainer(world.provider, script))
        assert asyncio.run(client.model_info("base")).id == "base"
        with pytest.raises(RejectedError, match="does not exist"):
            asyncio.run(client.model_info("nobody"))


def test_an_address_where_nothing_answers_is_no_busy_server(world: World) -> None:
    calls: list[str] = []

    def busy(call: str) -> Fault | None:
        calls.append(call)
        return Fault.RATE_LIMIT if len(calls) <= 20 else None

    with world.open() as store:
        client = world.client(store, FakeTrainer(world.provider, lambda _: Fault.LOST_BEFORE))
        with pytest.raises(StopError, match=r"fake cannot be reached: connection lost.* Nothing was sent\. Check"):
            asyncio.run(client.first_contact("base"))
        assert world.provider.clock.now() < 120
        client = world.client(store, FakeTrainer(world.provider, busy))
        assert asyncio.run(client.first_contact("base")).id == "base"
        assert len(calls) == 21


def test_a_validation_file_goes_with_every_job_and_is_uploaded_once(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text('{"instruction": "i", "input": "", "output": "o"}\n')
    world = World(tmp_path / "run", settings={"data": {"validation": str(path)}})
    sent: list[str | None] = []
    trainer = FakeTrainer(world.provider)
    submit = trainer.submit

    async def spying(request: JobRequest) -> Job:
        sent.append(request.validation_file_id)
        return await submit(request)

    trainer.submit = spying  # type: ignore[method-assign]
    world.run(trainer)
    assert len(sent) == 3
    assert len(set(sent)) == 1
    assert None not in sent
    assert len(world.provider.uploads) == 4


def test_one_member_is_handed_over_before_a_second_is_submitted(world: World) -> None:
    """Where it is not known whether fine-tunes can be scored, one job is paid for to find out, not all of them."""
    submitted: list[int] = []

    async def on_ready(member: int, model: str) -> None:
        submitted.append(len(world.provider.jobs))
        if len(submitted) == 1:
            raise ContractError("it ignores echo for fine-tunes")

    with world.open() as store:
        with pytest.raises(ContractError):
            asyncio.run(world.training(store).run(on_ready, one_first=True))
        assert submitted == [1]
        asyncio.run(world.training(store).run(on_ready, one_first=True))
        assert len(store.jobs.ready_models()) == world.members
    assert submitted[1] == 1


@pytest.mark.parametrize(("counted", "said"), [(TOKENS, 0), (TOKENS // 2, 1)])
def test_a_run_says_once_where_other_tokens_are_billed_than_are_counted(world: World, counted: int, said: int) -> None:
    """The provider's chat template is not ours: members would be measured on other tokens than they were trained on."""
    with world.open() as store:
        client = world.client(store)
        client.money.costs = JobCosts(dict.fromkeys(range(-1, world.members), counted), 0.001)
        training = Training(client, ensemble=world.ensemble, dataset=world.dataset, config=world.config)
        asyncio.run(training.run(world.on_ready))
    events = [e for e in world.events if e.kind is EventKind.OTHER_TOKENS]
    assert len(events) == said
    assert all("--train-one" in e.message and "100 tokens are billed where 50" in e.message for e in events)
