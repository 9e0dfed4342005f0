"""The whole wire over real sockets, against the embedded server: training, scoring, probing, faults, recording."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import AbstractAsyncContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from daunce_api._util.clock import InstantClock
from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import RejectedError, ReplayError, StopError
from daunce_api.providers.base import Job, JobRequest, JobStatus, Trainer
from daunce_api.providers.openai_wire.echo import EchoScorer
from daunce_api.providers.registry import Backend, open_backend, open_tokenizer
from daunce_api.providers.replay import record, replay
from daunce_api.score.client import ScoringClient
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore
from tests.store_rows import by_key

pytestmark = pytest.mark.slow

TRAIN = Path(str(files("daunce_api") / "cli" / "demo" / "data" / "train.jsonl"))
MODEL = "daunce-tiny"


def config(run_dir: Path, **backend: Any) -> RunConfig:
    return RunConfig.from_mapping(
        {"run_dir": str(run_dir), "data": {"train": str(TRAIN), "test": str(TRAIN)}, "backend": backend}
    )


@pytest.fixture(scope="module")
def train() -> Dataset:
    return Dataset.from_jsonl(TRAIN)


@pytest.fixture(scope="module")
def encoded(train: Dataset) -> list[EncodedExample]:
    tokenizer = open_tokenizer(config(Path("unused"), kind="embedded"))
    return [encode_example(example, tokenizer) for example in train[:40]]


def opened(
    server: EmbeddedServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **scorer: Any
) -> AbstractAsyncContextManager[Backend]:
    monkeypatch.setenv("DAUNCE_TEST_KEY", server.api_key)
    backend = {"kind": "openai_wire", "base_url": server.base_url, "api_key_env": "DAUNCE_TEST_KEY", "model": MODEL}
    return open_backend(config(run_dir, **backend, scorer={"options": scorer}))


async def finished(trainer: Trainer, job: Job) -> Job:
    while not job.status.final:
        await asyncio.sleep(0.1)
        job = await trainer.get(job.id)
    return job


async def test_a_job_from_upload_to_deletion(
    server: EmbeddedServer,
    train: Dataset,
    encoded: list[EncodedExample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = train.training_file(range(12), "last")
    async with opened(server, tmp_path, monkeypatch, return_token_ids=True) as backend:
        trainer, scorer = backend.trainer, backend.scorer
        assert (await trainer.model_info(MODEL)).shutdown_date is None
        file_id = await trainer.upload("daunce-t-1.jsonl", content)
        assert await trainer.find_file("daunce-t-1.jsonl", len(content)) == file_id
        assert await trainer.find_file("daunce-t-1.jsonl", len(content) + 1) is None
        submitted = await trainer.submit(JobRequest("beef-m0-a0", MODEL, file_id, 5, {"n_epochs": 1}, "t-m0"))
        found = await trainer.find_job("beef-m0-a0")
        assert found is not None
        assert found.id == submitted.id
        assert await trainer.find_job("beef-m1-a0") is None
        job = await finished(trainer, submitted)
        assert job.status is JobStatus.SUCCEEDED
        assert job.model is not None
        assert job.trained_tokens is not None
        assert await trainer.cancel(job.id) == job

        base, tuned = [await scorer.score(m, encoded[:8]) for m in (MODEL, job.model)]
        assert base != tuned
        assert await scorer.score(job.model, encoded[3:5]) == tuned[3:5]
        assert isinstance(scorer, EchoScorer)
        report = await scorer.probe(job.model, encoded[0])
        assert report.checked
        assert report.largest_difference is not None
        assert report.largest_difference < 1e-3

        assert await trainer.delete_model(job.model)
        assert await trainer.delete_model(job.model)
        assert await trainer.delete_file(file_id)
        assert await trainer.find_file("daunce-t-1.jsonl", len(content)) is None
        with pytest.raises(RejectedError, match="does not exist"):
            await scorer.score(job.model, encoded[:1])


@pytest.mark.parametrize("options", [{"max_tokens": 1}, {"logprobs": 0}, {"return_token_ids": True}])
async def test_every_form_of_the_request_gives_the_same_numbers(
    options: dict[str, Any],
    server: EmbeddedServer,
    encoded: list[EncodedExample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        opened(server, tmp_path, monkeypatch) as plain,
        opened(server, tmp_path, monkeypatch, **options) as other,
    ):
        assert await other.scorer.score(MODEL, encoded[:6]) == await plain.scorer.score(MODEL, encoded[:6])
        assert (await other.scorer.probe(MODEL, encoded[0])).checked or options == {"logprobs": 0}  # type: ignore[attr-defined]


async def test_a_wrong_key_stops(
    server: EmbeddedServer, encoded: list[EncodedExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAUNCE_TEST_KEY", "sk-wrong")
    backend = {"kind": "openai_wire", "base_url": server.base_url, "api_key_env": "DAUNCE_TEST_KEY", "model": MODEL}
    async with open_backend(config(tmp_path, **backend)) as wrong:
        with pytest.raises(StopError, match="401"):
            await wrong.trainer.model_info(MODEL)
        with pytest.raises(StopError, match="401"):
            await wrong.scorer.score(MODEL, encoded[:1])


FAULTS = (
    "rate_limit=0.08,rate_limit_bare=0.05,error_500=0.05,error_502=0.04,drop=0.03,truncated=0.03,malformed=0.02,"
    "retry_after=0.05,seed=3"
)


async def test_faults_change_no_score_and_start_no_storm(
    server: EmbeddedServer, encoded: list[EncodedExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scores(backend: Backend, name: str) -> tuple[dict[str, Any], int]:
        with RunStore.create_or_open(tmp_path / name, {"config": {}}) as store:
            client = ScoringClient(backend.scorer, store, clock=InstantClock())
            await client.score_member(1, MODEL, encoded)
            return by_key(store, 1), client.sender.requests

    async with opened(server, tmp_path, monkeypatch, prompts_per_request=1) as quiet:
        expected, needed = await scores(quiet, "quiet")
    faulty_server = {
        "kind": "embedded",
        "options": {"inject": FAULTS},
        "scorer": {"options": {"prompts_per_request": 1}},
    }
    async with open_backend(config(tmp_path / "faulty", **faulty_server)) as faulty:
        got, sent = await scores(faulty, "stormy")
    assert got == expected
    assert needed == len(expected) + 1, "and the test of the fine-tune"
    assert needed < sent <= 2 * needed


async def _small_run(
    run_dir: Path, session: Any, train: Dataset, encoded: list[EncodedExample], base_url: str
) -> dict[int, Any]:
    run_config = config(
        run_dir, kind="openai_wire", base_url=base_url, api_key_env="DAUNCE_TEST_KEY", model=MODEL, tokenizer=MODEL
    )
    with RunStore.create_or_open(run_dir, {"config": {}}, run_key=session.run_key) as store, session:
        async with open_backend(run_config, replaying=session.replaying) as backend:
            scoring = ScoringClient(backend.scorer, store, clock=session.clock)

            async def member(k: int) -> None:
                content = train.training_file(range(k, k + 11), "last")
                file_id = await backend.trainer.upload(f"daunce-{store.run_key}-{k}.jsonl", content)
                request = JobRequest(f"{store.run_key}-m{k}-a0", MODEL, file_id, k, {"n_epochs": 1}, "s")
                job = await backend.trainer.submit(request)
                while not job.status.final:
                    await session.clock.sleep(0.2)
                    job = await backend.trainer.get(job.id)
                await scoring.score_member(k, job.model or "", encoded)

            await asyncio.gather(*(member(k) for k in range(2)))
        return {k: by_key(store, k) for k in range(2)}


async def test_a_recording_of_a_server_replays_without_it(
    server: EmbeddedServer,
    train: Dataset,
    encoded: list[EncodedExample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`tests/run` replays one of a server of the run's own."""
    folder = tmp_path / "recording"
    monkeypatch.setenv("DAUNCE_TEST_KEY", server.api_key)
    scores = await _small_run(tmp_path / "first", record(folder), train, encoded, server.base_url)
    monkeypatch.delenv("DAUNCE_TEST_KEY")
    assert json.loads((folder / "recording.json").read_text())["server"] == "local emulator"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000

    def blocked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the replay went to the network or started a process")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", blocked)
    monkeypatch.setattr(os, "posix_spawn", blocked)
    monkeypatch.setattr("subprocess.Popen", blocked)
    elsewhere = "http://127.0.0.1:1/v1"  # all of this machine's ports are one
    assert await _small_run(tmp_path / "second", replay(folder), train, encoded, elsewhere) == scores
    with pytest.raises(ReplayError):
        await _small_run(tmp_path / "third", replay(folder), train, encoded[:-1], elsewhere)
