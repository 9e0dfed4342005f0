"""The report at the end of a run, and by command."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from daunce_api import Run, RunConfig
from daunce_api.cli import app

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    run = Run.create(make_config())
    run.execute()
    return run


def test_the_command_writes_the_page_of_the_run(run: Run) -> None:
    result = CliRunner().invoke(app, ["report", str(run.run_dir), "--json"], catch_exceptions=False)
    page = run.run_dir / "report.html"
    assert json.loads(result.stdout) == {"report": str(page)}
    text = page.read_text()
    assert "small · attribution report" in text
    assert "daunce-tiny" in text
