"""The scale benchmark in its small form: a whole run over HTTP, and sizes that only a mistake could make worse."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.run_scale import measure, provider


def test_a_small_run_over_http_is_measured_and_stays_small(tmp_path: Path) -> None:
    with provider() as port:
        figures = measure(200, 5, 6, 2, tmp_path, port, commands=False)
    assert figures["store, us of an example"] > 0
    assert figures["scored over HTTP, us of an example"] > 0
    assert figures["run.sqlite, times the raw values"] < 6
    assert (tmp_path / "report.html").stat().st_size > 100_000
