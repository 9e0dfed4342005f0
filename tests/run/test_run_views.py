"""What a run says of itself in a notebook, before and after it was started, and what it says of money."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from rich.console import Console

from daunce_api import Run, RunConfig
from daunce_api.cli import terminal
from daunce_api.core import SelfLDS
from daunce_api.report.glance import glance
from daunce_api.store import RunStore

MakeConfig = Callable[..., RunConfig]


def test_a_run_that_was_not_started_shows_its_plan(make_config: MakeConfig) -> None:
    run = Run.create(make_config(budget={"price": {"training": 5e6, "input": 0.0}}))
    view = run._repr_html_()
    assert "Run, not started" in view
    assert "4 fine-tunes of daunce-tiny" in view
    assert f"${run.plan().training_usd:,.2f}" in view
    assert not run.run_dir.exists()


def test_a_run_that_was_started_shows_how_far_and_how_good_it_is(finished: Path) -> None:
    run = Run.open(finished)
    view = run._repr_html_()
    assert "4 of 4 scored" in view
    assert escape(str(run.status().why)) in view
    assert "self_lds is not known below 8 members" in view


def test_the_status_of_a_large_run_starts_no_long_computation(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(folder / "derived")
    monkeypatch.setattr("daunce_api.attribution.measurements._SMALL", 0)
    state = Run.open(folder).status()
    assert (state.estimator, state.why, state.self_lds) == (None, None, None)
    assert dict(state.rows())["quality"].startswith("not computed for these members yet")
    assert not (folder / "derived").exists()

    from daunce_api import core
    from daunce_api.attribution import derived

    quality = SelfLDS(0.625, 0.5, 0.75, "whitened", 8, 0.5, 0.8, None)
    monkeypatch.setattr(core, "estimate", lambda *_, **__: quality)
    assert Run.open(folder).attribution().self_lds == quality
    assert (folder / "derived" / derived.QUALITIES).is_file()
    monkeypatch.setattr(core, "estimate", None)
    assert Run.open(folder).status().self_lds == quality
    assert "self_lds 0.62" in dict(Run.open(folder).status().rows())["quality"]


def test_quality_comes_with_its_interval_and_failures_with_their_reasons(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    with RunStore.open(folder) as store:
        for reason in ("3 jobs failed", "4 jobs failed: <out of memory>"):
            store.jobs.leave_out(2, reason)
    run = Run.open(folder)
    state = run.status()
    assert state.failures == ("member 2: 4 jobs failed: <out of memory>",)
    assert state.members_failed == 1
    known = replace(state, self_lds=SelfLDS(0.625, 0.5, 0.75, "whitened", 8, 0.5, 0.8, None))
    monkeypatch.setattr(run, "status", lambda: known)
    view = run._repr_html_()
    assert "self_lds 0.62 (95 % interval 0.50 to 0.75; a rough guess below 20 members)" in view
    assert "member 2: 4 jobs failed: &lt;out of memory&gt;" in view
    with RunStore.open(folder) as store:
        store.jobs.take_back(2)
    assert Run.open(folder).status().failures == ()
    many = dict(replace(state, failures=tuple(f"member {k}: gone" for k in range(9))).rows())
    assert many["given up"] == "member 0: gone; member 1: gone; member 2: gone; and 6 more"


def test_a_damaged_run_says_so_in_a_notebook(make_config: MakeConfig) -> None:
    run = Run.create(make_config())
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "run.sqlite").write_bytes(b"nothing" * 1_000)
    view = run._repr_html_()
    assert "StoreCorruptError" in view
    assert str(run.run_dir) in view


def _elsewhere(finished: Path, **prices: float) -> Run:
    """The finished run, as if its endpoint had not been on this machine."""
    run = Run.open(finished)
    content = run.config.model_dump(mode="json", exclude_none=True)
    content["backend"]["base_url"] = "https://fine-tunes.example/v1"
    return Run(RunConfig.from_mapping(content | {"budget": {"price": prices}}), run.train, run.test)


def test_money_is_unknown_where_a_price_is(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _elsewhere(finished, training=0.0)
    assert run.plan().usd == 0.0  # nothing is missing
    attribution, state = run.attribution(), run.status()
    assert json.loads(json.dumps(state.to_json(), default=str))["usd"] is None
    assert attribution.facts["usd"] is None
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=200))
    terminal.status(state)
    tiles = {tile.label: tile for tile in glance(attribution, state, 0.5, 0.5)}
    assert tiles["Cost"].value == "unknown"
    for shown in (text.getvalue(), run._repr_html_()):
        assert "unknown, " in shown
        assert "$0.00" not in shown


def test_money_is_known_where_all_prices_are(finished: Path) -> None:
    free = _elsewhere(finished, training=0.0, input=0.0, output=0.0)
    assert free.status().usd == 0.0
    assert "$0.00, " in free._repr_html_()
