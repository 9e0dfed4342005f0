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

from daunce_api.cli.viewing import candidates_of, outcome_of, proposal_of
from daunce_api.errors import ConfigurationError
from daunce_api.fix import propose
from daunce_api.fix.folder import keep, keep_outcome
from daunce_api.fix.retraining import Answer, Outcome
from daunce_api.report.page import report_html
from daunce_api.report.view import Runs
from daunce_api.run import Run

SAID = {"all": "<b>NO</b> returns.", "cleaned": "Yes, gladly."}
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
    assert (found["count"], found["of"], found["reason"]) == (0, len(run.train), expected.reason)
    assert found["folder"] is None
    assert not (run.run_dir / "fix").exists(), "nothing is proposed, so nothing is kept"


def test_pages_show_what_a_retraining_did(run: Run) -> None:
    run.mark(run.test.ids[:1], "unwanted")
    folder = keep(run, propose(run.attribution(), run.test.ids[:1], top=1))
    assert folder is not None
    answers = (
        Answer(run.test.ids[0], "unwanted", {"all": 1.0, "cleaned": 3.0, "random": 1.25}, 2.0, 1.5, 2.5, SAID),
        Answer("gone", "wanted", {"all": 1.0, "cleaned": 1.0, "random": 1.0}, 0.0, float("nan"), float("nan")),
    )
    keep_outcome(folder, Outcome(3, answers, (2.0, 1.5, 2.5), None, "Unwanted answers became less likely."))
    shown = candidates_of(run, run.attribution())
    assert shown is not None
    assert shown.outcome is not None
    assert shown.outcome["answers"][0]["change"] == 2.0
    page = report_html(run.attribution(), candidates=shown)
    assert "Unwanted answers became less likely." in page
    for text in ("0.368 → 0.050", "1.00 → 3.00", "+2.00 [1.50, 2.50]", "&lt;b&gt;NO&lt;/b&gt;", "Yes, gladly."):
        assert text in page
    assert page.count('class="said"') == 1
    assert "gone" not in page.split('class="outcome"')[1].split("</table>")[0], "an answer of another page"
    runs = Runs(run.run_dir, outcome=outcome_of)
    (identity,) = runs.scan()
    assert runs.state(identity)["fixed"] == "Unwanted answers became less likely."
    (folder / "fix.json").unlink()
    assert runs.state(identity)["fixed"] == "", "the page follows the folder"


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
        with urllib.request.urlopen(found[0] + "api/runs", timeout=120) as answer:
            assert b'"members_scored":6' in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert process.returncode in (0, 130)
