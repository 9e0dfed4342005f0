"""The configs that stand in examples/ by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from example_support import ROOT, first_of_each_source

from daunce_api import Run


@pytest.mark.slow
def test_the_full_fine_tuning_config_runs_and_leaves_model_folders(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "examples" / "local_full_fine_tuning.yaml").read_text(encoding="utf-8"))
    content["run_dir"] = str(tmp_path / "run")
    content["data"] = {
        "train": str(first_of_each_source("train.jsonl", 3, tmp_path)),
        "test": str(first_of_each_source("test.jsonl", 2, tmp_path)),
    }
    content["ensemble"]["members"] = 2
    content["backend"]["options"]["engine"] = "thread"  # this process has imported PyTorch already
    content["training"]["target_hyperparameters"]["n_epochs"] = 1
    attribution = Run.create(content).execute()
    assert attribution.members == (0, 1)
    assert attribution.test_loss_KM[0].tolist() != attribution.test_loss_KM[1].tolist()
    folders = sorted((tmp_path / "run" / "local" / "models").iterdir())
    assert len(folders) == 3  # the target and two members
    assert all((f / "config.json").is_file() and (f / "model.safetensors").is_file() for f in folders)
