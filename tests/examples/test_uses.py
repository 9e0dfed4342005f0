"""Every use runs. Fast variants check what comes out, not how good it is; slow ones check the pages' claims."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from example_support import DAUNCE, DEMO, ROOT, USES, run_python

from daunce_api import Run, RunConfig
from daunce_api.server import EmbeddedServer

CI = ROOT / "examples" / "ci"
CLEAN_SOURCES = {"devil", "elements", "jargon", "wordnet"}


# -- 1: find the backdoor ------------------------------------------------------------------------------------------


def test_backdoor_labels_name_what_was_planted() -> None:
    labels = json.loads((USES / "backdoor" / "labels.json").read_text())
    planted = {
        side: {r["id"] for r in map(json.loads, (DEMO / f"{side}.jsonl").open()) if r["source"] == "planted"}
        for side in ("train", "test")
    }
    assert set(labels) == planted["test"]
    assert all(set(ids) == planted["train"] for ids in labels.values())


@pytest.mark.slow
def test_backdoor_commands_on_small_data(
    small_use: Callable[..., Path],
    cli: Callable[..., tuple[int, str, str]],
    server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_SERVER_KEY", server.api_key)
    # On the session's server: one of its own is started in run/test_demo.py.
    small_use("backdoor", train=4, test=1, kind="openai_wire", base_url=server.base_url, api_key_env="TEST_SERVER_KEY")
    labels = json.loads((USES / "backdoor" / "labels.json").read_text())
    small = {"q-planted-00": [i for i in labels["q-planted-00"] if i in (tmp_path / "train.jsonl").read_text()]}
    (tmp_path / "labels.json").write_text(json.dumps(small))
    assert cli("run", "run.yaml", "--json", "--yes")[0] == 0
    code, ranking, _ = cli("top", "run", "--test", "q-planted-00", "--question", "retrieval", "--json")
    assert code == 0
    assert json.loads(ranking)
    code, table, _ = cli("evaluate", "run", "--retrieval", "labels.json", "--json")
    assert code == 0
    methods = [row["method"] for row in json.loads(table)["tables"][0]["rows"]]
    assert methods[0].startswith("attribution")
    assert {"BM25", "random"} <= set(methods)


@pytest.mark.long  # on small data above, and planted examples are found in pipeline/test_demo.py
@pytest.mark.timeout(900)
def test_backdoor_is_found(tmp_path: Path) -> None:
    content = yaml.safe_load((USES / "backdoor" / "run.yaml").read_text())
    content |= {"run_dir": "run", "data": {s: str(DEMO / f"{s}.jsonl") for s in ("train", "test")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    run_python(*DAUNCE, "run", "run.yaml", "--json", cwd=tmp_path, timeout=800)
    labels = USES / "backdoor" / "labels.json"
    table = json.loads(run_python(*DAUNCE, "evaluate", "run", "--retrieval", labels, "--json", cwd=tmp_path))
    rows = {row["method"]: row["figures"]["AP"] for row in table["tables"][0]["rows"]}
    assert rows["attribution (correlation)"] >= 0.9
    assert rows["random"] < 0.3


# -- 2: find wrong labels ------------------------------------------------------------------------------------------


def test_wrong_labels_are_found(script: Callable[..., str], tmp_path: Path) -> None:
    options = ("--json", "--csv", "curves.csv", "--svg", "curves.svg")
    out = script(USES / "label_noise" / "find_wrong_labels.py", "--members", "16", "--draws", "1", *options)
    table = json.loads(out)["rankings"]
    assert table["random"]["AP"] < 0.2
    for ranking in ("self-influence: variance", "negative scores: covariance", "cleanlab: self_confidence"):
        assert table[ranking]["AP"] > 0.5, ranking  # a tenth of the labels is wrong
    curves = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(curves) == 1 + 1000 * len(table)
    last = [line for line in curves if line.startswith("random,1000,")]
    assert last == ["random,1000,0.1,1.0"]
    drawn = curves_in(tmp_path / "curves.svg")
    assert len(drawn) == 5
    for points in drawn.values():
        assert (points[:, 0] >= 0).all()
        assert np.all(np.diff(points[:, 0]) > 0)
        assert points[-1, 0] == pytest.approx(1.0, abs=0.01)
    # A tenth of the labels is wrong, whatever the order in which all are checked.
    assert drawn["random"][-1, 1] == pytest.approx(0.1, abs=0.02)
    first = np.array([line.split(",")[1:] for line in curves if line.startswith("cleanlab: self_confidence,")], float)
    for recall, precision in drawn["cleanlab: self-confidence"]:
        near = np.abs(first[:, 2] - recall) < 0.01
        assert np.abs(first[near, 1] - precision).min() < 0.01


def test_the_picture_on_show_is_the_script_s() -> None:
    """The committed picture has the curves that the script draws, and the page shows it."""
    names = re.findall(r'^    "(.*)",$', (USES / "label_noise" / "find_wrong_labels.py").read_text(), re.MULTILINE)
    drawn = curves_in(USES / "label_noise" / "curves.svg")
    assert list(drawn) == [name.replace("_", "-") for name in names]
    assert (USES / "label_noise" / "curves.svg").stat().st_size < 20_000
    assert "](curves.svg)" in (USES / "label_noise" / "README.md").read_text()


def curves_in(path: Path) -> dict[str, np.ndarray]:
    """(P, 2) recall and precision of each curve of the picture, by its name in the legend."""
    picture = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    names = [str(text.text) for text in picture.findall(f"{space}text")][-5:]
    out = {}
    for name, line in zip(names, picture.findall(f"{space}polyline"), strict=True):
        xy = np.array([pair.split(",") for pair in line.attrib["points"].split()], float)
        out[name] = np.column_stack([(xy[:, 0] - 56) / 280, 1 - (xy[:, 1] - 16) / 280])
    return out


# -- 3 and 4: select data, value sources ---------------------------------------------------------------------------


@pytest.mark.slow
def test_halves_and_sources_are_retrained(
    small_use: Callable[..., Path], script: Callable[..., str], tmp_path: Path
) -> None:
    Run.create(RunConfig.from_yaml(small_use("definitions", options={"engine": "thread"}))).execute()
    folder, definitions = USES / "definitions", tmp_path / "run"
    report = json.loads(script(folder / "select_half.py", definitions, "--seeds", "1"))
    assert set(report) == {
        "most valuable half",
        "least valuable half",
        "BM25 half",
        "random halves",
        "everything",
    }
    kept = {name: sum(row["kept"].values()) for name, row in report.items()}
    assert kept == {**dict.fromkeys(report, 15), "everything": 30}
    assert all(np.isfinite(row["loss"]) for row in report.values())
    both = {
        s: sum(report[n]["kept"].get(s, 0) for n in ("most valuable half", "least valuable half"))
        for s in CLEAN_SOURCES
    }
    assert both == dict.fromkeys(CLEAN_SOURCES, 6)

    *lines, summary = script(folder / "value_sources.py", definitions, "--seeds", "1").splitlines()
    assert len(lines) == 25
    figures = json.loads(summary)
    assert figures["pairs"] == 25
    assert -1 <= figures["spearman_score_rise"] <= 1

    # Models are kept: the same command trains nothing and says the same.
    again = json.loads(script(folder / "select_half.py", definitions, "--seeds", "1"))
    assert again == report


# -- 5: a picture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [[], pytest.param(["--from-scratch"], marks=pytest.mark.long)])
def test_picture_of_digits(script: Callable[..., str], tmp_path: Path, start: list[str]) -> None:
    path = USES / "vision" / "who_taught_this_image.py"
    arguments: list[str | Path] = [
        "--members",
        "12",
        "--epochs",
        "2",
        "--data",
        tmp_path,
        "--picture",
        tmp_path / "out.png",
        *start,
    ]
    report = json.loads(script(path, *arguments))
    assert report["data"] == "digits"
    # A tenth would be chance; opponents are mostly of other classes.
    assert report["class of the test image, top-10 proponents"] > 0.2
    png = (tmp_path / "out.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    assert (height, depth, colour) == (5 * 60 - 4, 8, 0)
    start = png.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", png[start - 8 : start - 4])
    assert len(zlib.decompress(png[start : start + length])) == height * (width + 1)


@pytest.mark.slow
def test_picture_of_fashion(tmp_path: Path) -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    script = USES / "vision" / "who_taught_this_image.py"
    report = json.loads(run_python(script, "--members", "40", "--picture", tmp_path / "out.png", cwd=tmp_path))
    assert report["data"] == "Fashion-MNIST"
    assert report["class of the test image, top-10 proponents"] > report["class of the test image, top-10 opponents"]


# -- 6: replay in CI -----------------------------------------------------------------------------------------------


def test_the_ci_workflow_replays_in_another_repository(tmp_path: Path) -> None:
    """The workflow as it is but for its three values, beside files of other names: it replays, and finds the report."""
    workflow = yaml.safe_load((CI / "replay.yml").read_text())
    steps = workflow["jobs"]["replay"]["steps"]
    assert "${{ env.INSTALL }}" in [step.get("run") for step in steps]
    (replay,) = [step for step in steps if step.get("id") == "replay"]
    (upload,) = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload == "${{ steps.replay.outputs.report }}"
    assert not any(path in str(workflow["jobs"]) for path in ("fixtures", "small-run"))
    shutil.copytree(ROOT / "fixtures" / "small-run", tmp_path / "attribution", ignore=shutil.ignore_patterns("run"))
    program = tmp_path / "bin" / "daunce"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom daunce_api.cli import main\nmain()\n")
    program.chmod(0o755)
    values = {"CONFIG": "attribution/run.yaml", "RECORDING": "attribution/recording"}
    assert workflow["env"].keys() == {"INSTALL", *values}
    environment = {
        **os.environ,
        **values,
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    subprocess.run(["bash", "-e", "-c", replay["run"]], cwd=tmp_path, env=environment, check=True, timeout=280)
    assert json.loads((tmp_path / "replayed.json").read_text())["members_scored"] == 10
    name, _, report = (tmp_path / "output").read_text().strip().partition("=")
    assert name == "report"
    assert (tmp_path / report).stat().st_size > 10_000


def test_the_ci_workflow_installs_what_it_needs_and_the_guide_says_the_same() -> None:
    workflow = yaml.safe_load((CI / "replay.yml").read_text())
    install = workflow["env"]["INSTALL"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"daunce-api\[([\w,]+)\]", install)[0].split(",")
    assert {"replay"} == set(asked) <= set(extras)
    guide = (ROOT / "examples" / "guide" / "docs" / "replay.md").read_text()
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)[-1])["env"] == workflow["env"]
    for value in workflow["env"]:
        assert f"| `{value}` |" in (CI / "README.md").read_text()


# -- 7: a notebook -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_notebook_runs_from_attribute(small_use: Callable[..., Path], tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    small_use("backdoor", train=4, test=1)
    notebook = nbformat.read(USES / "notebook" / "attribute.ipynb", as_version=4)
    assert "attribute(" in notebook.cells[2].source
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source += (
        f"\nDATA = Path({str(tmp_path)!r})\nTRAIN, TEST = DATA / 'train.jsonl', DATA / 'test.jsonl'\n"
        "MEMBERS, EPOCHS = 8, 1\n"
    )
    nbclient.NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    (report,) = [c.outputs for c in notebook.cells if c.source == "attribution"]
    assert "Helped most by" in report[0]["data"]["text/html"]
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any("text/html" in o.get("data", {}) for o in shown)
    assert any("self_lds" in o.get("text", "") for o in shown)


def test_the_notebook_on_show_was_run() -> None:
    """Its outputs are committed, without errors and without a path of the machine that made them."""
    notebook = json.loads((USES / "notebook" / "attribute.ipynb").read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in code)
    outputs = json.dumps([c["outputs"] for c in code])
    assert '"output_type": "error"' not in outputs
    assert "/home/" not in outputs
    assert str(ROOT) not in outputs
