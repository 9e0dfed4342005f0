"""What a run has used, from its store."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from daunce_api import Attribution, Run
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.base import JobStatus, TokenScores
from daunce_api.store import RunStore
from daunce_api.summary import facts_of
from daunce_api.usage import usage_of
from tests.store_rows import by_key, put

START = datetime(2026, 11, 22, 18, 0, tzinfo=UTC)


class Clock:
    """A time that a test sets, in seconds from the start."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[RunStore]:
    with RunStore.create_or_open(tmp_path, {"config": {}}, now=clock) as store:
        yield store


def examples() -> tuple[EncodedExample, ...]:
    data = Dataset.from_records([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    return tuple(EncodedExample(e, tuple(range(n, 2 * n)), (1,)) for n, e in zip((3, 5), data, strict=True))


def test_tokens_are_counted_for_every_measurement(store: RunStore) -> None:
    three, five = examples()
    answer = TokenScores((-1.0,))
    store.scores.ids_of((three, five))
    put(store, 0, 0, "f", {three.key: answer, five.key: answer})
    put(store, 1, 0, "f", {three.key: answer})
    put(store, 1, 1, "f", {three.key: answer})
    put(store, 1, 0, "f", {five.key: answer}, 1)
    assert usage_of(store, (three, five), priced=True).scored_tokens == 3 * 3 + 2 * 5


def test_time_ends_with_the_last_result_and_jobs_are_added_up(store: RunStore, clock: Clock) -> None:
    for member, (queued, ended) in enumerate(((10, 70), (20, 50))):
        key = f"k-m{member}-a1"
        clock.seconds = queued - 5
        store.jobs.intent(key, member, 1, "{}")
        clock.seconds = queued
        store.jobs.submitted(key, f"job-{member}")
        clock.seconds = queued + 1
        store.jobs.state(key, JobStatus.RUNNING)
        clock.seconds = ended
        store.jobs.state(key, JobStatus.SUCCEEDED, model=f"ft-{member}", trained_tokens=40)
    clock.seconds = 90
    store.note("parked", "until tomorrow")
    clock.seconds = 5_000
    store.jobs.model_deleted("k-m0-a1")
    used = usage_of(store, (), priced=True)
    assert used.trained_tokens == 80
    assert used.job_seconds == 60 + 30
    assert used.seconds == 90
    assert used.started_at.startswith("2026-11-22T18:00:00")
    assert used.finished_at.startswith("2026-11-22T18:01:30")


def test_a_side_with_too_many_tokens_is_not_saved(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(finished)
    attribution = run.attribution()
    assert set(attribution.tokens) == {"train", "test"}
    entries = 4 * sum(len(e.targets) for e in run.material.encoded_test)
    monkeypatch.setattr("daunce_api.attribution.saved.MAX_TOKEN_ENTRIES", entries)
    assert set(Attribution.load(attribution.save(tmp_path / "saved")).tokens) == {"test"}


def test_status_and_report_say_what_a_run_has_used(finished: Path) -> None:
    run = Run.open(finished)
    material = run.material
    with RunStore.open(finished, read_only=True) as store:
        probed = len(by_key(store, 0, 1).keys())
    assert probed > 0
    status, facts = run.status(), facts_of(run, run.attribution())
    assert status.scored_tokens > 4 * sum(len(e.ids) for e in material.encoded_train + material.encoded_test) * 0.9
    assert facts.scoring_tokens == status.scored_tokens
    assert facts.training_tokens == status.trained_tokens > 0
    assert facts.seconds == status.seconds > 0
    assert facts.job_seconds == status.job_seconds > 0
