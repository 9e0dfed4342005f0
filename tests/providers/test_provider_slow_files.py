"""A whole ensemble at services that refuse jobs until they have read a file: every member is trained."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from provider_support import run_config
from sdk_support import Service, error, httpx

pytest.importorskip("fireworks")

from test_provider_fireworks import BASE, DATASETS, JOBS
from test_provider_fireworks import make as fireworks_trainer

from daunce_api._util.clock import InstantClock
from daunce_api.data.dataset import Dataset
from daunce_api.data.subsets import plan_ensemble
from daunce_api.store import RunStore
from daunce_api.train import JobClient, Training


class SlowFireworks:
    """Every data set is ready after three looks; jobs succeed at once."""

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}
        self.refused = 0

    def __call__(self, request: Any) -> Any:
        path = request.url.path
        if path.startswith(DATASETS):
            dataset = path.removeprefix(f"{DATASETS}/").partition(":")[0]
            if request.method == "GET":
                self.looks[dataset] = self.looks.get(dataset, 0) + 1
                return {"state": "READY" if self.looks[dataset] > 3 else "UPLOADING"}
            return {}
        if request.method == "POST":
            dataset = request.content.split(b"/datasets/")[1].split(b'"')[0].decode()
            if self.looks.get(dataset, 0) <= 3:
                self.refused += 1
                return error(400, "the dataset is not READY")
        name = path.rsplit("/", 1)[-1] if request.method == "GET" else request.url.params["supervisedFineTuningJobId"]
        return httpx.Response(200, json={"name": f"accounts/me/x/{name}", "state": "JOB_STATE_COMPLETED"})


def test_no_member_is_lost_while_its_file_is_read(tmp_path: Path) -> None:
    slow, clock = SlowFireworks(), InstantClock()
    stub = Service().on("GET /v1/accounts", slow).on("POST /v1/accounts", slow)
    config = run_config("fireworks", model=BASE, ensemble={"members": 3}, run_dir=str(tmp_path))
    dataset = Dataset.from_records([{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(8)])

    async def run(store: RunStore) -> dict[int, str]:
        client = JobClient(fireworks_trainer(stub, clock), store, clock=clock, rng=random.Random(0))
        training = Training(client, ensemble=plan_ensemble(8, 3, 0.5, 0), dataset=dataset, config=config)
        await training.run()
        return store.jobs.ready_models()

    with RunStore.create_or_open(tmp_path, {"config": {}}) as store:
        assert sorted(asyncio.run(run(store))) == [0, 1, 2]
        assert [row.attempt for row in store.jobs.rows()] == [1, 1, 1]
    assert slow.refused == 0
    assert JOBS in str(stub.paths)
