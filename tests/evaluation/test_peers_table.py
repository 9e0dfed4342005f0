"""The pure parts of the comparison with other libraries: cells, table rows, verdicts, and the sign of a gradient."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import nn

from tests.benchmarks import peers
from tests.benchmarks.field import cells, table
from tests.benchmarks.field.cells import Method, Result
from tests.benchmarks.field.simple import gradient_product
from tests.benchmarks.field.subjects import Subject
from tests.benchmarks.tasks import Recipe, Task


def row(value: float, **setting: Any) -> dict[str, Any]:
    return {
        "setting": setting,
        "lds": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "not_finite": 0.0,
        "cpu_seconds": 1.5,
        "trained_seconds": 20.0,
        "peak_mib": 300.0,
    }


def method(name: str, refusal: str = "") -> Method:
    return Method(name, "text", lambda subject: Result([]), refuses=lambda task: refusal)


def test_a_row_shows_the_default_and_what_the_best_setting_changed():
    content = {"rows": [row(0.5, damping=0.0, models=1), row(0.7, damping=0.1, models=1), row(0.6, damping=1.0)]}
    assert table.line(method("EK-FAC"), content, "") == (
        "| EK-FAC | text | 0.500 [0.400, 0.600] | 0.700 (damping 0.1) | 22 | 300 |"
    )


def test_a_method_that_cannot_fails_or_was_not_run_says_so():
    assert "cannot: needs text" in table.line(method("BM25"), None, "needs text")
    assert "not run" in table.line(method("BM25"), None, "")
    failed = {"rows": [{"setting": {}, "error": "ValueError: singular"}]}
    assert "fails: ValueError: singular" in table.line(method("TRAK"), failed, "")


def test_cells_survive_and_rank_the_rows(tmp_path: Path):
    for name, value in (("low", 0.1), ("high", 0.9)):
        cells.write_cell("digits", name, {"rows": [row(value)]}, tmp_path)
    assert cells.read_cell("digits", "absent", tmp_path) is None
    found = table.rows_of("digits", [method("absent"), method("low"), method("high")], tmp_path)
    assert [m.name for m, _ in found] == ["high", "low", "absent"]


def test_goals_compare_the_better_start_with_the_best_of_the_others(tmp_path: Path):
    names = {
        "black box, from base, auto, K = 100": 0.6,
        "black box, from target, auto, K = 100": 0.7,
        "TRAK-10 (traker)": 0.65,
        "white box, fisher, auto, K = 100": 0.8,
    }
    listed = [method(name) for name in names]
    for one in listed:
        cells.write_cell("lm", one.key, {"rows": [row(names[one.name])]}, tmp_path)
    against_trak, cosine, _, later, *_, white = table.verdicts(["lm"], listed, tmp_path)
    assert "lm 0.700 against 0.650 (above)" in against_trak
    assert "lm not measured" in cosine
    assert "auto + checkpoints" in later
    assert "not measured" in later
    assert white.endswith("lm 0.800, place 1.")


def test_the_place_of_a_white_box_counts_those_above_and_names_the_first(tmp_path: Path):
    names = {"white box, fisher, auto, K = 100": 0.6, "EK-FAC (kronfluence)": 0.7, "TRAK-10 (traker)": 0.65, "x": 0.1}
    listed = [method(name) for name in names]
    for one in listed:
        cells.write_cell("lm", one.key, {"rows": [row(names[one.name])]}, tmp_path)
    assert "lm 0.600, place 3 (first: EK-FAC (kronfluence))" in table.verdicts(["lm"], listed, tmp_path)[-1]


def test_a_task_s_table_names_what_does_not_apply_and_what_was_not_run(tmp_path: Path):
    listed = [method("BM25", "needs text"), method("TRAK"), method("black box, auto, K = 10"), method("dot")]
    for one in listed[2:]:
        cells.write_cell("digits", one.key, {"rows": [row(0.5)]}, tmp_path)
    text = table.markdown("digits", listed, tmp_path)
    assert "Does not apply: BM25 (needs text)." in text
    assert "Not run: TRAK." in text
    assert "| dot |" in text
    assert "K = 10" not in text
    assert "| digits, auto | 0.500 | - | - | - |" in table.members_table(["digits"], listed, tmp_path)
    assert [m.name for m in table.anywhere(["digits"], listed, tmp_path)] == ["black box, auto, K = 10", "dot"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text on show, and an empty cache of cells."""
    monkeypatch.setattr(cells, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(table, "PLOT", tmp_path / "peers.svg")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(peers, "methods", lambda: [method("TRAK"), method("random")])
    (tmp_path / "RESULTS.md").write_text("# Kept\n<!-- tables -->\nold tables\n")
    return tmp_path / "RESULTS.md"


def test_without_cells_the_tables_on_show_stay(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table, "plot", lambda *_: pytest.fail("there is nothing to draw"))
    cells.write_cell("lm", "trak", {"rows": [row(0.5)]})
    with pytest.raises(SystemExit, match=r"No cell of digits is in .*cache/peers/digits, so nothing was written"):
        table.write_all(["lm", "digits"])
    assert "old tables" in results.read_text()


def test_a_plot_that_fails_leaves_the_text_alone(results: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise ImportError("matplotlib")

    cells.write_cell("lm", "trak", {"rows": [row(0.5)]})
    monkeypatch.setattr(table, "plot", fails)
    with pytest.raises(ImportError):
        table.write_all(["lm"])
    assert "old tables" in results.read_text()
    monkeypatch.setattr(table, "plot", lambda *_: None)
    table.write_all(["lm"])
    text = results.read_text()
    assert text.startswith("# Kept\n<!-- tables -->\n")
    assert "| TRAK | text | 0.500 [0.400, 0.600] |" in text
    assert "old tables" not in text


class Judge:
    """A subject with a truth that the scores of ``perfect`` explain."""

    name = "tiny"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.perfect = rng.normal(size=(6, 2))
        self.inclusion = rng.random((20, 6)) < 0.5

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        return self.inclusion, -(self.inclusion @ self.perfect)


def test_a_cell_is_there_after_every_setting_and_the_grid_is_optional():
    def run(subject: Judge, factor: float) -> Result:
        if factor == 0:
            raise ValueError("singular")
        return Result([subject.perfect * factor])

    tried = Method("m", "text", run, {"factor": 1.0}, ({"factor": 0.0}, {"factor": np.nan}))
    subject: Any = Judge()
    lengths = [len(content["rows"]) for content in cells.run_cell(tried, subject, True, 1e6)]
    assert lengths == [1, 2, 3]
    *_, whole = cells.run_cell(tried, subject, True, 1e6)
    assert whole["rows"][0]["lds"] == pytest.approx(1.0)
    assert whole["rows"][1]["error"] == "ValueError: singular"
    assert whole["rows"][2]["error"] == "no score is finite"
    assert [len(content["rows"]) for content in cells.run_cell(tried, subject, False, 1e6)] == [1]


@pytest.mark.slow
def test_a_process_ends_at_its_limit_of_cpu_seconds():
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(280)
            cells.limit_seconds(0.1)
            while True:
                pass
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGXCPU


def test_scores_that_are_not_finite_count_as_zero_and_are_reported():
    rng = np.random.default_rng(0)
    inclusion = rng.random((20, 6)) < 0.5
    score = rng.normal(size=(6, 2))
    good = cells.judged([score], inclusion, -(inclusion @ score))
    assert good["lds"] == pytest.approx(1.0)
    broken = score.copy()
    broken[0, 0] = np.nan
    assert cells.judged([broken], inclusion, -(inclusion @ score))["not_finite"] == pytest.approx(1 / 12)


def test_gradient_dot_predicts_one_step_of_a_linear_model():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    test_x, test_y = torch.randn(5, 4), torch.randint(0, 3, (5,))

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    task = Task("tiny", 30, Recipe(1, 1, 0.1), {}, lambda *a: (np.zeros(0), np.zeros(0)))
    subject = Subject(task, model, (x, y), (test_x, test_y), losses, losses, ["weight"])
    score = gradient_product(subject, cosine=False).scores[0]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    inclusion = np.random.default_rng(1).random((40, 30)) < 0.5
    truth = []
    for subset in inclusion:
        model.load_state_dict(start)
        pick = torch.from_numpy(np.flatnonzero(subset))
        gradients = torch.autograd.grad(losses(model(x[pick]), y[pick]).sum(), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(1e-4 * g)
            truth.append(losses(model(test_x), test_y).numpy())
    assert cells.judged([score], inclusion, np.stack(truth))["lds"] > 0.95
