"""What the pages show of a removal ranking, and the command that serves them."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daunce_api import RunConfig
from daunce_api.cli.fixing import _show_outcome
from daunce_api.evaluation.retraining import RetrainedLosses
from daunce_api.fix import propose
from daunce_api.fix.folder import keep, keep_outcome
from daunce_api.fix.retraining import Answer, Outcome, outcome, retraining_of
from daunce_api.report.page import removal_of, write_report_of
from daunce_api.report.view import Runs
from daunce_api.run import Run

SAID = {"all": "<b>NO</b> returns.", "cleaned": "Yes, gladly."}
FIXTURE = Path(__file__).parents[2] / "fixtures" / "run-2fa6155" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shutil.copytree(FIXTURE, tmp_path / "run", ignore=shutil.ignore_patterns("server", "lock"))
    return Run.open(tmp_path / "run")


def test_without_verdicts_there_is_no_ranking(run: Run) -> None:
    assert removal_of(run, run.attribution()) == {}
    run.mark(run.test.ids[:1], "wanted")
    assert removal_of(run, run.attribution()) == {}


def test_the_page_shows_the_ranking_of_fix(run: Run) -> None:
    run.mark(run.test.ids[:2], "unwanted")
    run.mark(run.test.ids[2:3], "wanted")
    expected = propose(run.attribution(), run.test.ids[:2], run.test.ids[2:3])
    page = html.unescape(write_report_of(run, run.attribution()).read_text())
    assert "pushes the 2 unwanted against 1 wanted answers" in page
    assert expected.reason in page
    shown = removal_of(run, run.attribution())["proposal"]
    for group in expected.ranked:
        assert shown.z_N[list(group.positions)] == pytest.approx(group.z)


def test_pages_show_what_a_retraining_did(run: Run) -> None:
    run.mark(run.test.ids[:1], "unwanted")
    folder = keep(run, propose(run.attribution(), run.test.ids[:1], top=1))
    assert folder is not None
    answers = (
        Answer(run.test.ids[0], "unwanted", {"all": 1.0, "cleaned": 3.0, "random": 1.25}, 2.0, 1.5, 2.5, SAID),
        Answer("gone", "wanted", {"all": 1.0, "cleaned": 1.0, "random": 1.0}, 0.0, float("nan"), float("nan")),
    )
    keep_outcome(folder, Outcome(3, answers, (2.0, 1.5, 2.5), None, "Unwanted answers became less likely."))
    page = write_report_of(run, run.attribution()).read_text()
    assert "Unwanted answers became less likely." in page
    for text in ("0.368 → 0.050", "1.00 → 3.00", "+2.00 [1.50, 2.50]", "&lt;b&gt;NO&lt;/b&gt;", "Yes, gladly."):
        assert text in page
    assert page.count('class="said"') == 1
    assert "gone" not in page.split('class="outcome"')[1].split("</table>")[0], "an answer of another page"
    runs = Runs(run.run_dir)
    (identity,) = runs.scan()
    assert runs.state(identity)["fixed"] == "Unwanted answers became less likely."
    (folder / "fix.json").unlink()
    assert runs.state(identity)["fixed"] == "", "the page follows the folder"


def test_a_loss_that_is_only_a_lower_bound_is_unknown_and_no_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the provider no longer lists the answer's token after the fix."""
    first, second = run.test.ids[:2]
    run.mark([first, second], "unwanted")
    proposal = propose(run.attribution(), [first, second], top=1)
    retrained = retraining_of(run, proposal, seeds=2)
    loss = np.random.default_rng(0).normal(2, 0.1, (6, len(run.test)))
    loss[:, 0] = np.nan
    measured = RetrainedLosses(tuple(range(6)), retrained.material.ensemble.inclusion_KN, loss)
    monkeypatch.setattr("daunce_api.fix.retraining.question_losses", lambda run: measured)
    monkeypatch.setattr(Run, "measure", lambda run, **options: None)
    said = {"answers": [{"id": first, "said": SAID}]}
    found = outcome(retrained, proposal, known=said)
    assert "the change of 1 of 2 unwanted answers is not known" in found.verdict
    assert "nan" not in found.verdict
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["answers"][0]["change"] is plain["answers"][0]["probability"]["all"] is None
    assert plain["unwanted"][0] == pytest.approx(found.answers[1].change)
    folder = keep(run, proposal)
    assert folder is not None
    keep_outcome(folder, found)
    page = write_report_of(run, run.attribution()).read_text()
    assert page.count("unknown: some models give only a lower bound") == 1
    _show_outcome(found)
    assert "nan" not in capsys.readouterr().out


def test_a_question_is_priced_asked_marked_and_fixed(
    finished: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    shutil.copytree(finished, make_config().run_dir)
    runs = Runs(tmp_path)
    (row,) = runs.listed()
    turns = [{"role": "user", "content": "What is a baker?"}]
    price = runs.price(row["id"], turns, "A person who bakes bread.")
    assert price["costs"] is False
    assert "short requests" in price["text"]
    found = runs.ask(row["id"], turns, "A person who bakes bread.", 0)
    assert found["id"] in [q["id"] for q in runs.questions(row["id"])]
    assert found["id"] in runs.attributions(row["id"])[0].test.ids
    runs.mark(row["id"], found["id"], "unwanted")
    assert {q["id"]: q["verdict"] for q in runs.questions(row["id"])}[found["id"]] == "unwanted"
    proposal = runs.fix(row["id"])
    assert "passes a false-discovery rate" in proposal["reason"]
    assert (proposal["count"], proposal["folder"], proposal["groups"]) == (0, None, [])
    assert not (tmp_path / "run" / "fix").exists(), "nothing is proposed, so nothing is kept"
    runs.mark(row["id"], found["id"], None)
    assert {q["verdict"] for q in runs.questions(row["id"])} == {None}


def test_the_command_serves_until_it_is_interrupted(run: Run) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from daunce_api.cli import main; main()",
            "view",
            str(run.run_dir),
            "--no-browser",
            "--host",
            "localhost",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://localhost:\d+/\S+/", process.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[0] + "api/runs", timeout=120) as answer:
            assert b'"members_scored":6' in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert process.returncode in (0, 130)
