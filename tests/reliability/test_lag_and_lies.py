"""Providers that lag behind themselves, lose answers, and answer for somebody else, over real HTTP on a fast clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Run
from daunce_api.errors import (
    DaunceError,
    HeldJobError,
    NotEnoughMembersError,
    ProviderError,
    StopError,
    StoreCorruptError,
    TransientError,
    UnknownJobsError,
)
from daunce_api.store import RunStore

from . import lagging
from .harness import KEY, KEY_VARIABLE, MEMBERS, config_of, outcome, write_data
from .lagging import Faults, LaggingProvider, saying

GRACE = 400.0
"""Seconds on the fast clock: two here."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch, LaggingProvider() as provider:
        patch.setenv(KEY_VARIABLE, KEY)
        run_on(provider, data, folder / "run")
    assert len(provider.jobs) == MEMBERS
    return outcome(folder / "run")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def make(
    provider: LaggingProvider,
    data: Path,
    run_dir: Path,
    *,
    max_attempts: int = 3,
    grace: float = GRACE,
    adopt: bool = False,
) -> Run:
    options = {"grace_seconds": grace, "listing_lag_seconds": grace}
    training = {"max_attempts": max_attempts}
    config = config_of(data, run_dir, provider.base_url, backend={"options": options}, training=training)
    return Run.create(config, adopt=adopt)


def run_on(provider: LaggingProvider, data: Path, run_dir: Path, *, events: list[Any] | None = None) -> None:
    on_event = None if events is None else events.append
    make(provider, data, run_dir).execute(clock=provider.clock, on_event=on_event)


def accounted(provider: LaggingProvider, run_dir: Path, *, raised: BaseException | None) -> None:
    """Every job of the provider is used by the store, booked as an orphan, or named by the error that ended the run."""
    with RunStore.open(run_dir, read_only=True) as store:
        rows = {row.job_id for row in store.jobs.rows()}
        pending = {row.key for row in store.jobs.rows() if row.job_id is None}
        booked = {job for job in provider.jobs if store.get_value(f"orphan {job}") is not None}
        said = " ".join(t.detail for t in store.transitions() if t.subject == "may exist")
    named = {job for job in provider.jobs if raised is not None and job in str(raised)}
    named |= {job["id"] for job in provider.jobs.values() if f"{job['metadata']['daunce_key']} was sent" in said}
    waiting = {job["id"] for job in provider.jobs.values() if job["metadata"]["daunce_key"] in pending}
    unexplained = provider.jobs.keys() - rows - booked - named - waiting
    assert not unexplained, f"jobs that nobody accounts for: {unexplained}"


LAGS = {
    "a new job is 404 by its id": Faults(job=120.0),
    "and missing from the list": Faults(job=120.0, listed=120.0),
    "a new file is not found at job creation": Faults(file=120.0),
    "a new model is 404 everywhere": Faults(model=120.0, completions=120.0),
    "a new model is 404 at completions alone": Faults(completions=160.0),
    "two submits get no answer": Faults(lost_submits=2, listed=120.0),
    "everything at once": Faults(job=80.0, listed=160.0, file=80.0, model=120.0, completions=120.0, lost_submits=3),
}


