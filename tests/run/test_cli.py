"""The command line: what it prints, how it ends, and that no traceback reaches a user."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
import yaml

from daunce_api import Run, RunConfig, core
from daunce_api.__main__ import main as entry_point
from daunce_api.attribution.score_files import load_bergson
from daunce_api.cli import app, looking, main
from daunce_api.cli.demo.experiment import run_demo
from daunce_api.providers.registry import BACKENDS
from daunce_api.server import EmbeddedServer

MakeConfig = Callable[..., RunConfig]
Cli = Callable[..., tuple[int, str, str]]


def write(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return path


def test_run_prints_what_it_found(make_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    config = make_config(ensemble={"members": 2})
    code, out, err = cli("run", write(config, tmp_path / "run.yaml"))
    assert code == 0, err
    assert "2 of 2 scored" in out
    assert f"daunce top {config.run_dir}" in out
    assert (config.run_dir / "report.html").is_file()


def test_everything_that_looks_at_a_run(finished: Path, cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("status", finished, "--json")
    state = json.loads(out)
    assert (code, state["members_scored"], state["complete"]) == (0, 4, True)
    assert cli("status", finished)[1].count("4 of 4 scored") == 1

    code, out, _ = cli("top", finished, "--test", "q1", "-k", "3")
    assert code == 0
    assert "+ helps" in out
    assert "not significant (5 %, per pair)" in out

    code, out, _ = cli("top", finished, "--test", "q1", "-k", "3", "--format", "json")
    rows = json.loads(out)["rows"]
    assert [r["rank"] for r in rows] == [1, 2, 3]
    opponents = json.loads(cli("top", finished, "--test", "q1", "-k", "3", "--opponents", "--json")[1])["rows"]
    assert opponents[0]["score"] <= opponents[1]["score"] <= rows[0]["score"]

    text = cli("top", finished, "--test", "q1", "-k", "3", "--format", "csv")[1]
    assert [r["id"] for r in csv.DictReader(io.StringIO(text))] == [r["id"] for r in rows]

    target = tmp_path / "top.parquet"
    assert cli("top", finished, "--test", "q1", "-k", "3", "--format", "parquet", "--output", target)[0] == 0
    assert list(pd.read_parquet(target)["score"]) == pytest.approx([r["score"] for r in rows])

    groups = json.loads(cli("top", finished, "--test", "q1", "--by", "source", "--json")[1])["rows"]
    assert {g["source"] for g in groups} == {"sea", "land"}
    related = json.loads(
        cli("top", finished, "--test", "q1", "--by", "source", "--question", "retrieval", "--fdr", "1e-9", "--json")[1]
    )
    assert related["estimator"] == "correlation"
    assert not any(g["distinguishable"] for g in related["rows"])

    code, out, _ = cli("report", finished, "--json")
    assert (finished / "report.html").samefile(json.loads(out)["report"])
    page = (finished / "report.html").read_text()
    assert "small · attribution report" in page
    assert "daunce-tiny" in page


def test_scores_are_exported(finished: Path, cli: Cli, tmp_path: Path) -> None:
    score = Run.open(finished).attribution().scores_NM()
    code, out, _ = cli("export", finished, "--format", "npy", "--json")
    content = json.loads(out)
    assert code == 0
    assert (content["train"], content["test"]) == (24, 3)
    assert Path(content["path"]).samefile(finished / "export" / "scores.npy")
    np.testing.assert_allclose(np.load(content["path"]), score)
    code, out, _ = cli("export", finished, "--format", "parquet", "--output", tmp_path / "s.parquet")
    assert code == 0
    assert f"Wrote {tmp_path / 's.parquet'} (24 training x 3 test examples" in out
    np.testing.assert_allclose(pd.read_parquet(tmp_path / "s.parquet")["score"], score.reshape(-1))
    for command in (("export", finished), ("top", finished, "--format", "csv"), ("report", finished)):
        code, _, err = cli(*command, "--output", "-")
        assert (code, "/dev/stdout" in err, Path("-").exists()) == (2, True, False)
    assert cli("export", finished)[0] == 0
    rows = list(csv.DictReader((finished / "export" / "scores.csv").open()))
    assert [r["train_id"] for r in rows[:4]] == ["t0", "t0", "t0", "t1"]
    np.testing.assert_allclose([float(r["score"]) for r in rows], score.reshape(-1))
    command = ("export", finished, "--format", "bergson", "--output", tmp_path / "b", "--estimator", "covariance")
    assert cli(*command)[0] == 0
    expected = Run.open(finished).attribution().with_estimator("covariance").scores_NM()
    np.testing.assert_allclose(load_bergson(tmp_path / "b"), expected)


def test_the_only_run_of_a_folder_is_found(
    finished: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "one")
    assert json.loads(cli("status", tmp_path, "--json")[1])["run_dir"].endswith("runs/one")
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("top", "-k", "2")
    assert code == 0
    assert "q0" in out  # without --test, the first answer
    shutil.copytree(finished, tmp_path / "two")
    code, _, err = cli("status")
    assert code == 2
    assert "2 runs" in err
    assert "two" in err


def test_help_shows_no_types_of_switches_and_lists_estimators(cli: Cli) -> None:
    for name in ("top", "run", "export", "demo"):
        text = cli(name, "--help")[1]
        assert "bool" not in text
        assert "EXAMPLE" not in text
    text = " ".join(re.sub(r"[│\s]+", " ", cli("top", "--help")[1]).split())
    assert "auto, covariance, correlation" in text
    assert ", ".join(["auto", *core.ESTIMATORS]) == looking.ESTIMATORS


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["top", "{run}", "--test", "nobody"], 2, "has no example 'nobody'"),
        (["top", "{run}", "--test", "q0", "--estimator", "guess"], 2, "Unknown estimator 'guess'"),
        (["top", "{run}", "--test", "q0", "--format", "parquet"], 2, "--output"),
        (["top", "{run}", "--test", "q0", "--by", "source", "--fdr", "2"], 2, "lies in (0, 1)"),
        (["export", "{run}", "--format", "xlsx"], 2, "'--format': 'xlsx' is not one of 'npy'"),
        (["top", "{run}", "--test", "q0", "-k", "0"], 2, "greater than or equal to 1. `daunce"),
        (["export", "{run}", "--format", "npy", "--estimator", "guess"], 2, "Unknown estimator 'guess'"),
        (["export", "{run}", "--format", "dattri"], 2, "daunce evaluate"),
        (["export", "{tmp}/nothing", "--format", "npy"], 4, "holds no run"),
        (["evaluate", "{run}", "--retrieval", "x", "--truth", "{tmp}/t.npz"], 2, "--truth goes with --lds: add"),
        (["evaluate", "{run}", "--lds", "--truth", "x", "--seeds", "2"], 2, "--seeds goes with --lds without --truth"),
        (["evaluate", "{run}", "--lds", "-k", "3"], 2, "-k goes with --removal"),
        (["export", "{run}", "--output", "{tmp}"], 4, "Is a directory. What was stored before is kept. Name another"),
        (["export", "{run}", "--seeds", "2"], 2, "--seeds goes with --format dattri"),
        (["top", "{run}", "--format", "csv", "--json"], 2, "--json goes with --format json"),
        (["fix", "{run}", "--max-usd", "2"], 2, "--max-usd goes with --retrain"),
        (["fix", "{run}", "--top", "2", "--fdr", "0.2"], 2, "leave --top or --fdr out"),
        (["evaluate", "{run}", "--lds", "--truth", "{tmp}/t.npz"], 2, "cannot be read as a truth"),
        (["status", "{tmp}/nothing"], 4, "holds no run"),
        (["status", "{run}/run.sqlite"], 4, "run_dir"),
        (["init", "{tmp}", "--backend", "opnai"], 2, "--backend: 'opnai' is not known; did you mean openai?"),
        (["plan", "{tmp}/nothing.yaml"], 2, "cannot be read"),
        (["fly"], 2, "No such command"),
        (["status", "{tmp}"], 4, "holds no run"),
    ],
)
def test_mistakes_end_with_a_sentence(
    finished: Path, cli: Cli, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    ended, _, err = cli(*(a.format(run=finished, tmp=tmp_path) for a in arguments))
    assert ended == code
    assert words in err


def test_errors_are_json_too(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("status", tmp_path, "--json")
    assert code == 4
    assert json.loads(out)["error"]["type"] == "StoreError"
    code, out, err = cli("status", tmp_path, "--json", "--bogus")
    assert (code, json.loads(out)["error"]["type"]) == (2, "UsageError")
    assert "--bogus" in json.loads(out)["error"]["message"]
    assert "--bogus" in err


def test_data_problems_are_listed_with_their_lines(cli: Cli, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    config.data.train.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nnot json\n')
    code, _, err = cli("plan", write(config, tmp_path / "run.yaml"))
    assert code == 2
    assert "train.jsonl:2: completion is missing" in err
    assert "train.jsonl:3: not JSON" in err


def test_money_is_not_spent_without_a_yes(cli: Cli, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(budget={"price": {"training": 5.0, "input": 1.0}})
    code, _, err = cli("run", write(config, tmp_path / "run.yaml"))
    assert code == 2
    assert "--yes" in err
    assert not config.run_dir.exists()


def test_a_hostile_text_does_not_reach_the_terminal(
    cli: Cli, make_config: MakeConfig, tmp_path: Path, data: tuple[Path, Path]
) -> None:
    lines = data[0].read_text().splitlines()
    hostile: dict[str, Any] = json.loads(lines[0])
    hostile["messages"][0]["content"] = "\x1b[2J\x1b]0;owned\x07[red]=cmd|' /C calc'!A0</script>"
    data[0].write_text("\n".join([json.dumps(hostile), *lines[1:]]))
    config = make_config(ensemble={"members": 2})
    assert cli("run", write(config, tmp_path / "run.yaml"))[0] == 0
    _, out, err = cli("top", config.run_dir, "--test", "q0", "-k", "24")
    assert "\x1b]0" not in out + err
    assert "\x1b[2J" not in out + err
    assert r"\x1b[2J" in out


def test_init_writes_a_config_that_plans(cli: Cli, make_config: MakeConfig, tmp_path: Path) -> None:
    make_config()
    code, out, _ = cli("init", tmp_path)
    assert code == 0
    assert "daunce plan" in out
    code, out, _ = cli("plan", tmp_path / "run.yaml", "--json")
    assert code == 0
    assert json.loads(out)["members"] == 32


def test_without_a_command_the_help_is_all_that_is_said(cli: Cli) -> None:
    code, out, err = cli()
    assert "Usage" in out
    assert (code, err) == (2, "")


def test_a_run_whose_jobs_have_ended_has_none_to_cancel(
    finished: Path, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("TEST_SERVER_KEY", server.api_key)
    assert cli("cancel", finished) == (0, "No job was running.\n", "")


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")  # the data have no planted source
def test_a_demo_that_was_made_before_took_no_time(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    config = make_config(ensemble={"members": 3})
    monkeypatch.setattr("daunce_api.cli.demo.experiment.demo_config", lambda folder, members: config)
    monkeypatch.setattr("daunce_api.cli.demo.experiment._precisions", lambda attribution, shouted_N: {})
    assert run_demo(tmp_path).seconds > 0
    assert run_demo(tmp_path).seconds == 0


def test_init_makes_the_folder_and_says_what_is_missing(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("init", tmp_path / "new" / "folder")
    assert code == 0
    assert f"Put your examples into {tmp_path}/new/folder/train.jsonl and {tmp_path}/new/folder/test.jsonl" in out
    assert (tmp_path / "new" / "folder" / "run.yaml").is_file()
    (tmp_path / "file").write_text("")
    code, _, err = cli("init", tmp_path / "file")
    assert code == 2
    assert "cannot be written" in err


def test_a_plan_that_is_refused_says_so_once(cli: Cli, make_config: MakeConfig, tmp_path: Path) -> None:
    path = write(make_config(budget={"max_usd": 0.01, "price": {"training": 500.0, "input": 1.0}}), tmp_path / "r.yaml")
    code, out, err = cli("plan", path)
    assert (code, out.count("Refused: "), err) == (3, 1, "")
    code, out, _ = cli("plan", path, "--json")
    content = json.loads(out)
    assert (code, content["error"]["type"], content["refused"]) == (3, "BudgetError", [content["error"]["message"]])


def test_a_plan_without_subsets_names_no_numbers_of_theirs(cli: Cli, make_config: MakeConfig, tmp_path: Path) -> None:
    code, out, _ = cli("plan", write(make_config(ensemble={"subset_ratio": 0.01}), tmp_path / "run.yaml"))
    assert code == 2
    assert "each on" not in out
    assert "Refused: subsets would have 0 of" in out


def test_an_unknown_estimator_is_refused_before_anything_is_trained(
    cli: Cli, make_config: MakeConfig, tmp_path: Path
) -> None:
    path = write(make_config(), tmp_path / "run.yaml")
    path.write_text(path.read_text().replace("estimator: auto", "estimator: guess"))
    code, _, err = cli("plan", path)
    assert code == 2
    assert "attribution.estimator: Unknown estimator 'guess'" in err


def test_an_endpoint_that_cannot_be_used_is_no_success(cli: Cli, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(ensemble={"members": 2, "checkpoints": 9})
    code, out, _ = cli("doctor", write(config, tmp_path / "run.yaml"))
    assert "cannot be used" in out
    assert code == 5


def test_the_help_names_every_command_and_the_exit_codes(cli: Cli) -> None:
    out = cli("--help")[1]
    assert "bool" not in out
    commands = set(_commands())
    assert commands == {
        *("init", "plan", "run", "cancel", "clean", "demo"),
        *("status", "top", "report", "evaluate", "export", "ask", "fix", "view"),
        *("serve", "doctor"),
    }
    for name in commands:
        assert f" {name} " in out
    assert "130" in out


def _commands() -> dict[str, Any]:
    return dict(vars(typer.main.get_command(app))["commands"])


@pytest.mark.parametrize("name", sorted(_commands()))
def test_the_help_of_a_command_stands_alone(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command = _commands()[name]
    assert [p.name for p in command.params if not p.help] == []
    # In a window of any width, lines break where they are full.
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 90)
    text = cli(name, "--help")[1].split("╭")[0]
    paragraphs = [p.split("\n") for p in "\n".join(line.strip() for line in text.splitlines()).split("\n\n")]
    for line, following in (pair for lines in paragraphs for pair in pairwise(line for line in lines if line)):
        assert len(line) + 1 + len(following.split()[0]) > 85, (line, following)


def test_ctrl_c_while_the_command_line_is_imported_ends_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "daunce_api.cli":
                raise KeyboardInterrupt

    for name in [name for name in sys.modules if name.startswith("daunce_api.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        entry_point()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ""


def test_an_encoding_without_the_characters_gets_escapes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as stopped:
            main(["top", str(finished)])
    assert stopped.value.code == 0
    assert r"\xb1" in (tmp_path / "out").read_text()


def test_a_result_that_finds_no_room_is_a_sentence(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as stopped:
        main(["top", str(finished)])
    assert stopped.value.code == 4
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="paths are bytes on Linux alone")
def test_a_run_folder_whose_name_is_not_utf8_is_refused_in_a_sentence(finished: Path, cli: Cli, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / os.fsdecode(b"run-\xfc"))
    code, _, err = cli("status", folder)
    assert (code, "not UTF-8" in err) == (4, True)


def test_init_names_every_backend(cli: Cli) -> None:
    words = set(re.findall(r"\w+", cli("init", "--help")[1]))
    assert words >= set(BACKENDS)
