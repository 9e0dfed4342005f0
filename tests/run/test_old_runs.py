"""Run folders of version 2fa6155 open, resume and give the same scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Run, RunConfig
from daunce_api.errors import ConfigurationError
from daunce_api.providers.registry import capabilities_of
from daunce_api.store import RunStore

OLD = Path(__file__).parents[2] / "fixtures" / "run-2fa6155"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())


def test_a_finished_run_opens_with_its_losses_and_scores(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(OLD / "run", folder)
    with np.load(folder / "attribution" / "losses.npz") as old:
        train, test = old["train_loss_KN"], old["test_loss_KM"]
    attribution = Run.open(folder).attribution()
    assert attribution.train_loss_KN.tobytes() == train.tobytes()
    assert attribution.test_loss_KM.tobytes() == test.tobytes()
    np.testing.assert_allclose(attribution.scores_NM(), EXPECTED["scores_NM"], rtol=1e-9, atol=1e-12)
    assert attribution.choice.estimator.name == EXPECTED["estimator"]
    table = attribution.tokens["test"]
    assert table.logprobs[0].shape == (len(attribution.members), len(table.pieces[0]))


def test_a_half_done_run_is_finished_with_one_job_a_member(tmp_path: Path) -> None:
    """Killed with a job alive: it is looked up, its model scored, and the losses are those of the finished run."""
    folder = tmp_path / "run"
    shutil.copytree(OLD / "half", folder)
    with RunStore.open(folder, read_only=True) as store:
        before = {job.key for job in store.jobs.rows()}
    attribution = Run.open(folder).execute()
    with RunStore.open(folder, read_only=True) as store:
        assert {job.key for job in store.jobs.rows()} == before
    assert attribution.members == tuple(range(6))
    for losses, expected in (
        (attribution.train_loss_KN, EXPECTED["train_loss_KN"]),
        (attribution.test_loss_KM, EXPECTED["test_loss_KM"]),
    ):
        assert losses[:2].tolist() == expected[:2]  # scored by the old version
        np.testing.assert_allclose(losses, expected, atol=1e-3)  # another processor rounds otherwise


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ({"kind": "openai_wire", "base_url": "http://127.0.0.1:1/v1", "options": {"job_events": True}}, "job_events"),
        ({"kind": "local", "options": {"engine": "ray", "ray": {"retries": 3, "cpus": 1}}}, r"ray\.retries"),
        ({"kind": "embedded", "options": {"max_queue": 9}}, r"max_queue: it is a constant of the embedded server"),
        (
            {
                "kind": "local",
                "scorer": {"kind": "vllm", "base_url": "http://127.0.0.1:1", "options": {"route": "echo"}},
            },
            "route: echo",
        ),
    ],
)
def test_options_that_are_gone_are_left_out_with_a_sentence(backend: dict[str, Any], said: str) -> None:
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    config, gone = RunConfig.from_manifest({"config": {"data": data, "backend": {"model": "daunce-tiny", **backend}}})
    assert [sentence for sentence in gone if re.search(said, sentence)] == list(gone) != []
    capabilities_of(config)
    options = config.backend.options.get("ray", {})
    assert options == ({"cpus": 1} if "retries" in said else {})
    with pytest.raises(ConfigurationError, match=r"unknown key|Input should be"):
        capabilities_of(RunConfig.from_mapping({"data": data, "backend": {"model": "daunce-tiny", **backend}}))
