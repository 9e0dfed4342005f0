"""``kind: local`` through the common interface, with workers that the tests control."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_records import records
from plain_training import train_one

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import ConfigurationError, RejectedError, TransientError
from daunce_api.providers.base import Job, JobRequest, JobStatus
from daunce_api.providers.local import worker
from daunce_api.providers.local.backend import LocalRun, LocalScorer
from daunce_api.providers.local.engines import ProcessEngine, WorkerLostError
from daunce_api.providers.local.language import LanguageModel
from daunce_api.providers.local.options import LoraSettings, options_of, settings_of
from daunce_api.providers.local.trainer import LocalTrainer
from daunce_api.providers.registry import capabilities_of, open_backend, open_tokenizer

DATA = Dataset.from_records(records(24))
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 5, "learning_rate": 5e-3, "lora_rank": 4, "lora_alpha": 8}


class ScriptedEngine:
    """Runs tasks at once, in this thread, unless a script says what happens instead."""

    workers = 1

    def __init__(self, *script: BaseException | None) -> None:
        self.script = list(script)
        self.tasks: list[Any] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.tasks.append(arguments[0] if len(arguments) == 1 else arguments)
        future: Future[Any] = Future()
        planned = self.script.pop(0) if self.script else None
        if isinstance(planned, asyncio.CancelledError):
            return future  # never answers
        if planned is not None:
            future.set_exception(planned)
        else:
            future.set_result(function(*arguments))
        return future

    def close(self) -> None: ...

    @property
    def batches(self) -> list[list[str]]:
        return [[m.key for m in t.members] for t in self.tasks if isinstance(t, worker.TrainTask)]


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Callable[..., RunConfig]:
    def make(*, start_from: str = "base", **options: Any) -> RunConfig:
        return RunConfig.from_mapping(
            {
                "run_dir": str(tmp_path / "run"),
                "data": {"train": "t.jsonl", "test": "q.jsonl"},
                "backend": {"kind": "local", "model": str(model_folder), "options": options},
                "ensemble": {"start_from": start_from},
            }
        )

    return make


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - what is waited for is the trainer's state, which has no event
        await asyncio.sleep(0.005)


async def finished(trainer: LocalTrainer, *job_ids: str) -> list[Job]:
    async def all_final() -> bool:
        return all([(await trainer.get(j)).status.final for j in job_ids])

    await until(all_final)
    return [await trainer.get(j) for j in job_ids]


async def running(trainer: LocalTrainer, job_id: str) -> None:
    async def is_running() -> bool:
        return (await trainer.get(job_id)).status is JobStatus.RUNNING

    await until(is_running)


async def submit(
    trainer: LocalTrainer, member: int, *, model: str, positions: range | None = None, **changes: Any
) -> Job:
    content = DATA.training_file(positions or range(member, 20 + member), "last")
    file_id = await trainer.upload(f"subset-{member}.jsonl", content)
    request = JobRequest(f"run-m{member}-a1", model, file_id, member, {**HYPERPARAMETERS, **changes}, f"m{member}")
    return await trainer.submit(request)


async def test_members_are_trained_together_and_equal_single_fine_tunes(
    config: Callable[..., RunConfig], model: LanguageModel, examples: list[EncodedExample], tmp_path: Path
):
    chosen = config()
    engine = ScriptedEngine()
    run = LocalRun(chosen, engine)
    async with LocalTrainer(run) as trainer, LocalScorer(run) as scorer:
        jobs = [await submit(trainer, k, model=chosen.backend.model) for k in range(4)]
        done = await finished(trainer, *(j.id for j in jobs))
        assert engine.batches == [[f"run-m{k}-a1" for k in range(4)]]
        for k, job in enumerate(done):
            assert job.status is JobStatus.SUCCEEDED
            assert job.model is not None
            subset = examples[k : 20 + k]
            settings = settings_of(HYPERPARAMETERS, LoraSettings)
            outcome = train_one(model, subset, settings=settings, seed=k, out=tmp_path / f"single-{k}")
            assert job.trained_tokens == outcome.trained_tokens
            scores = await scorer.score(job.model, examples)
            alone = model.token_logprobs([e.ids for e in examples], adapter=outcome.adapter)
            for example, got, want in zip(examples, scores, alone, strict=True):
                expected = want.logprobs[[t - 1 for t in example.targets]]
                np.testing.assert_allclose(got.logprobs, expected, atol=2e-4)
        base = await scorer.score(chosen.backend.model, examples[:2])
        plain = model.token_logprobs([e.ids for e in examples[:2]])
        expected = plain[0].logprobs[[t - 1 for t in examples[0].targets]]
        np.testing.assert_allclose(base[0].logprobs, expected, atol=1e-5)


async def test_a_batch_that_was_interrupted_is_repeated_with_the_same_bits(config: Callable[..., RunConfig]):
    chosen = config()
    contents = []
    for folder, script in (("whole", ()), ("broken", (asyncio.CancelledError(),))):
        local = chosen.model_copy(update={"run_dir": chosen.run_dir / folder})
        async with LocalTrainer(LocalRun(local, ScriptedEngine(*script))) as trainer:
            jobs = [await submit(trainer, k, model=chosen.backend.model) for k in range(3)]
            if script:
                await running(trainer, jobs[0].id)
            else:
                await finished(trainer, *(j.id for j in jobs))
        engine = ScriptedEngine()
        async with LocalTrainer(LocalRun(local, engine)) as trainer:
            await finished(trainer, *(j.id for j in jobs))
            assert engine.batches == ([[f"run-m{k}-a1" for k in range(3)]] if script else [])
        models = sorted((local.run_dir / "local" / "models").glob("*"))
        contents.append({p.name: (p / "adapter_model.safetensors").read_bytes() for p in models})
    assert contents[0] == contents[1]
    assert len(contents[1]) == 3


async def test_a_lost_worker_is_tried_again_a_few_times(config: Callable[..., RunConfig]):
    chosen = config()
    lost = TransientError("worker lost")
    async with LocalTrainer(LocalRun(chosen, ScriptedEngine(lost, lost))) as trainer:
        job = await submit(trainer, 0, model=chosen.backend.model)
        assert [j.status for j in await finished(trainer, job.id)] == [JobStatus.SUCCEEDED]
    engine = ScriptedEngine(lost, lost, lost)
    async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
        job = await submit(trainer, 1, model=chosen.backend.model)
        done = (await finished(trainer, job.id))[0]
        assert (done.status, done.error, len(engine.tasks)) == (JobStatus.FAILED, "worker lost", 3)


@pytest.mark.parametrize(("times", "end"), [(2, JobStatus.SUCCEEDED), (8, JobStatus.FAILED)])
async def test_members_of_a_worker_without_memory_come_back_in_smaller_pieces(
    config: Callable[..., RunConfig], times: int, end: JobStatus
):
    chosen = config()
    engine = ScriptedEngine(*[WorkerLostError("no memory", out_of_memory=True) for _ in range(times)])
    async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
        job = await submit(trainer, 0, model=chosen.backend.model)
        [done] = await finished(trainer, job.id)
    assert [t.cuts for t in engine.tasks] == list(range(times + 1))
    assert done.status is end
    assert ("gradient_checkpointing" in str(done.error)) is (end is JobStatus.FAILED)


async def test_scoring_comes_back_with_smaller_passes_until_those_are_no_use(
    config: Callable[..., RunConfig], examples: list[EncodedExample]
):
    chosen = config()
    engine = ScriptedEngine(*[WorkerLostError("no memory", out_of_memory=True) for _ in range(8)])
    async with LocalScorer(LocalRun(chosen, engine)) as scorer:
        at_once = [scorer.score(chosen.backend.model, examples[:1]) for _ in range(2)]
        assert {type(e) for e in await asyncio.gather(*at_once, return_exceptions=True)} == {WorkerLostError}
        for _ in range(5):
            with pytest.raises(WorkerLostError):
                await scorer.score(chosen.backend.model, examples[:1])
        with pytest.raises(RejectedError, match="quantisation"):
            await scorer.score(chosen.backend.model, examples[:1])
    assert [cuts for *_, cuts in engine.tasks] == [0, 0, 1, 2, 3, 4, 5, 6]


async def test_one_bad_member_does_not_fail_its_batch(config: Callable[..., RunConfig]):
    chosen = config()
    async with LocalTrainer(LocalRun(chosen, ScriptedEngine())) as trainer:
        good = await submit(trainer, 0, model=chosen.backend.model)
        broken = await trainer.upload("b.jsonl", b'{"prompt": "a", "completion": "' + b"b" * 500 + b'"}\n')
        bad = await trainer.submit(
            JobRequest("bad", chosen.backend.model, broken, 1, HYPERPARAMETERS, "bad"),
        )
        done = await finished(trainer, good.id, bad.id)
    assert [j.status for j in done] == [JobStatus.SUCCEEDED, JobStatus.FAILED]
    assert done[1].error is not None
    assert "training file:1" in done[1].error
    assert "128" in done[1].error


async def test_perturbed_members_start_from_the_target(
    config: Callable[..., RunConfig], examples: list[EncodedExample]
):
    chosen = config(start_from="target", objective="influence", rho=5.0)
    engine = ScriptedEngine()
    run = LocalRun(chosen, engine)
    async with LocalTrainer(run) as trainer, LocalScorer(run) as scorer:
        target = await submit(trainer, 0, model=chosen.backend.model, positions=range(24))
        target_model = (await finished(trainer, target.id))[0].model
        assert target_model is not None
        jobs = [await submit(trainer, k, model=target_model, n_epochs=1) for k in (1, 2)]
        done = await finished(trainer, *(j.id for j in jobs))
        assert [t.objective.kind for t in engine.tasks] == ["subset", "influence"]
        losses = [
            [-np.mean(s.logprobs) for s in await scorer.score(str(m), examples)]
            for m in (target_model, *(j.model for j in done))
        ]
    spread = np.std(np.array(losses[1:]) - losses[0], axis=1)
    assert (spread > 1e-3).all()
    assert not np.allclose(losses[1], losses[2], atol=1e-4)


async def test_jobs_are_found_cancelled_and_deleted(config: Callable[..., RunConfig]):
    chosen = config()
    run = LocalRun(chosen, ScriptedEngine(asyncio.CancelledError()))
    async with LocalTrainer(run) as trainer:
        job = await submit(trainer, 0, model=chosen.backend.model)
        assert await trainer.find_job("run-m0-a1") == job
        assert await submit(trainer, 0, model=chosen.backend.model) == job
        assert await trainer.find_job("other") is None
        await running(trainer, job.id)
        assert (await trainer.cancel(job.id)).status is JobStatus.CANCELLED
    async with LocalTrainer(LocalRun(chosen, ScriptedEngine())) as trainer:
        assert (await trainer.get(job.id)).status is JobStatus.CANCELLED
        other = (await finished(trainer, (await submit(trainer, 1, model=chosen.backend.model)).id))[0]
        assert other.model is not None
        assert (await trainer.cancel(other.id)) == other
        content = DATA.training_file(range(1, 21), "last")
        file_id = await trainer.find_file("subset-1.jsonl", len(content))
        assert file_id is not None
        assert await trainer.delete_file(file_id)
        assert await trainer.find_file("subset-1.jsonl", len(content)) is None
        assert await trainer.delete_model(other.model)
        assert await trainer.delete_model(other.model)
        with pytest.raises(RejectedError, match=other.model):
            await trainer.model_info(other.model)


@pytest.mark.parametrize("name", ["../jobs", "/etc", "..", "job-1"])
async def test_unknown_models_and_files_are_refused(config: Callable[..., RunConfig], name: str):
    chosen = config()
    run = LocalRun(chosen, ScriptedEngine())
    async with LocalTrainer(run) as trainer, LocalScorer(run) as scorer:
        file_id = await trainer.upload("a.jsonl", DATA.training_file(range(20), "last"))
        with pytest.raises(RejectedError):
            await trainer.submit(JobRequest("k", name, file_id, 1, {}, "s"))
        with pytest.raises(RejectedError):
            await trainer.submit(JobRequest("k", chosen.backend.model, name, 1, {}, "s"))
        with pytest.raises(RejectedError):
            await scorer.score(name, [])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"epochs": 3}, "epochs"),
        ({"n_epochs": 0}, "n_epochs: Input"),
        ({"lora_rank": "many"}, "cannot be used"),
    ],
)
def test_hyperparameters_are_checked(given: dict[str, Any], problem: str):
    with pytest.raises(RejectedError, match=problem):
        settings_of(given, LoraSettings)


def test_hyperparameters_mean_what_they_mean_to_the_server():
    chosen = settings_of(
        {"n_epochs": "auto", "learning_rate_multiplier": 3, "lora_targets": "q_proj, v_proj"}, LoraSettings
    )
    assert (chosen.n_epochs, chosen.learning_rate, chosen.targets) == (3, pytest.approx(3e-3), ("q_proj", "v_proj"))


def test_options_are_checked(config: Callable[..., RunConfig]):
    with pytest.raises(ConfigurationError, match=r"start_from: target"):
        options_of(config(objective="influence"))
    with pytest.raises(ConfigurationError, match="did you mean dtype"):
        options_of(config(dtpe="float32"))
    with pytest.raises(ConfigurationError, match="gpus: 0 hides every GPU"):
        options_of(config(engine="ray", device="cuda", ray={"gpus": 0}))
    with pytest.raises(ConfigurationError, match="mps is not supported"):
        options_of(config(device="mps"))
    with pytest.raises(ConfigurationError, match="Use device: cuda"):
        options_of(config(engine="ray", device="cuda:1"))


@pytest.mark.parametrize(
    ("device", "given", "gpus"),
    [("cpu", {}, 0), ("cuda", {}, 1), ("cuda", {"gpus": 0.5}, 0.5), ("cpu", {"gpus": 2}, 2)],
)
async def test_a_task_on_ray_gets_the_gpu_that_its_device_needs(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, device: str, given: dict[str, float], gpus: float
):
    asked: list[float] = []
    monkeypatch.setattr("daunce_api.providers.local.backend.RayEngine", lambda **o: asked.append(o["gpus"]))
    assert await LocalRun(config(engine="ray", device=device, ray=given)).engine() is None
    assert asked == [gpus]


async def test_a_device_that_is_not_there_ends_the_run_before_anything_is_trained(config: Callable[..., RunConfig]):
    chosen = config(device="cuda:7")
    async with LocalTrainer(LocalRun(chosen, ScriptedEngine())) as trainer:
        with pytest.raises(RejectedError, match="'cuda:7' is not available; torch has: cpu"):
            await trainer.model_info(chosen.backend.model)
    with pytest.raises(ConfigurationError, match="nonsense is not supported"):
        LanguageModel.load(chosen.backend.model, device="nonsense")


async def test_members_are_trained_with_the_tokenizer_of_the_config(
    config: Callable[..., RunConfig], model: LanguageModel, tmp_path: Path
):
    # Another tokenizer of the same model: its letters have other ids.
    other = tmp_path / "tokenizer"
    shutil.copytree(model.tokenizer.folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] = {letter: 255 - i for letter, i in content["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(content))
    losses = []
    for name, given in (("own", None), ("other", str(other))):
        chosen = config(engine="thread")
        backend = chosen.backend.model_copy(update={"tokenizer": given})
        chosen = chosen.model_copy(update={"run_dir": tmp_path / name, "backend": backend})
        engine = ScriptedEngine()
        async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
            done = await finished(trainer, (await submit(trainer, 0, model=chosen.backend.model)).id)
            assert done[0].status is JobStatus.SUCCEEDED
        (task,) = engine.tasks
        trained = worker.read_examples(DATA.training_file(range(3), "last"), task.spec)
        scored = LocalRun(chosen).tokenizer()
        assert [e.ids for e in trained] == [encode_example(e, scored).ids for e in DATA[:3]]
        losses.append(trained[0].ids)
    assert losses[0] != losses[1]


async def test_the_registry_opens_it(config: Callable[..., RunConfig]):
    trainer, scorer = capabilities_of(config())
    assert scorer.scope == "any"
    assert scorer.max_context_tokens == 128
    assert trainer.listing_lag_seconds == 0
    async with open_backend(config(engine="thread")) as backend:
        assert open_tokenizer(config(engine="thread")).encode("a") == [64]
        assert isinstance(backend.scorer, LocalScorer)


@pytest.mark.slow
async def test_a_killed_worker_process_costs_nothing_but_time(config: Callable[..., RunConfig]):
    chosen = config(workers=1)
    engine = ProcessEngine(1)
    try:
        async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
            job = await submit(trainer, 0, model=chosen.backend.model, n_epochs=40)
            await running(trainer, job.id)

            async def started() -> bool:
                return engine._all[0]._process is not None

            await until(started)
            engine._all[0]._process.kill()
            done = await finished(trainer, job.id)
    finally:
        engine.close()
    assert done[0].status is JobStatus.SUCCEEDED
