"""The report at the end of a run, and by command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from daunce_api import Run, RunConfig
from daunce_api.cli import app
from daunce_api.cli.running import _report_at_the_end
from daunce_api.report.page import _plot_library

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    run = Run.create(make_config())
    run.execute()
    return run


def test_the_command_writes_the_page_of_the_run(run: Run) -> None:
    pytest.importorskip("plotly")
    result = CliRunner().invoke(app, ["report", str(run.run_dir), "--json"], catch_exceptions=False)
    page = run.run_dir / "report.html"
    assert json.loads(result.stdout) == {"report": str(page)}
    text = page.read_text()
    assert "small · attribution report" in text
    assert "daunce-tiny" in text


def test_a_run_without_the_plots_extra_is_still_a_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plot_library.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert _report_at_the_end(run, run.attribution()) is None
    assert "daunce-api[report]" in capsys.readouterr().err
    assert not (run.run_dir / "report.html").exists()
