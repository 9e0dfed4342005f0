"""Members trained on this machine, scored on a vLLM server that loads them: the whole run, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from provider_support import VOCABULARY, Server
from test_provider_hosting import Vllm
from test_provider_wrong_shapes import Engine, row

from daunce_api import Dataset, Run
from daunce_api._util.retry import RetryPolicy
from daunce_api.providers.hosting import HostedScorer
from daunce_api.providers.registry import open_backend
from daunce_api.providers.vllm import LOCAL_MODELS, name_of
from daunce_api.score import cleaning, work
from daunce_api.store import RunStore

pytest.importorskip("peft")

MODEL = "daunce-tiny"
MEMBERS = 3


class Vllms:
    """A vLLM server that the run reaches without a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.vllm = Vllm(base=MODEL, answer=Engine())
        self.server = Server(self.vllm)

        def opened(config: Any, **options: Any) -> Any:
            return open_backend(config, http_client=self.server.http(), **options)

        for module in (cleaning, work):
            monkeypatch.setattr(module, "open_backend", opened)


@pytest.fixture
def vllms(monkeypatch: pytest.MonkeyPatch) -> Vllms:
    return Vllms(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    words = ["river", "stone", "garden", "engine"]
    data = [{"prompt": f"Q: {words[i % 4]} {i}\nA:", "completion": f" {words[(i + 1) % 4]}."} for i in range(12)]
    for side, count in (("train", 12), ("test", 2)):
        records = [{**record, "id": f"{side}{i}"} for i, record in enumerate(data[:count])]
        Dataset.from_records(records).to_jsonl(tmp_path / f"{side}.jsonl")
    return Run.create(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {side: str(tmp_path / f"{side}.jsonl") for side in ("train", "test")},
            "backend": {
                "kind": "local",
                "model": MODEL,
                "options": {"engine": "thread"},
                "scorer": {"kind": "vllm", "base_url": "http://vllm.test/v1", "options": {"max_adapters": 1}},
            },
            "ensemble": {"members": MEMBERS, "subset_ratio": 0.7, "seed": 3},
            "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}},
        }
    )


def models(run: Run) -> dict[int, str]:
    with RunStore.open(run.run_dir, read_only=True) as store:
        return store.jobs.ready_models()


def test_members_are_trained_here_loaded_there_and_scored(run: Run, vllms: Vllms) -> None:
    attribution = run.execute()
    assert attribution.train_loss_KN.shape == (MEMBERS, 12)
    for member, model in models(run).items():
        served = name_of(run.run_dir / LOCAL_MODELS / model)
        (example, *_) = run.encoded(run.train)
        values = [row(served, example.ids[:t])[example.ids[t] % VOCABULARY] for t in example.targets]
        assert attribution.train_loss_KN[member, 0] == pytest.approx(-np.mean(values))
    loads = vllms.server.paths.count("POST /v1/load_lora_adapter")
    # Once a member; the first one may give up its place between the endpoint's test and its scoring.
    assert loads == vllms.server.paths.count("POST /v1/unload_lora_adapter")
    assert MEMBERS <= loads <= MEMBERS + 1
    assert vllms.vllm.adapters == {}
    requests = len(vllms.server.requests)
    run.execute()
    assert len(vllms.server.requests) == requests


@pytest.fixture
def killed(run: Run, vllms: Vllms, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose process ended with an adapter on the server, after everything was scored."""

    async def nothing(*_: Any) -> None:
        """A killed process closes nothing."""

    with monkeypatch.context() as patch:
        patch.setattr(HostedScorer, "close", nothing)
        run.execute()
    assert len(vllms.vllm.adapters) == 1
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert len(store.hosted.models()) == 1
    return run


def test_the_same_command_takes_off_what_a_killed_process_left(killed: Run, vllms: Vllms) -> None:
    killed.execute()
    assert vllms.vllm.adapters == {}
    with RunStore.open(killed.run_dir, read_only=True) as store:
        assert store.hosted.models() == []


def test_clean_takes_off_what_a_killed_process_left(killed: Run, vllms: Vllms) -> None:
    report = killed.clean()
    assert vllms.vllm.adapters == {}
    assert len(report.unloaded) == 1
    assert len(report.models) == MEMBERS
    assert report.kept == {}


def test_what_cannot_be_taken_off_is_said_and_tried_the_next_time(
    killed: Run, vllms: Vllms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daunce_api.providers.hosting.UNLOADING", RetryPolicy(1.0, 1.0, attempts=1, total=1.0))
    vllm, vllms.server.handler = (
        vllms.server.handler,
        lambda _: httpx2.Response(503, json={"error": {"message": "busy"}}),
    )
    killed.execute()
    with RunStore.open(killed.run_dir, read_only=True) as store:
        assert len(store.hosted.models()) == 1
        assert any(t.subject == "left on the scoring server" for t in store.transitions())
    vllms.server.handler = vllm
    killed.execute()
    assert vllms.vllm.adapters == {}
