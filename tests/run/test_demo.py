"""The demo, as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daunce_api.data.dataset import Dataset

ROOT = Path(__file__).parents[2]


def test_the_data_come_from_the_script_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("build_demo_data", ROOT / "examples" / "build_demo_data.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept = {name: (script.DEMO / name).read_bytes() for name in ("train.jsonl", "test.jsonl")}
    monkeypatch.setattr(script, "DEMO", tmp_path)
    script.main()
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    train, test = (Dataset.from_jsonl(tmp_path / name) for name in kept)
    assert (len(train), len(test)) == (144, 8)
    assert sum(e.completion_text().isupper() for e in train) == 16
    assert all(e.completion_text().isupper() for e in test)
    assert not {e.prompt_text() for e in train} & {e.prompt_text() for e in test}


@pytest.mark.slow
def test_the_demo_finds_what_text_search_does_not(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 members through HTTP; average precision of the shouted examples at least .85 (measured: .97)."""
    done = subprocess.run(
        [sys.executable, "-c", "from daunce_api.cli import main; main()", "demo", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["members"] == 12
    assert result["average_precision"] >= 0.85
    assert result["average_precision_bm25"] < 0.3
    assert result["average_precision_random"] < 0.3
    assert result["seconds"] > 0
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    assert len(page) < 1_000_000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("demo")
    assert code == 0, err
    assert err.startswith("Why does my model shout?")
    assert max(map(len, out.splitlines())) <= 170  # commands are printed whole, to be copied
    for command in ("view", "ask", "fix"):
        assert f"daunce {command} daunce-demo" in out
    assert "text search (BM25)" in out
