"""What a run has used, from its store."""

from __future__ import annotations

from pathlib import Path

import pytest

from daunce_api import Attribution, Run
from daunce_api.store import RunStore
from tests.store_rows import by_key


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
    status = run.status()
    assert status.scored_tokens > 4 * sum(len(e.ids) for e in material.encoded) * 0.9
    assert status.trained_tokens > 0
    assert status.seconds > 0
    assert status.job_seconds > 0
    assert status.busy_seconds > 0
    assert 0 < status.seconds <= status.busy_seconds + 60  # one execution
    time = dict(status.rows())["time"]
    assert "busy" in time
    assert "breaks included" in time
    assert "queueing included" in time