@pytest.mark.parametrize("name", LAGS)
def test_inside_the_grace_period_nothing_is_paid_for_twice(
    name: str, data: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    events: list[Any] = []
    with LaggingProvider(LAGS[name]) as provider:
        run_on(provider, data, tmp_path / "run", events=events)
    assert len(provider.jobs) == MEMBERS
    assert outcome(tmp_path / "run")["scores"] == reference["scores"]
    if "list" in name or "model" in name or "file" in name:
        assert any(event.kind == "not_yet" for event in events), "a wait is said"
    with RunStore.open(tmp_path / "run", read_only=True) as store:
        assert [row.attempt for row in store.jobs.rows()] == [1] * MEMBERS
    accounted(provider, tmp_path / "run", raised=None)


LIES: dict[str, dict[str, Any]] = {
    "a poll is answered with another job": {"GET jobs/ID": lagging.another_job},
    "a submit is answered with another job": {"POST jobs": lagging.another_job},
    "an upload is answered with another file": {"POST files": lagging.another_file},
    "an upload is answered with a job": {"POST files": lagging.a_job_for_a_file},
    "an upload was cut short": {"POST files": saying(bytes=7)},
    "a job says another training file": {"POST jobs": saying(training_file="file-999")},
    "a job says another seed": {"GET jobs/ID": saying(seed=987654)},
    "a job says another base model": {"POST jobs": saying(model="daunce-tiny-instruct")},
    "a job says another number of epochs": {
        "GET jobs/ID": saying(method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 9}}})
    },
    "a submit has an empty id": {"POST jobs": saying(id="")},
    "a job is a file": {"GET jobs/ID": saying(object="file")},
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_belongs_to_another_request_is_not_taken(
    name: str, data: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """Told twice and then put right: the run looks again, and its scores are those of the undisturbed run."""
    with LaggingProvider(Faults(lies=LIES[name], times=2)) as provider:
        run_on(provider, data, tmp_path / "run")
        assert provider.faults.times < 2, "the lie was told"
    assert len(provider.jobs) == MEMBERS
    assert outcome(tmp_path / "run")["scores"] == reference["scores"]
    accounted(provider, tmp_path / "run", raised=None)


def test_a_job_that_stays_another_one_is_held_and_named(data: Path, tmp_path: Path) -> None:
    with LaggingProvider(Faults(lies={"GET jobs/ID": saying(seed=5), "GET jobs": saying(data=[])}, times=10**6)) as p:
        with pytest.raises(HeldJobError, match=r"ftjob-\d+ may be .* of this run, but .*seed 5 instead of") as raised:
            run_on(p, data, tmp_path / "run")
        assert "daunce cancel" in str(raised.value)
        assert len(p.jobs) <= MEMBERS
        p.faults.lies.clear()
        report = make(p, data, tmp_path / "run").cancel()  # a running job is stopped, a finished one is noted
        assert len(report.cancelled) + len(report.already_final) == len(p.jobs)


def test_odd_counts_are_not_reported_counts(data: Path, tmp_path: Path) -> None:
    for number, tokens in enumerate((-5, 2**63)):
        with LaggingProvider(Faults(lies={"GET jobs/ID": saying(trained_tokens=tokens)}, times=10**6)) as provider:
            run_on(provider, data, tmp_path / f"run{number}")
        with RunStore.open(tmp_path / f"run{number}", read_only=True) as store:
            assert {row.trained_tokens for row in store.jobs.rows()} == {None}
            assert store.ledger.spent_by_purpose()["train"] > 0, "the reservation stands"


def test_beyond_the_grace_period_the_orphan_is_named_cancelled_and_booked(data: Path, tmp_path: Path) -> None:
    """One submit's answer is lost, and the list shows the job only after the run has stopped looking for it."""
    events: list[Any] = []
    with LaggingProvider(Faults(lost_submits=1, listed=500.0)) as provider:
        provider.job_seconds = 900.0
        run = make(provider, data, tmp_path / "run", grace=50.0)
        run.execute(clock=provider.clock, on_event=events.append)
    orphans = [event.message for event in events if event.kind == "orphan"]
    assert len(provider.jobs) == MEMBERS + 1
    assert len(orphans) == 1
    assert "cancelled" in orphans[0]
    assert sum(job["cancelled"] for job in provider.jobs.values()) == 1
    accounted(provider, tmp_path / "run", raised=None)
    with RunStore.open(tmp_path / "run", read_only=True) as store:
        assert sum(" orphan " in subject for subject, *_ in store.ledger._db.rows("spend")) == 1


def test_a_copy_of_a_run_is_noticed_before_it_pays_and_can_take_the_jobs_over(
    data: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    import shutil

    with LaggingProvider() as provider:
        run = make(provider, data, tmp_path / "run")
        provider.faults.broken["POST jobs"] = 400
        with pytest.raises(NotEnoughMembersError):
            run.execute(clock=provider.clock)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        provider.faults.broken.clear()
        run = make(provider, data, tmp_path / "run", max_attempts=5)
        run.execute(clock=provider.clock)
        jobs = len(provider.jobs)
        copy = make(provider, data, tmp_path / "copy", max_attempts=5)
        with pytest.raises(UnknownJobsError, match=r"(?s)ftjob-1 .*--adopt") as raised:
            copy.execute(clock=provider.clock)
        assert len(provider.jobs) == jobs
        assert raised.value.exit_code == 4
        make(provider, data, tmp_path / "copy", max_attempts=5, adopt=True).execute(clock=provider.clock)
        assert len(provider.jobs) == jobs
        assert outcome(tmp_path / "copy")["scores"] == reference["scores"]


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _torn(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(len(content) // 2))


@pytest.mark.parametrize("damage", [_emptied, _torn, Path.unlink])
def test_a_store_that_is_lost_is_refused_and_its_jobs_are_taken_over_on_request(
    damage: Callable[[Path], Any], data: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    with LaggingProvider() as provider:
        run_on(provider, data, tmp_path / "run")
        damage(tmp_path / "run" / "run.sqlite")
        sent = len(provider.requests)
        with pytest.raises(StoreCorruptError, match=r"has lost .*nothing was sent.*--adopt") as raised:
            run_on(provider, data, tmp_path / "run")
        assert (len(provider.requests), raised.value.exit_code) == (sent, 4)
        make(provider, data, tmp_path / "run", adopt=True).execute(clock=provider.clock)
        assert len(provider.jobs) == MEMBERS
    assert outcome(tmp_path / "run")["scores"] == reference["scores"]
    with RunStore.open(tmp_path / "run", read_only=True) as store:
        assert store.ledger.spent_by_purpose()["train"] > 0, "what was taken over is booked"
    assert (tmp_path / "run" / "run.sqlite.damaged-1").exists() == (damage is not Path.unlink), "it is kept"


def test_a_gateway_whose_jobs_route_is_broken_ends_the_run_with_a_sentence(data: Path, tmp_path: Path) -> None:
    with LaggingProvider(Faults(broken={"POST jobs": 500, "GET jobs": 500})) as provider:
        with pytest.raises(StopError, match=r"fine-tuning jobs.*500.*daunce doctor"):
            run_on(provider, data, tmp_path / "run")
        assert provider.clock.now() < 600
        assert provider.requests.count("POST jobs") == 0


def _random_faults(rng: random.Random) -> tuple[Faults, bool]:
    """Faults of one scenario, and whether they stay inside the grace period."""
    inside = rng.random() < 0.5
    most = 0.45 * GRACE if inside else 3 * GRACE
    places = rng.sample(["job", "listed", "file", "model", "completions"], rng.randint(1, 4))
    faults = Faults(**{place: rng.uniform(0.05, 1.0) * most for place in places}, lost_submits=rng.randint(0, 3))
    if not inside and rng.random() < 0.6:
        for name in rng.sample(sorted(LIES), rng.randint(1, 3)):
            faults.lies |= LIES[name]
        faults.times = rng.choice([1, 3, 30])
    return faults, inside


@pytest.mark.long
@pytest.mark.parametrize("seed", range(60))
def test_scenarios_of_lag_and_lies(seed: int, data: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """Inside the grace period: one job a member and the scores of the undisturbed run. Beyond it, or with lies: those
    scores, or an error that says what to do; and no job that nobody accounts for."""
    faults, inside = _random_faults(random.Random(seed))
    raised: BaseException | None = None
    with LaggingProvider(faults) as provider:
        for _ in range(3):
            try:
                run_on(provider, data, tmp_path / "run")
                raised = None
                break
            except (ProviderError, UnknownJobsError, NotEnoughMembersError) as error:
                raised = error
                if isinstance(error, TransientError | HeldJobError):
                    continue
                break
        if inside:
            assert raised is None
            assert len(provider.jobs) == MEMBERS
        if raised is None:
            with RunStore.open(tmp_path / "run", read_only=True) as store:
                given_up = store.jobs.left_out().keys()  # beyond the grace period a member may be, and that is said
            assert not (inside and given_up)
            scores = outcome(tmp_path / "run")["scores"]
            assert all(scores[k] == reference["scores"][k] for k in scores if k[0] not in given_up)
        if raised is not None:  # once the provider agrees with itself again, `daunce cancel` names what is left
            provider.faults.listed = 0.0
            provider.faults.lies.clear()
            report = make(provider, data, tmp_path / "run").cancel()
            raised = type(raised)(f"{raised} {report.unknown}")
        accounted(provider, tmp_path / "run", raised=raised)
        live = [
            j["id"]
            for j in provider.jobs.values()
            if raised and provider._job(j, provider.clock.now())["status"] == "running"
        ]
        assert not live, f"still running after cancel: {live}"
        kinds = "inside" if inside else "beyond"
        print(f"{seed}: {kinds}, {len(provider.jobs)} jobs, {type(raised).__name__}")
    assert raised is None or isinstance(raised, DaunceError)
