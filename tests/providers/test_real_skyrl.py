"""A whole run on SkyRL, a Tinker-compatible server of others, where one is running (examples/servers/skyrl.sh).

    DAUNCE_SKYRL=http://127.0.0.1:8411 pytest -m long tests/providers/test_real_skyrl.py

Needs the package tinker 0.25 (SkyRL 0.4 speaks to no newer one). Takes some minutes, most of them JAX's compiler.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Dataset, Run
from daunce_api.cli.doctor import examine
from daunce_api.providers.tokenizers import embedded_folder

pytest.importorskip("tinker")

URL = os.environ.get("DAUNCE_SKYRL")
MODEL = os.environ.get("MODEL", str(embedded_folder()))
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(URL is None, reason="DAUNCE_SKYRL names no server"),
]
WORDS = ["river", "stone", "garden", "engine", "cat", "window"]
RECORDS = [
    {"prompt": f"Q: What is a {WORDS[i % 6]} {i}?\nA:", "completion": f" a {WORDS[(i + 1) % 6]}."} for i in range(24)
]


def config(folder: Path, **ensemble: Any) -> Path:
    Dataset.from_records(RECORDS).to_jsonl(folder / "train.jsonl")
    Dataset.from_records(RECORDS[:2]).to_jsonl(folder / "test.jsonl")
    path = folder / "run.yaml"
    content = {
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "run_dir": "run",
        "backend": {"kind": "tinker", "model": MODEL, "base_url": URL},
        "ensemble": {"members": 2, "seed": 1, **ensemble},
        "training": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate": 0.002, "rank": 8}},
        "scoring": {"noise_probe": 2, "cache": False},
        "attribution": {"estimator": "covariance"},
    }
    path.write_text(json.dumps(content))
    return path


def test_doctor_run_with_checkpoints_from_a_target_and_clean(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path, start_from="target", checkpoints=2))
    assert examine(run).ok
    attribution = run.execute()
    assert attribution.design_KN.shape == (2, 24)
    report = run.clean()
    assert report.kept == {}
    assert len(report.models) == 5


def test_a_run_that_is_killed_goes_on_after_its_last_epoch(tmp_path: Path) -> None:
    path = config(tmp_path)
    command = [sys.executable, "-m", "daunce_api", "run", str(path), "--yes"]
    first = subprocess.Popen(command, cwd=tmp_path)
    loops: list[Path] = []
    for _ in range(3000):
        time.sleep(0.2)
        loops = [f for f in (tmp_path / "run" / "tinker").glob("*.loop.json") if json.loads(f.read_text())["epoch"]]
        if loops or first.poll() is not None:
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    interrupted = {f.name: json.loads(f.read_text()) for f in loops}
    assert any(loop["final"] is None for loop in interrupted.values())
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    for name, before in interrupted.items():
        after = json.loads((tmp_path / "run" / "tinker" / name).read_text())
        assert after["final"] is not None
        assert len(after["runs"]) == 1 + (before["final"] is None), "taken up in a second training run"
