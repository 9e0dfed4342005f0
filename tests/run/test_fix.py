"""``daunce fix``: from marked answers to a cleaned file and a comparison of retrained models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Dataset, Run, RunConfig
from daunce_api.fix import propose
from daunce_api.fix.folder import keep, kept_fixes
from daunce_api.fix.retraining import retraining_of

MakeConfig = Callable[..., RunConfig]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(make_config: MakeConfig, finished: Path) -> Run:
    """A finished run of four members, in this test's own folder."""
    return Run.open(shutil.copytree(finished, make_config().run_dir))


def test_a_removal_is_written_retrained_and_compared(run: Run, cli: Cli) -> None:
    first, second = run.test.ids[:2]
    options = ("--unwanted", first, "--wanted", second, "--top", "2")
    code, out, err = cli("fix", str(run.run_dir), *options, "--retrain", "--seeds", "2", "--yes", "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    assert (found["unwanted"], found["wanted"]) == ([first], [second])
    assert len(found["groups"]) == 2
    folder = Path(found["folder"])
    assert folder == run.run_dir / "fix" / "1"
    original = Path(run.config.data.train)
    kept = {e.id for e in Dataset.from_file(folder / f"{original.stem}.cleaned{original.suffix}")}
    assert kept == set(run.train.ids) - set(found["removed"])
    removed = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert [r["id"] for r in removed] == found["removed"]
    assert all(r["removed_because"]["effect"] is not None for r in removed)
    outcome = found["outcome"]
    assert outcome["seeds"] == 2
    assert {a["id"]: a["verdict"] for a in outcome["answers"]} == {first: "unwanted", second: "wanted"}
    for answer in outcome["answers"]:
        assert answer["change"] == pytest.approx(answer["loss"]["cleaned"] - answer["loss"]["all"])
        assert answer["low"] <= answer["change"] <= answer["high"]
        assert set(answer["said"]) == {"all", "cleaned"}
        assert all(answer["said"].values())
    assert "unwanted answers became" in outcome["verdict"]
    again = Run.open(run.run_dir)
    assert again.questions.verdicts == {first: "unwanted", second: "wanted"}
    # The same again: nothing is trained anew, and the folder is found again.
    code, out, err = cli("fix", str(run.run_dir), "--top", "2", "--retrain", "--seeds", "2", "--yes")
    assert code == 0, err
    assert "Take out" in out
    assert "before" in out
    assert " ".join(outcome["answers"][0]["said"]["cleaned"].split())[:20] in " ".join(out.split())
    assert kept_fixes(run.run_dir) == [folder]
    assert json.loads((folder / "fix.json").read_text())["outcome"] == outcome


def test_the_plan_says_how_many_examples_the_models_are_trained_on(run: Run) -> None:
    retrained = retraining_of(run, propose(run.attribution(), run.test.ids[:1], top=2), seeds=2)
    count = len(run.train)
    assert f"each on {count - 2} to {count} of {count} examples" in retrained.plan().text()


def test_where_nothing_passes_no_cleaned_file_is_written(run: Run, cli: Cli) -> None:
    code, out, _ = cli("fix", str(run.run_dir), "--unwanted", run.test.ids[0], "--fdr", "0.000001")
    assert code == 0
    assert "Nothing is proposed" in " ".join(out.split())
    assert not (run.run_dir / "fix").exists()
    code, out, _ = cli("fix", str(run.run_dir), "--fdr", "0.000001", "--json")
    assert (code, json.loads(out)["folder"]) == (0, None)


def test_without_a_mark_the_command_says_how_to_mark(run: Run, cli: Cli) -> None:
    code, _, err = cli("fix", str(run.run_dir))
    assert code == 2
    assert "--unwanted" in err
    code, _, err = cli("fix", str(run.run_dir), "--unwanted", "nobody")
    assert (code, "nobody" in err) == (2, True)


def test_a_training_file_that_changed_is_replaced_by_the_runs_own_copy(run: Run) -> None:
    path = Path(run.config.data.train)
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    folder = keep(run, propose(run.attribution(), run.test.ids[:1], top=1))
    assert len(Dataset.from_file(folder / "train.cleaned.jsonl")) == len(run.train) - 1


def test_a_training_file_edited_to_the_same_length_is_not_cut_by_position(run: Run) -> None:
    path = Path(run.config.data.train)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]) + "\n")  # every position holds another example
    proposal = propose(run.attribution(), run.test.ids[:1], top=1)
    cleaned = Dataset.from_file(keep(run, proposal) / "train.cleaned.jsonl")
    assert set(cleaned.ids) == set(run.train.ids) - set(proposal.ids)


def test_a_removal_that_leaves_too_little_to_train_on_is_refused_before_anything_is_sent(run: Run, cli: Cli) -> None:
    enough = len(run.train) - 9  # the embedded server takes at least 10 examples
    code, _, err = cli("fix", str(run.run_dir), "--unwanted", run.test.ids[0], "--top", str(enough), "--retrain")
    assert code == 2
    assert f"a job would have 9 of {len(run.train)} training examples, fewer than the 10" in err
    assert not (run.run_dir / "evaluation").exists()


def test_the_next_command_repeats_what_was_chosen(run: Run, cli: Cli) -> None:
    _, out, _ = cli("fix", str(run.run_dir), "--unwanted", run.test.ids[0], "--top", "2")
    assert f"fix {run.run_dir} --top 2 --retrain" in out


def test_an_answer_is_not_both_wanted_and_unwanted(run: Run, cli: Cli) -> None:
    code, _, err = cli("fix", str(run.run_dir), "--unwanted", run.test.ids[0], "--wanted", run.test.ids[0])
    assert (code, "choose one" in err) == (2, True)
    assert Run.open(run.run_dir).questions.verdicts == {}
