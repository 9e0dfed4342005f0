"""``model:`` as a Hugging Face id, resolved in that library's cache without a connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_records import records

from daunce_api import Dataset
from daunce_api.providers.local.language import LanguageModel

RUN = """
import json, sys
from daunce_api import Run, RunConfig
from daunce_api.errors import DaunceError
from daunce_api.providers.local.language import LanguageModel

def answer(content):
    try:
        attribution = Run.create(RunConfig.from_mapping(content)).execute()
        model = LanguageModel.load(content["backend"]["model"])
        ids = model.tokenizer.encode("a river")
        return {"name": model.name, "base": model.token_logprobs([ids])[0].logprobs.tolist(),
                "losses": attribution.train_loss_KN.tolist()}
    except DaunceError as error:
        return {"error": str(error)}

print(json.dumps([answer(content) for content in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def hub(tmp_path: Path, model_folder: Path) -> Path:
    """A cache laid out as the library does, snapshots of links into blobs: acme/tiny, and acme/bare without weights,
    which is what other programs leave of a model whose tokenizer they needed."""
    for name in ("tiny", "bare"):
        repository = tmp_path / "hub" / f"models--acme--{name}"
        snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "blobs").mkdir()
        (repository / "refs" / "main").write_text(snapshot.name)
        for i, path in enumerate(sorted(model_folder.iterdir())):
            if name == "bare" and path.suffix == ".safetensors":
                continue
            blob = repository / "blobs" / f"{i:040x}"
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(Path("../..") / "blobs" / blob.name)
    return tmp_path / "hub"


def content_of(tmp_path: Path, model: str) -> dict[str, object]:
    data = records(12)
    Dataset.from_records([{**r, "id": f"t{i}"} for i, r in enumerate(data)]).to_jsonl(tmp_path / "train.jsonl")
    Dataset.from_records([{**r, "id": f"q{i}"} for i, r in enumerate(data[:2])]).to_jsonl(tmp_path / "test.jsonl")
    return {
        "run_dir": str(tmp_path / model.replace("/", "-")),
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "backend": {"kind": "local", "model": model, "options": {"engine": "thread"}},
        "ensemble": {"members": 2, "subset_ratio": 0.5, "seed": 3},
        "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}},
    }


@pytest.mark.slow
def test_an_id_is_resolved_in_the_cache_without_a_connection(hub: Path, tmp_path: Path, model: LanguageModel):
    """In one process, since the library reads its settings when it is imported."""
    models = ["acme/tiny", str(model.tokenizer.folder), "acme/other", "acme/bare"]
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps([content_of(tmp_path, name) for name in models])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_id, by_folder, other, bare = json.loads(done.stdout.splitlines()[-1])

    assert by_id["name"] == "acme/tiny"
    ids = model.tokenizer.encode("a river")
    np.testing.assert_array_equal(by_id["base"], model.token_logprobs([ids])[0].logprobs)
    np.testing.assert_array_equal(by_id["losses"], by_folder["losses"])
    for part in ("acme/other", "hf download acme/other", "HF_HUB_OFFLINE", str(hub), "daunce-tiny"):
        assert part in other["error"]
    assert "the model acme/bare has no *.safetensors in the cache" in bare["error"]
    assert "hf download acme/bare" in bare["error"]
    assert "no config.json" not in bare["error"]
