"""The recorded run in fixtures/ replays without a network, a key or a server, and gives the recorded numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Attribution, Run
from daunce_api.errors import ReplayError
from daunce_api.plan.inputs import TESTS
from daunce_api.providers.replay import replay
from daunce_api.store import RunStore

FIXTURES = Path(__file__).parents[2] / "fixtures"
FIXTURE = FIXTURES / "small-run"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to a network closed, and no key."""

    def closed(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a replay tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setattr(socket.socket, "connect_ex", closed)
    for name in ("OPENAI_API_KEY", "DAUNCE_SERVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small_run(tmp_path: Path, no_network: None) -> Path:
    """A copy of the recorded run's folder."""
    shutil.copytree(FIXTURE, tmp_path / "small", ignore=shutil.ignore_patterns("run"))
    return tmp_path / "small"


def replayed(folder: Path) -> tuple[Attribution, list[str]]:
    """The run of a folder's recording, and what it says that it did not check."""
    events: list[Any] = []
    attribution = Run.create(folder / "run.yaml").execute(session=replay(folder / "recording"), on_event=events.append)
    return attribution, [event.message for event in events if event.kind == "not_checked"]


def test_a_recording_of_the_second_protocol_replays_every_test_of_the_endpoint(
    tmp_path: Path, no_network: None
) -> None:
    folder = tmp_path / "second"
    shutil.copytree(FIXTURES / "protocol-2", folder, ignore=shutil.ignore_patterns("run"))
    attribution, not_checked = replayed(folder)
    expected = json.loads((folder / "expected.json").read_text())
    assert attribution.train_loss_KN.tolist() == expected["train_loss_KN"]
    assert attribution.test_loss_KM.tolist() == expected["test_loss_KM"]
    assert attribution.earlier is not None
    assert attribution.earlier.train_loss_SKN.tolist() == expected["earlier_train_loss_SKN"]
    assert not_checked == ["This replay does not check: the provider's list of this run's jobs."]
    with RunStore.open(folder / "run", read_only=True) as store:
        models = set(store.jobs.models())
        reports = store.get_value(TESTS)
    assert reports.keys() == {"daunce-tiny", *models}
    assert all(report["checked"] for report in reports.values())


def test_an_older_recording_says_what_it_cannot_check(small_run: Path) -> None:
    _, (text,) = replayed(small_run)
    assert "the provider's list of this run's jobs; the run's sequence number in each job" in text
    assert "token ids of scored prompts; the endpoint's test on fine-tunes" in text


def test_a_replay_gives_bit_identical_losses_and_scores(small_run: Path) -> None:
    attribution = Run.create(small_run / "run.yaml").execute(session=replay(small_run / "recording"))
    expected = json.loads((FIXTURE / "expected.json").read_text())
    assert attribution.train_loss_KN.tolist() == expected["train_loss_KN"]
    assert attribution.test_loss_KM.tolist() == expected["test_loss_KM"]
    covariance = attribution.with_estimator("covariance").scores_NM()
    # Losses are the recorded bits. A matrix product may differ in the last one between processors, not between runs.
    np.testing.assert_allclose(covariance, expected["covariance_NM"], rtol=1e-12)

    run = Run.create(small_run / "run.yaml")
    shutil.move(run.run_dir, small_run / "first")
    again = run.execute(session=replay(small_run / "recording"))
    first = Run.open(small_run / "first").attribution()
    assert np.array_equal(again.scores_NM(), first.scores_NM())


def test_the_recording_says_where_it_comes_from() -> None:
    label = json.loads((FIXTURE / "recording" / "recording.json").read_text())
    assert (label["server"], label["complete"]) == ("local emulator", True)


def test_a_run_that_asks_for_something_else_is_refused(small_run: Path) -> None:
    config = small_run / "run.yaml"
    config.write_text(config.read_text().replace("seed: 1", "seed: 2"))
    with pytest.raises(ReplayError, match="does not answer"):
        Run.create(config).execute(session=replay(small_run / "recording"))


def test_a_recording_from_before_endpoints_were_tested_says_what_to_do(small_run: Path) -> None:
    recording = small_run / "recording"
    cassette = recording / "cassette.json"
    lines = cassette.read_text().splitlines()
    kept = [line for line in lines if '\\"max_tokens\\":8' not in line]
    assert len(kept) == len(lines) - 1
    cassette.write_text("\n".join(kept) + "\n")
    names = (cassette.name, "recording.json")
    sums = [f"{hashlib.sha256((recording / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (recording / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(ReplayError, match=r"the endpoint's test, which recordings of earlier versions lack.*--record"):
        Run.create(small_run / "run.yaml").execute(session=replay(recording))


def test_a_recording_that_was_edited_is_refused(small_run: Path) -> None:
    cassette = small_run / "recording" / "cassette.json"
    cassette.write_text(cassette.read_text().replace("daunce-tiny", "daunce-huge", 1))
    with pytest.raises(ReplayError):
        replay(small_run / "recording")
