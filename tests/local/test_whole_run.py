"""Whole runs of ``kind: local``, and the same run through a server: one implementation, two doors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from local_records import records

from daunce_api import Dataset, Run, RunConfig


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    data = records(16)
    Dataset.from_records([{**r, "id": f"t{i}"} for i, r in enumerate(data)]).to_jsonl(tmp_path / "train.jsonl")
    Dataset.from_records([{**r, "id": f"q{i}"} for i, r in enumerate(data[:3])]).to_jsonl(tmp_path / "test.jsonl")
    return {
        "run_dir": str(tmp_path / "local"),
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "backend": {"kind": "local", "model": "daunce-tiny", "options": {"engine": "thread"}},
        "ensemble": {"members": 3, "subset_ratio": 0.7, "seed": 3},
        "training": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 3}},
    }


def test_a_run_trains_scores_and_attributes(content: dict[str, Any]):
    attribution = Run.create(RunConfig.from_mapping(content)).execute()
    assert attribution.train_loss_KN.shape == (3, 16)
    assert (attribution.train_loss_KN.std(axis=0) > 1e-3).all()
    assert attribution.noise < 1e-5  # nats: the repeats are scored in other company
    again = Run.create(RunConfig.from_mapping(content)).execute()
    np.testing.assert_array_equal(again.train_loss_KN, attribution.train_loss_KN)


def test_perturbed_members_around_a_target(content: dict[str, Any], tmp_path: Path):
    content["backend"]["options"] |= {"objective": "influence", "rho": 5.0}
    content["ensemble"]["start_from"] = "target"
    attribution = Run.create(RunConfig.from_mapping(content)).execute()
    assert attribution.train_loss_KN.shape == (3, 16)
    assert (attribution.train_loss_KN.std(axis=0) > 1e-5).all()


@pytest.mark.slow
def test_the_server_gives_the_same_losses(content: dict[str, Any], wire: dict[str, str], tmp_path: Path):
    losses = []
    local = content["backend"]
    alone = {**local, "options": {"engine": "thread", "members_at_a_time": 1}}
    for backend in (local, alone, wire):
        content |= {"run_dir": str(tmp_path / str(len(losses))), "backend": backend}
        attribution = Run.create(RunConfig.from_mapping(content)).execute()
        losses.append(np.hstack([attribution.train_loss_KN, attribution.test_loss_KM]))
    np.testing.assert_allclose(losses[0], losses[2], atol=1e-4)
    np.testing.assert_allclose(losses[1], losses[2], atol=1e-5)  # the same models; scored in padded passes, or alone


COMMAND = """
import sys
from daunce_api.__main__ import main
try:
    main()
finally:
    print("torch:", "torch" in sys.modules)
"""


@pytest.mark.slow
def test_plan_status_and_top_read_no_weights(content: dict[str, Any], model_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    content["backend"]["model"] = str(folder)
    Run.create(RunConfig.from_mapping(content)).execute()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (tmp_path / "next.yaml").write_text(yaml.safe_dump({**content, "run_dir": str(tmp_path / "next")}))

    def output(*arguments: str) -> str:
        command = [sys.executable, "-c", COMMAND, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "3 fine-tunes of" in output("plan", "next.yaml")
    assert not (tmp_path / "next").exists()
    for name in ("status", "top"):
        assert "torch: False" in output(name, "local")
