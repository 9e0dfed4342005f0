"""The orchestrator on real jobs over HTTP, and the plan against what the server says it trained on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.subsets import plan_ensemble
from daunce_api.data.tokenizers import encode_dataset
from daunce_api.plan import make_plan
from daunce_api.providers.registry import capabilities_of, open_backend, open_tokenizer
from daunce_api.server import EmbeddedServer, ServerSettings
from daunce_api.store import RunStore
from daunce_api.train import JobClient, Training, clean_up

WORDS = ["amber", "basalt", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon"]


@pytest.mark.long  # tests/reliability/test_money.py compares planned and counted tokens
def test_tokens_planned_are_tokens_trained(tmp_path: Path) -> None:
    """Within 2 % of what the embedded server reports (they are the same ids, so in fact equal), and cleaned up."""
    config = RunConfig.from_mapping(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"train": "a", "test": "b"},
            "backend": {"kind": "embedded", "model": "daunce-tiny"},
            "ensemble": {"members": 3},
            "training": {"hyperparameters": {"n_epochs": 2}},
        }
    )
    records = [
        {
            "messages": [
                {"role": "user", "content": f"What is {w}?"},
                {"role": "assistant", "content": f"{w} " * (i + 1)},
            ]
        }
        for i, w in enumerate(WORDS)
    ] + [{"prompt": f"{w}: ", "completion": f"a {w}, naïve “quoted” 東京 🙂"} for w in WORDS]
    train = Dataset.from_records(records, name="train.jsonl")
    trainer, scorer = capabilities_of(config)
    plan = make_plan(config, train, train, partial(encode_dataset, tokenizer=open_tokenizer(config)), trainer, scorer)
    plan.check()

    async def main(store: RunStore) -> None:
        async with open_backend(config) as backend:
            client = JobClient(backend.trainer, store, costs=plan.costs)
            ensemble = plan_ensemble(len(train), 3, 0.5, 0, trainer.min_examples)
            training = Training(client, ensemble=ensemble, dataset=train, config=config)
            await training.run()
            models = store.jobs.ready_models()
            assert set(models) == {0, 1, 2}
            reported = {j.member: j.trained_tokens for j in store.jobs.rows()}
            assert reported == plan.training_tokens
            await training.run()
            assert store.jobs.ready_models() == models
            report = await clean_up(client)
            finals = set(models.values())
            earlier = set(report.models) - finals
            # The server keeps the models of earlier epochs too, one each here: they go with the final ones.
            assert finals <= set(report.models)
            assert {m.rsplit(":", 1)[0] for m in earlier} == finals
            assert (len(report.models), len(report.files), report.kept) == (6, 3, {})

    with RunStore.create_or_open(config.run_dir, {"config": config.model_dump(mode="json")}) as store:
        asyncio.run(main(store))


CLIENT = """
    import asyncio, json, sys
    from daunce_api.providers.registry import open_backend
    from daunce_api.config import RunConfig
    from daunce_api.data.dataset import Dataset
    from daunce_api.data.subsets import plan_ensemble
    from daunce_api.train import JobClient, Training
    from daunce_api.store import RunStore

    config = RunConfig.from_mapping(json.loads(sys.argv[1]))
    train = Dataset.from_records([{"prompt": f"{i}: ", "completion": f"number {i}"} for i in range(24)])

    async def main(store):
        async with open_backend(config) as backend:
            client = JobClient(backend.trainer, store)
            training = Training(client, ensemble=plan_ensemble(24, 6, 0.5, 0), dataset=train, config=config)
            print("started", flush=True)
            await training.run()

    with RunStore.create_or_open(config.run_dir, {}) as store:
        asyncio.run(main(store))
"""


@pytest.mark.long  # tests/reliability/test_crash_storm.py kills the whole command
def test_a_client_killed_at_random_moments_submits_and_uploads_nothing_twice(tmp_path: Path) -> None:
    """SIGKILL at random moments, until the run gets through; then the server is asked what was done to it."""
    import openai

    rng = random.Random(0)
    kills = 0
    with EmbeddedServer(ServerSettings(state_dir=tmp_path / "server")) as server:
        config = {
            "run_dir": str(tmp_path / "run"),
            "data": {"train": "a", "test": "b"},
            "backend": {
                "kind": "openai_wire",
                "model": "daunce-tiny",
                "base_url": server.base_url,
                "api_key_env": "TEST_SERVER_KEY",
                "options": {"listing_lag_seconds": 0},
            },
            "ensemble": {"members": 6},
            "training": {"hyperparameters": {"n_epochs": 1}},
        }
        command = [sys.executable, "-c", textwrap.dedent(CLIENT), json.dumps(config)]
        environment = {**os.environ, "TEST_SERVER_KEY": server.api_key, "OMP_NUM_THREADS": "1"}
        for life in range(40):
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "started\n"
                if life < 30:
                    time.sleep(rng.choice([0.01, 0.03, 0.1, 0.3]) * rng.random())
                    if client.poll() is None:
                        client.send_signal(signal.SIGKILL)
                        kills += 1
                if client.wait() == 0:
                    break
        assert client.returncode == 0
        assert kills > 0
        api = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
        jobs = list(api.fine_tuning.jobs.list())
        keys = [(job.metadata or {})["daunce_key"] for job in jobs]
        assert len(keys) == len(set(keys)) == 6
        assert {job.status for job in jobs} == {"succeeded"}
        names = [f.filename for f in api.files.list() if f.purpose == "fine-tune"]
        assert len(names) == len(set(names)) == 6
        with RunStore.open(tmp_path / "run", read_only=True) as store:
            assert sorted(j.key for j in store.jobs.rows()) == sorted(keys)
            assert len(store.jobs.ready_models()) == 6
    print(f"{kills} kills")
