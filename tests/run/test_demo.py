"""The demo, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_finds_the_planted_examples(tmp_path: Path) -> None:
    """24 members through HTTP; average precision of the planted examples at least .9 (measured: .99)."""
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
    assert result["members"] == 24
    assert result["average_precision"] >= 0.9
    assert result["average_precision_covariance"] >= 0.9
    assert result["average_precision_random"] < 0.3
    assert 0 <= result["average_precision_bm25"] <= 1
    assert result["seconds"] > 0
    assert "Content-Security-Policy" in Path(result["report"]).read_text(encoding="utf-8")
