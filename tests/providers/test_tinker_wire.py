"""Tinker's real SDK client over HTTP, against a stub of the service: members trained, found again, scored, deleted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from provider_support import BATCH, LONG, run_config, truth
from tinker_stub import BASE, TinkerStub, serving

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import LocalTokenizer, encode_example
from daunce_api.errors import RejectedError, StopError, TransientError
from daunce_api.providers.base import Checkpointing, Job, JobRequest, JobStatus, Probing
from daunce_api.providers.registry import Backend, open_backend
from daunce_api.providers.tinker.loops import Recipe, batches_of
from daunce_api.providers.tokenizers import embedded_folder

KEY = "tml-marked-0123456789"
CONTENT = "".join(
    json.dumps(r) + "\n"
    for r in (
        {"prompt": "Q: What is a cat?\nA:", "completion": " an animal."},
        {"prompt": "Q: What is a dog?\nA:", "completion": " another animal."},
        {"prompt": "Q: Why?\nA:", "completion": " because."},
    )
).encode()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinkerStub]:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with serving() as found:
        yield found


def opened(stub: TinkerStub, folder: Path, **changes: Any) -> AbstractAsyncContextManager[Backend]:
    tokenizer = str(embedded_folder())
    changes |= {"base_url": stub.url, "tokenizer": tokenizer, "api_key_env": "TINKER_API_KEY", "run_dir": str(folder)}
    return open_backend(run_config("tinker", model=BASE, **changes))


async def trained(backend: Backend, key: str = "run-m0-a0", epochs: int = 2) -> Job:
    trainer = backend.trainer
    file = await trainer.upload("train-abc.jsonl", CONTENT)
    hyperparameters: dict[str, Any] = {"n_epochs": epochs, "batch_size": 2, "learning_rate": 1e-3, "rank": 4}
    job = await trainer.submit(JobRequest(key, BASE, file, 7, hyperparameters, "daunce"))
    async with asyncio.timeout(60):
        while not (job := await trainer.get(job.id)).status.final:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return job


async def test_what_is_scored_agrees_with_what_is_sampled(stub: TinkerStub, tmp_path: Path) -> None:
    async with opened(stub, tmp_path) as backend:
        assert isinstance(backend.scorer, Probing)
        report = await backend.scorer.probe(BASE, LONG)
    assert report.checked
    assert report.largest_difference == pytest.approx(0.0, abs=1e-6)


async def test_a_member_is_trained_over_http_with_the_tokens_and_weights_of_its_recipe(
    stub: TinkerStub, tmp_path: Path
) -> None:
    async with opened(stub, tmp_path) as backend:
        job = await trained(backend)
        assert job.status is JobStatus.SUCCEEDED
        assert job.model == f"tinker://{job.id}/sampler_weights/daunce-final"
        # Another process finds the finished member by its key.
        async with opened(stub, tmp_path / "elsewhere") as other:
            found = await other.trainer.find_job("run-m0-a0")
            assert found is not None
            assert (found.id, found.status, found.model) == (job.id, JobStatus.SUCCEEDED, job.model)
            assert await other.trainer.find_job("another key") is None
        assert job.model is not None
        assert await backend.trainer.delete_model(job.model)
    [created] = stub.routes("POST", "create_model")
    metadata = {"daunce_key": "run-m0-a0", "daunce_file": "train-abc.jsonl"}
    assert (created["base_model"], created["user_metadata"]) == (BASE, metadata)
    assert (created["lora_config"]["rank"], created["lora_config"]["seed"]) == (4, 7)
    dataset = Dataset.from_jsonl(tmp_path / "tinker" / "train-abc.jsonl")
    examples = [encode_example(e, LocalTokenizer(embedded_folder()), "all") for e in dataset]
    batches = batches_of(3, Recipe(n_epochs=2, batch_size=2), 7)
    sent = stub.routes("POST", "forward_backward")
    assert [len(request.data) for request in sent] == [len(batch) for batch in batches]
    for request, batch in zip(sent, batches, strict=True):
        assert request.loss_fn == "cross_entropy"
        for datum, index in zip(request.data, batch, strict=True):
            example = examples[index]
            [chunk] = datum.model_input
            assert np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist() == list(example.ids[:-1])
            weights = np.frombuffer(datum.loss_fn_inputs["weights"].dense, np.float32)
            assert np.flatnonzero(weights).tolist() == [t - 1 for t in example.targets]
            assert weights.sum() == pytest.approx(1 / len(batch))
            targets = np.frombuffer(datum.loss_fn_inputs["target_tokens"].dense, np.int64)
            assert targets.tolist() == list(example.ids[1:])
    rates = [request["adam_params"]["learning_rate"] for request in stub.routes("POST", "optim_step")]
    assert rates == pytest.approx([1e-3 * (1 - i / 4) for i in range(4)])
    deleted = sorted(path for path, _ in stub.requests if path.startswith("DELETE"))
    assert deleted == [
        f"DELETE training_runs/{job.id}/checkpoints/sampler_weights/daunce-final",
        f"DELETE training_runs/{job.id}/checkpoints/weights/daunce-final",
        f"DELETE training_runs/{job.id}/checkpoints/weights/daunce-state-0001",
    ]
    assert stub.keys == {KEY}


async def test_models_of_earlier_epochs_are_kept_as_many_as_are_scored(stub: TinkerStub, tmp_path: Path) -> None:
    async with opened(stub, tmp_path, ensemble={"checkpoints": 3}) as backend:
        assert isinstance(backend.trainer, Checkpointing)
        job = await trained(backend, epochs=4)
        earlier = await backend.trainer.checkpoints(job.id)
        assert earlier == [f"tinker://{job.id}/sampler_weights/daunce-epoch-{n:04}" for n in (2, 3)]
        assert job.model not in earlier
        scores = await backend.scorer.score(earlier[0], [LONG])
        assert scores[0].logprobs == pytest.approx(truth(earlier[0], LONG), abs=1e-6)
    order = [path for path, _ in stub.requests if path.startswith(("POST optim", "POST save"))]
    step, save, state = "POST optim_step", "POST save_weights_for_sampler", "POST save_weights"
    assert order == [step, step, state, *[step, step, save, state] * 2, step, step, state, save]


async def test_nothing_is_sent_before_the_first_use_and_a_bad_key_stops_the_run(
    stub: TinkerStub, tmp_path: Path
) -> None:
    async with opened(stub, tmp_path):
        assert stub.requests == []
    stub.faults["create_session"] = [(401, {"detail": "bad key"})]
    async with opened(stub, tmp_path) as backend:
        with pytest.raises(StopError, match=r"answered 401 to opening .*check the API key"):
            await backend.scorer.score(BASE, [LONG])


async def test_a_session_that_cannot_be_closed_does_not_spoil_a_finished_run(stub: TinkerStub, tmp_path: Path) -> None:
    stub.faults["sessions/session-1/finish"] = [(404, {"detail": "no such session"})]
    async with opened(stub, tmp_path) as backend:
        scores = await backend.scorer.score(BASE, [LONG])
    assert scores[0].logprobs == pytest.approx(truth(BASE, LONG), abs=1e-6)


async def test_log_probabilities_come_back_over_http(stub: TinkerStub, tmp_path: Path) -> None:
    model = "tinker://run-9/sampler_weights/daunce-final"
    async with opened(stub, tmp_path) as backend:
        scores = await backend.scorer.score(model, BATCH)
        base = await backend.scorer.score(BASE, [LONG])
    for example, found in zip(BATCH, scores, strict=True):
        assert found.logprobs == pytest.approx(truth(model, example), abs=1e-6)
    assert base[0].logprobs == pytest.approx(truth(BASE, LONG), abs=1e-6)
    asked = stub.routes("POST", "asample")
    assert [a["prompt_logprobs_last_n"] for a in asked] == [
        *(len(e.ids) - 1 for e in BATCH),  # some of the prompt with it, to tell a server's zeros from certainty
        len(LONG.ids) - 1,
    ]
    assert all(a["prompt_logprobs"] is True and a["sampling_params"]["max_tokens"] == 1 for a in asked)
    assert len(stub.routes("POST", "create_sampling_session")) == 2


async def test_a_model_that_tinker_does_not_train_is_refused(stub: TinkerStub, tmp_path: Path) -> None:
    async with opened(stub, tmp_path) as backend:
        assert (await backend.trainer.model_info(BASE)).id == BASE
        with pytest.raises(RejectedError, match=f"It trains {BASE}"):
            await backend.trainer.model_info("x")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ((401, {"detail": "bad key"}), StopError),
        ((403, {"detail": "not yours"}), StopError),
        ((404, {"detail": "no such future"}), RejectedError),
        ((200, {"error": "too long", "category": "user"}), RejectedError),
        ((200, {"error": "a worker died", "category": "server"}), TransientError),
    ],
)
async def test_what_a_future_fails_with_keeps_its_meaning(
    stub: TinkerStub, tmp_path: Path, fault: tuple[int, Any], error: type[Exception]
) -> None:
    stub.faults["retrieve_future"] = [fault]
    async with opened(stub, tmp_path) as backend:
        with pytest.raises(error) as caught:
            await backend.scorer.score(BASE, [LONG])
    assert KEY not in str(caught.value)
    assert "scoring example 'long'" in str(caught.value)
