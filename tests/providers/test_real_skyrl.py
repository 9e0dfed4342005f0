"""Whole runs on SkyRL, a Tinker-compatible server of others, where one is running (examples/servers/skyrl.sh FOLDER).

    DAUNCE_SKYRL=http://127.0.0.1:8411 SKYRL_FOLDER=FOLDER pytest -s -m long tests/providers/test_real_skyrl.py

Needs the package tinker 0.25 (SkyRL 0.4 speaks to no newer one). Takes some minutes, most of them JAX's compiler.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from real_servers import MEMBERS, away_from_peft, live, models_of, small_run
from safetensors.torch import load_file

from daunce_api.cli.doctor import examine
from daunce_api.providers.tinker.loops import parts_of
from daunce_api.providers.tokenizers import embedded_folder

pytest.importorskip("tinker")

URL, pytestmark = live("DAUNCE_SKYRL")
FOLDER = os.environ.get("SKYRL_FOLDER", ".")
BACKEND = {"kind": "tinker", "model": os.environ.get("MODEL", str(embedded_folder())), "base_url": URL}
RECIPE = {"learning_rate": 0.002, "rank": 8}


def unpacked(model: str, into: Path) -> Path:
    """The adapter that SkyRL saved of a model, with the layers that it has: its own config names none."""
    run, name = parts_of(model)
    with tarfile.open(Path(FOLDER) / "ckpt" / run / "sampler_weights" / f"{name}.tar.gz") as archive:
        archive.extractall(into / run, filter="data")
    path = next((into / run).rglob("adapter_config.json"))
    weights = load_file(path.with_name("adapter_model.safetensors"))
    layers = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in weights}
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": sorted(layers)}))
    return path.parent


def test_a_run_from_a_target_with_checkpoints_a_question_and_clean(tmp_path: Path) -> None:
    run = small_run(tmp_path, BACKEND, RECIPE, start_from="target", checkpoints=2)
    assert examine(run).ok
    attribution = run.execute()
    assert attribution.design_KN.shape == (MEMBERS, 24)
    differences = away_from_peft(run, lambda model: unpacked(model, tmp_path), "SkyRL")
    assert np.sqrt((differences**2).mean()) < 0.01  # it computes in bfloat16
    assert np.abs(differences).max() < 0.05
    # The session of the run has ended, and with it its models: they are loaded again.
    asked = run.ask(prompt="What is carbon?", answer="A black element.")
    assert np.isfinite(asked.test_loss_KM).all()
    report = run.clean()
    assert report.kept == {}
    assert len(report.models) == 2 * MEMBERS + 1


def test_a_run_that_is_killed_goes_on_after_its_last_epoch(tmp_path: Path) -> None:
    run = small_run(tmp_path, BACKEND, {**RECIPE, "n_epochs": 3}, members=2)
    command = [sys.executable, "-m", "daunce_api", "run", "run.yaml", "--yes"]
    first = subprocess.Popen(command, cwd=tmp_path)
    loops: list[Path] = []
    for _ in range(3000):
        time.sleep(0.2)
        loops = [f for f in (run.run_dir / "tinker").glob("*.loop.json") if json.loads(f.read_text())["epoch"]]
        if loops or first.poll() is not None:
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    interrupted = {f: json.loads(f.read_text()) for f in loops}
    assert any(loop["final"] is None for loop in interrupted.values())
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    for path, before in interrupted.items():
        after = json.loads(path.read_text())
        assert after["final"] is not None
        assert len(after["runs"]) == 1 + (before["final"] is None), "taken up in a second training run"
    assert len(models_of(run)) == 2
