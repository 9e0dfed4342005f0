"""What the pages show of a removal ranking, and the command that serves them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from daunce_api.cli.viewing import candidates_of, proposal_of
from daunce_api.errors import ConfigurationError
from daunce_api.fix import propose
from daunce_api.run import Run

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run-2fa6155" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shutil.copytree(FIXTURE, tmp_path / "run", ignore=shutil.ignore_patterns("server", "lock"))
    return Run.open(tmp_path / "run")


def test_without_verdicts_there_is_no_ranking(run: Run) -> None:
    assert candidates_of(run, run.attribution()) is None
    with pytest.raises(ConfigurationError, match="unwanted"):
        proposal_of(run)
    run.mark(run.test.ids[:1], "wanted")
    assert candidates_of(run, run.attribution()) is None


def test_the_page_shows_the_ranking_of_fix(run: Run) -> None:
    run.mark(run.test.ids[:2], "unwanted")
    run.mark(run.test.ids[2:3], "wanted")
    attribution = run.attribution()
    expected = propose(attribution, run.test.ids[:2], run.test.ids[2:3])
    shown = candidates_of(run, attribution)
    assert shown is not None
    for group in expected.ranked:
        assert shown.effect_N[list(group.positions)] == pytest.approx(group.z)
    assert set(np.flatnonzero(shown.proposed_N)) == set(expected.positions)
    assert "2 unwanted against 1 wanted" in shown.words
    assert expected.reason in shown.words
    found = proposal_of(run)
    assert (found["count"], found["of"], found["reason"]) == (
        len(expected.positions),
        len(run.train),
        expected.reason,
    )
    assert (Path(found["folder"]) / "fix.json").is_file()


def test_the_command_serves_until_it_is_interrupted(run: Run) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from daunce_api.cli import main; main()", "view", str(run.run_dir), "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", process.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[0] + "api/runs", timeout=60) as answer:
            assert b'"scored":6' in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert process.returncode in (0, 130)
