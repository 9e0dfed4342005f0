"""Models of earlier epochs: kept when a config asks for them, equal to runs that show them as they went."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_records import records
from plain_training import train_one

from daunce_api import Dataset, Run, RunConfig
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import RejectedError
from daunce_api.providers.base import Checkpointing, JobRequest, JobStatus
from daunce_api.providers.local.backend import LocalRun
from daunce_api.providers.local.engines import ThreadEngine
from daunce_api.providers.local.language import LanguageModel
from daunce_api.providers.local.options import FullSettings, LoraSettings, settings_of
from daunce_api.providers.local.trainer import LocalTrainer

CHOSEN = {"n_epochs": 3, "batch_size": 5, "learning_rate": 5e-3}


def config(tmp_path: Path, model_folder: Path, checkpoints: int, fine_tuning: str, **ensemble: Any) -> RunConfig:
    data = records(24)
    for side, rows in (("train", data), ("test", data[:3])):
        Dataset.from_records([{**r, "id": f"{side}{i}"} for i, r in enumerate(rows)]).to_jsonl(
            tmp_path / f"{side}.jsonl"
        )
    return RunConfig.from_mapping(
        {
            "run_dir": str(tmp_path / f"run-{checkpoints}-{fine_tuning}"),
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "backend": {
                "kind": "local",
                "model": str(model_folder),
                "options": {"engine": "thread", "fine_tuning": fine_tuning},
            },
            "ensemble": {"members": 3, "checkpoints": checkpoints, **ensemble},
            "training": {"hyperparameters": CHOSEN},
        },
        base=tmp_path,
    )


@pytest.mark.parametrize("fine_tuning", ["lora", "full"])
@pytest.mark.parametrize("asked", [1, 2, 3])
async def test_the_last_epochs_models_are_kept(
    tmp_path: Path,
    model_folder: Path,
    model: LanguageModel,
    examples: list[EncodedExample],
    fine_tuning: str,
    asked: int,
):
    chosen = config(tmp_path, model_folder, asked, fine_tuning)
    engine = ThreadEngine()
    async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
        assert isinstance(trainer, Checkpointing)
        assert trainer.capabilities.checkpoints >= 3
        content = Dataset.from_records(records(24)).training_file(range(24), "last")
        file_id = await trainer.upload("a.jsonl", content)
        job = await trainer.submit(JobRequest("k", chosen.backend.model, file_id, 5, CHOSEN, "s"))
        while not (job := await trainer.get(job.id)).status.final:  # noqa: ASYNC110 - the trainer's state has no event
            await asyncio.sleep(0.01)
        assert job.status is JobStatus.SUCCEEDED
        found = await trainer.checkpoints(job.id)
        assert found == [f"{job.model}-e{e}" for e in range(4 - asked, 3)]
        shown: dict[int, Path] = {}
        train_one(
            model,
            examples,
            settings=settings_of(CHOSEN, {"lora": LoraSettings, "full": FullSettings}[fine_tuning]),
            seed=5,
            out=tmp_path / "m",
            checkpoint=lambda epoch, path: shown.update({epoch: path}),
        )
        ids = [examples[3].ids]
        for name in found:
            folder = trainer._run.adapter(name)
            want = model.token_logprobs(ids, adapter=shown[int(name[-1])])[0].logprobs
            np.testing.assert_array_equal(model.token_logprobs(ids, adapter=folder)[0].logprobs, want)
            assert await trainer.delete_model(name)
        assert await trainer.checkpoints(job.id) == []
        assert trainer._run.adapter(str(job.model)) is not None
        with pytest.raises(RejectedError):
            await trainer.checkpoints("job-of-nobody")
    engine.close()


def test_a_run_scores_them_and_not_the_targets(tmp_path: Path, model_folder: Path):
    run = Run.create(config(tmp_path, model_folder, 2, "lora", start_from="target"))
    run.execute()
    models = sorted(p.name for p in (run.run_dir / "local" / "models").iterdir())
    assert len(models) == 3 * 2 + 1
    assert sum(name.endswith("-e2") for name in models) == 3
    assert run.status().models_scored == 6
    run.clean()
    assert list((run.run_dir / "local" / "models").iterdir()) == []
