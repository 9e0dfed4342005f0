"""``model:`` as a Hugging Face id, resolved in that library's cache without a connection.

In processes of their own: the library reads its settings when it is imported.
"""

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
content = json.loads(sys.argv[1])
try:
    run = Run.create(RunConfig.from_mapping(content))
    attribution = run.execute()
    model = LanguageModel.load(content["backend"]["model"])
    ids = model.tokenizer.encode("a river")
    answer = {"name": model.name, "base": model.token_logprobs([ids])[0].logprobs.tolist(),
              "losses": attribution.train_loss_KN.tolist()}
except DaunceError as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
"""


@pytest.fixture
def hub(tmp_path: Path, model_folder: Path) -> Path:
    """A cache with acme/tiny in it, laid out as the library does: a snapshot of links into blobs."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for i, path in enumerate(sorted(model_folder.iterdir())):
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


def run_in(hub: Path, content: dict[str, object]) -> dict[str, object]:
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(content)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
def test_an_id_is_resolved_in_the_cache_without_a_connection(hub: Path, tmp_path: Path, model: LanguageModel):
    found = run_in(hub, content_of(tmp_path, "acme/tiny"))
    assert found["name"] == "acme/tiny"
    ids = model.tokenizer.encode("a river")
    np.testing.assert_array_equal(found["base"], model.token_logprobs([ids])[0].logprobs)
    by_folder = run_in(hub, content_of(tmp_path, str(model.tokenizer.folder)))
    np.testing.assert_array_equal(found["losses"], by_folder["losses"])


@pytest.mark.slow
def test_an_id_that_is_not_there_is_named_with_what_to_do(hub: Path, tmp_path: Path):
    error = str(run_in(hub, content_of(tmp_path, "acme/other")).get("error"))
    for part in ("acme/other", "hf download acme/other", "HF_HUB_OFFLINE", str(hub), "daunce-tiny"):
        assert part in error
    # What other programs leave of a model that they needed no weights of.
    for path in hub.glob("*/snapshots/*/*.safetensors"):
        path.unlink()
    error = str(run_in(hub, content_of(tmp_path, "acme/tiny")).get("error"))
    assert "the model acme/tiny has no *.safetensors in the cache" in error
    assert "hf download acme/tiny" in error
    assert "no config.json" not in error
