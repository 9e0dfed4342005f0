"""Faults of the server in whole runs: the same scores, or the right exit code and sentence; no storm of retries."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Run, RunConfig
from daunce_api.providers.base import JobStatus
from daunce_api.store import RunStore
from daunce_api.train.patient import PollPolicy

from .faults import fault_run, mixed
from .harness import KEY, KEY_VARIABLE, MEMBERS, Client, Provider, config_of, jobs_of, outcome, save_config, write_data
from .proxy import Sent

Quiet = tuple[RunConfig, dict[str, Any]]
MakeClient = Callable[..., tuple[RunConfig, Client]]


Good = tuple[dict[str, Any], Counter[str]]


@pytest.fixture(scope="session")
def good(quiet: Quiet, needed: Counter[str]) -> Good:
    """Outcome and requests of the run without faults."""
    return quiet[1], needed


def test_every_fifth_request_fails_in_some_way(tmp_path: Path, good: Good) -> None:
    weather = fault_run(tmp_path, mixed(0.2, seed=3), *good)
    print(weather.text())
    assert weather.ratio <= 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_nearly_every_third_request_fails_in_some_way(tmp_path: Path, good: Good, seed: int) -> None:
    weather = fault_run(tmp_path, mixed(0.3, seed), *good)
    print(weather.text())
    assert weather.ratio <= 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault", ["rate_limit", "rate_limit_bare", "error_500", "error_502", "timeout_after", "drop", "truncated"]
)
def test_one_fault_at_thirty_percent(tmp_path: Path, good: Good, fault: str) -> None:
    weather = fault_run(tmp_path, f"{fault}=0.3,retry_after=0.2,hang=12,seed=5", *good)
    print(weather.text())
    assert weather.ratio <= 2


class Stormy:
    """A server of a test's own, and a run on it in this process."""

    def __init__(self, folder: Path, inject: str, **sections: dict[str, Any]) -> None:
        write_data(folder)
        self.provider = Provider(folder / "server", inject)
        self.folder = folder
        self.sections = sections

    def __enter__(self) -> Stormy:
        self.provider.__enter__()
        self.config = config_of(self.folder, self.folder / "run", self.provider.proxy.base_url, **self.sections)
        self.client = Client(
            ["run", str(save_config(self.config, self.folder / "run.yaml")), "--yes"], self.folder / "output.txt"
        )
        return self

    def __exit__(self, *details: Any) -> None:
        self.provider.__exit__(*details)


@pytest.fixture
def stormy(tmp_path: Path, key: None) -> Any:
    return partial(Stormy, tmp_path)


def same_scores(config: RunConfig, quiet: Quiet) -> None:
    found = outcome(config.run_dir)
    assert {name: found[name] for name in ("scores", "train", "test")} == {
        name: quiet[1][name] for name in ("scores", "train", "test")
    }


@pytest.mark.slow
def test_a_daily_quota_in_mid_run_parks_it_and_the_next_day_ends_it(
    provider: Provider, make_client: MakeClient, quiet: Quiet
) -> None:
    config, client = make_client()
    submits = itertools.count()
    error = {"message": "the quota of today is used up", "type": "x", "code": "daily_rate_limit_exceeded"}

    def quota(sent: Sent) -> tuple[int, bytes] | None:
        over = sent.route == "POST /v1/fine_tuning/jobs" and next(submits) >= 2
        return (429, json.dumps({"error": error}).encode()) if over else None

    provider.proxy.refuse = quota
    assert client.run() == 6
    assert "same command again in some hours" in client.printed()
    assert "Traceback" not in client.printed()
    assert len(jobs_of(provider, config.run_dir)) == 2
    assert Run.open(config.run_dir).status().members_scored == 2  # what was bought was waited for and used
    provider.proxy.refuse = None
    assert client.run() == 0
    assert len(jobs_of(provider, config.run_dir)) == MEMBERS
    same_scores(config, quiet)


@pytest.mark.long  # tests/train does the same with a provider in this process
def test_failed_and_stuck_jobs_are_tried_again(stormy: Any, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stuck job is cancelled once it has taken longer than the policy allows."""
    monkeypatch.setattr("daunce_api.train.client.PollPolicy", partial(PollPolicy, job_timeout=20.0))
    with stormy("job_failure=0.35,job_stuck=0.25,seed=8", training={"max_attempts": 8}) as storm:
        Run.create(storm.config).execute()
        jobs = jobs_of(storm.provider, storm.config.run_dir)
        states = [job.status for job in jobs]
        assert states.count("succeeded") == MEMBERS
        assert {"failed", "cancelled"} <= set(states), states
        same_scores(storm.config, quiet)
        with RunStore.open(storm.config.run_dir, read_only=True) as store:
            assert len({j.key for j in store.jobs.rows()}) == len(jobs)
            assert all(JobStatus(j.status).final for j in store.jobs.rows())
            assert not store.ledger.unsettled()


@pytest.mark.long  # tests/train does the same with a provider in this process
def test_models_deleted_under_a_run_are_trained_again(stormy: Any, quiet: Quiet) -> None:
    with stormy("model_deleted=0.5,seed=4", training={"max_attempts": 8}) as storm:
        assert storm.client.run() == 0, storm.client.printed()
        jobs = jobs_of(storm.provider, storm.config.run_dir)
        assert len(jobs) > MEMBERS
        same_scores(storm.config, quiet)


@pytest.mark.slow
def test_a_server_that_never_recovers_ends_the_run_with_a_sentence(provider: Provider, make_client: MakeClient) -> None:
    def failed(sent: Sent) -> bytes:
        if sent.route != "GET /v1/fine_tuning/jobs/*":
            return sent.answer
        error = {"code": "server_error", "message": "out of order", "param": None}
        return json.dumps(
            {**json.loads(sent.answer), "status": "failed", "fine_tuned_model": None, "error": error}
        ).encode()

    _, client = make_client(training={"max_attempts": 2})
    provider.proxy.change_answer = failed
    assert client.run() == 7
    assert "training.max_attempts" in client.printed()
    assert "Traceback" not in client.printed()


def test_a_refused_key_stops_at_once(provider: Provider, make_client: MakeClient) -> None:
    _, client = make_client()
    client.environment[KEY_VARIABLE] = KEY + "-wrong"
    provider.proxy.sent.clear()
    assert client.run() == 5
    assert "api_key_env" in client.printed()
    assert KEY not in client.printed()
    assert len(provider.proxy.sent) == 1
