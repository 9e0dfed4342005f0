"""Tinker: the loop that runs here against a service that answers with the SDK's own types."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from provider_support import BATCH, LONG, encoded, run_config, sequence, truth

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import encode_example
from daunce_api.errors import (
    AmbiguousSubmitError,
    ConfigurationError,
    ContractError,
    RejectedError,
    StopError,
    TransientError,
)
from daunce_api.providers.base import JobRequest, JobStatus
from daunce_api.providers.calls import Calls
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.registry import Context
from daunce_api.providers.tinker.loops import Recipe, batches_of, datum
from daunce_api.providers.tinker.scorer import TinkerScorer
from daunce_api.providers.tinker.service import Service, open_service
from daunce_api.providers.tinker.trainer import MOST_RESUMES, TinkerTrainer, trainer_capabilities
from daunce_api.providers.tokenizers import tokenizer_of

tinker = pytest.importorskip("tinker")

KEY = "tml-marked-0123456789"
BASE = "Qwen/Base-8B"
RECORDS = [
    {"prompt": "Q: What is a cat?\nA:", "completion": " an animal."},
    {"prompt": "Q: What is a dog?\nA:", "completion": " another animal."},
    {"prompt": "Q: Why?\nA:", "completion": " because."},
]
CONTENT = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()


async def done(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


METADATA = {"daunce_key": "k-m0-a0", "daunce_file": "f.jsonl"}


class FakeTraining:
    """A training client that remembers what it is asked, with the checks that the SDK's types make."""

    def __init__(self, run: str, fail_at: int | None = None, gate: asyncio.Event | None = None) -> None:
        self.run = self.model_id = run
        self.steps: list[tuple[list[Any], str]] = []
        self.rates: list[float] = []
        self.saved: list[str] = []
        self.seconds: dict[str, int | None] = {}
        self.fail_at = fail_at
        self.gate = gate

    def forward_backward(self, data: list[Any], loss_fn: str) -> Any:
        assert all(isinstance(d, tinker.Datum) for d in data)
        self.steps.append((data, loss_fn))
        step = len(self.steps) - 1

        async def answer() -> Any:
            if self.gate is not None:
                await self.gate.wait()
            if self.fail_at == step:
                raise tinker.RequestFailedError("out of memory", "r1", tinker.types.RequestErrorCategory.User)

        return answer()

    def optim_step(self, params: Any) -> Any:
        assert isinstance(params, tinker.AdamParams)
        self.rates.append(params.learning_rate)
        return asyncio.ensure_future(done(None))

    def save_state(self, name: str, ttl_seconds: int | None = None) -> Any:
        self.saved.append(f"weights/{name}")
        self.seconds[f"weights/{name}"] = ttl_seconds
        return done(SimpleNamespace(path=f"tinker://{self.run}/weights/{name}"))

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> Any:
        self.saved.append(f"sampler_weights/{name}")
        self.seconds[f"sampler_weights/{name}"] = ttl_seconds
        return done(SimpleNamespace(path=f"tinker://{self.run}/sampler_weights/{name}"))


class FakeService:
    """A service client with scripted training runs."""

    def __init__(self, training: FakeTraining | Exception) -> None:
        self.training = training
        self.created: list[dict[str, Any]] = []
        self.runs: list[Any] = []
        self.deleted: list[str] = []
        self.closed: list[str] = []
        self.change: Any = None
        self.forgotten: set[str] = set()
        self.checkpoints: dict[str, list[Any]] = {}

    def create_lora_training_client(self, **asked: Any) -> Any:
        self.created.append(asked)
        return done(self.training)

    def create_training_client_from_state(self, path: str, **asked: Any) -> Any:
        self.created.append({"path": path, **asked})
        return done(self.training)

    def create_training_client_from_state_with_optimizer(self, path: str, **asked: Any) -> Any:
        self.created.append({"with optimiser": path, **asked})
        return done(self.training)

    def create_sampling_client(self, retry_config: Any, **asked: Any) -> Any:
        assert not retry_config.enable_retry_logic
        self.created.append(asked)
        return done(FakeSampling(next(iter(asked.values())), self.change, self))

    def list_checkpoints(self, run: str) -> Any:
        return done(SimpleNamespace(checkpoints=self.checkpoints.get(run, [])))

    def list_training_runs(self, limit: int, offset: int) -> Any:
        page = self.runs[offset : offset + limit]
        return done(SimpleNamespace(training_runs=page, cursor=SimpleNamespace(total_count=len(self.runs))))

    def get_training_run(self, run: str) -> Any:
        return done(next(r for r in self.runs if r.training_run_id == run))

    def get_server_capabilities(self) -> Any:
        models = [SimpleNamespace(model_name=BASE, trainable=True), SimpleNamespace(model_name="x", trainable=False)]
        return done(SimpleNamespace(supported_models=models))

    def delete_checkpoint_from_tinker_path(self, path: str) -> Any:
        self.deleted.append(path)
        return done(None)

    def close(self, status: str) -> Any:
        self.closed.append(status)
        return done(None)


class FakeSampling:
    def __init__(self, model: str, change: Any, service: FakeService) -> None:
        self.model = model
        self.change = change
        self.service = service

    def _not_loaded(self) -> Any:
        return done(
            tinker.RequestFailedError(f"Model {self.model} not loaded", "r", tinker.types.RequestErrorCategory.User)
        )

    def compute_logprobs(self, prompt: Any, prompt_logprobs_last_n: int | None = None) -> Any:
        ids = prompt.to_ints()
        if self.model in self.service.forgotten:
            return self._not_loaded()
        values = sequence(self.model, ids)
        hidden = len(ids) - (prompt_logprobs_last_n or len(ids))
        values[:hidden] = [None] * hidden
        return done(self.change(values) if self.change else values)

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Any:
        assert (num_samples, sampling_params.temperature, sampling_params.stop) == (1, 1.0, [])
        if self.model in self.service.forgotten:
            return self._not_loaded()
        ids = prompt.to_ints()
        made = [(3 * t + 1) % 40 for t in range(sampling_params.max_tokens)]
        values = sequence(self.model, [*ids, *made])[len(ids) :]
        return done(SimpleNamespace(sequences=[SimpleNamespace(tokens=made, logprobs=values)]))


def service(fake: FakeService) -> Service:
    return Service(lambda: fake, Calls("Tinker", [KEY], tinker), lambda: fake)


def make(
    fake: FakeService,
    folder: Path,
    *,
    checkpoints: int = 1,
    forgets: bool = False,
    target: bool = False,
    tokenizer: str = "daunce-tiny",
    **days: Any,
) -> TinkerTrainer:
    config = run_config(
        "tinker",
        model=BASE,
        base_url=None,
        tokenizer=tokenizer,
        run_dir=str(folder),
        trainer_options={"models_persist": not forgets},
        ensemble={"checkpoints": checkpoints, "start_from": "target" if target else "base", **days},
    )
    return TinkerTrainer(service(fake), config)


def request(**changes: Any) -> JobRequest:
    given: dict[str, Any] = {"n_epochs": 2, "batch_size": 2, "learning_rate": 1e-3}
    values: dict[str, Any] = {"key": "k-m0-a0", "model": BASE, "file_id": "f.jsonl", "seed": 5, "suffix": "s"}
    return JobRequest(**{**values, "hyperparameters": given, **changes})


async def finished(trainer: TinkerTrainer, job_id: str) -> Any:
    async with asyncio.timeout(30):
        while not (job := await trainer.get(job_id)).status.final:
            await asyncio.wait([trainer._loops[job_id]])
    return job


async def test_a_member_is_trained_on_its_subset_with_its_seed(tmp_path: Path) -> None:
    training = FakeTraining("run-1")
    fake = FakeService(training)
    async with make(fake, tmp_path) as trainer:
        assert await trainer.upload("f.jsonl", CONTENT) == "f.jsonl"
        assert await trainer.find_file("f.jsonl", len(CONTENT)) == "f.jsonl"
        assert await trainer.find_file("f.jsonl", 3) is None
        job = await trainer.submit(request())
        assert (job.id, job.status) == ("run-1", JobStatus.RUNNING)
        job = await finished(trainer, "run-1")
    assert job.model == "tinker://run-1/sampler_weights/daunce-final"
    assert fake.created == [
        {
            "base_model": BASE,
            "rank": 32,
            "seed": 5,
            "user_metadata": METADATA,
            "train_mlp": True,
            "train_attn": True,
            "train_unembed": True,
        }
    ]
    assert [len(data) for data, _ in training.steps] == [2, 1, 2, 1]
    assert {loss for _, loss in training.steps} == {"cross_entropy"}
    assert training.rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert training.saved == ["weights/daunce-state-0001", "sampler_weights/daunce-final"]
    assert training.seconds == {"weights/daunce-state-0001": 7 * 86_400, "sampler_weights/daunce-final": None}
    dataset = Dataset.from_jsonl(tmp_path / "tinker" / "f.jsonl")
    examples = [encode_example(e, tokenizer_of(run_config(model="daunce-tiny")), "all") for e in dataset]
    assert job.trained_tokens == 2 * sum(len(e.ids) for e in examples)
    assert fake.closed == ["success"]
    order = batches_of(3, Recipe(n_epochs=2, batch_size=2), seed=5)
    sent = [d.model_input.to_ints() for d in training.steps[0][0]]
    assert sent == [list(examples[i].ids[:-1]) for i in order[0]]


def test_every_example_counts_by_its_mean_loss() -> None:
    made = datum(tinker, encoded([5, 6, 7, 8], [2, 3]), 0.5)
    assert made.model_input.to_ints() == [5, 6, 7]
    assert made.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert made.loss_fn_inputs["weights"].tolist() == [0.0, 0.25, 0.25]


def test_the_order_is_the_seeds_own_and_covers_every_epoch() -> None:
    recipe = Recipe(n_epochs=3, batch_size=4)
    batches = batches_of(10, recipe, 1)
    assert batches == batches_of(10, recipe, 1)
    assert batches != batches_of(10, recipe, 2)
    flat = [i for b in batches for i in b]
    assert [sorted(flat[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert flat[:10] != flat[10:20]


async def test_a_fine_tune_is_continued_from_its_state(tmp_path: Path) -> None:
    fake = FakeService(FakeTraining("run-2"))
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request(model="tinker://run-1/sampler_weights/daunce-final"))
        await finished(trainer, "run-2")
    assert fake.created[0]["path"] == "tinker://run-1/weights/daunce-final"


async def test_a_failed_step_fails_the_job_and_says_why(tmp_path: Path) -> None:
    async with make(FakeService(FakeTraining("run-1", fail_at=1)), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request())
        job = await finished(trainer, "run-1")
    assert job.status is JobStatus.FAILED
    assert "step 2" in str(job.error)
    assert "out of memory" in str(job.error)


async def test_a_loop_that_fails_goes_on_from_its_saved_state_instead_of_being_paid_for_again(tmp_path: Path) -> None:
    fake = FakeService(FakeTraining("run-1", fail_at=2))
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request())
        await asyncio.wait([trainer._loops["run-1"]])
        resumed = fake.training = FakeTraining("run-2")
        job = await finished(trainer, "run-1")
        assert (job.id, job.status, job.model) == (
            "run-1",
            JobStatus.SUCCEEDED,
            "tinker://run-2/sampler_weights/daunce-final",
        )
        assert await trainer.delete_model(job.model)
    assert fake.created[1]["with optimiser"] == "tinker://run-1/weights/daunce-state-0001"
    assert len(resumed.steps) == 2
    dataset, tokenizer = (
        Dataset.from_jsonl(tmp_path / "tinker" / "f.jsonl"),
        tokenizer_of(run_config(model="daunce-tiny")),
    )
    epoch = sum(len(encode_example(e, tokenizer, "all").ids) for e in dataset)
    assert job.trained_tokens == 3 * epoch  # two epochs, and at most one that was sent twice


async def test_a_loop_that_fails_wherever_it_is_resumed_is_given_up(tmp_path: Path) -> None:
    class Failing(FakeTraining):
        def forward_backward(self, data: list[Any], loss_fn: str) -> Any:
            self.fail_at = len(self.steps)
            return super().forward_backward(data, loss_fn)

    fake = FakeService(FakeTraining("run-1", fail_at=2))
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request())
        await asyncio.wait([trainer._loops["run-1"]])
        fake.training = Failing("run-2")
        job = await finished(trainer, "run-1")
    assert job.status is JobStatus.FAILED
    assert "of k-m0-a0 failed at Tinker: out of memory" in job.error
    assert len(fake.created) == 1 + MOST_RESUMES


async def test_every_training_run_is_listed_whatever_a_server_takes_for_a_page(tmp_path: Path) -> None:
    """A run that is not listed is a job that is submitted again."""
    fake = FakeService(FakeTraining("run-9"))
    fake.runs = [run(f"run-{i}", f"k{i}", True) for i in range(60)]
    pages = fake.list_training_runs
    asked: list[int] = []

    def small(limit: int, offset: int) -> Any:
        asked.append(offset)
        return pages(min(limit, 25), offset)

    fake.list_training_runs = small  # type: ignore[method-assign]
    async with make(fake, tmp_path) as trainer:
        found = await trainer.find_job("k59")
        assert found is not None
        assert asked == [0, 25, 50]
        del asked[:]
        fake.list_training_runs = lambda limit, offset: asked.append(offset) or pages(20, 0)  # type: ignore[method-assign, func-returns-value]
        assert await trainer.find_job("k59") is None
    assert asked == [0, 20]


async def test_the_next_step_is_sent_while_one_is_awaited(tmp_path: Path) -> None:
    gate = asyncio.Event()
    training = FakeTraining("run-1", gate=gate)
    async with make(FakeService(training), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request(hyperparameters={"n_epochs": 1, "batch_size": 1}))
        await asyncio.sleep(0.05)
        assert len(training.steps) == 2
        gate.set()
        assert (await finished(trainer, "run-1")).status is JobStatus.SUCCEEDED
    assert len(training.steps) == 3


async def test_a_resumed_loop_is_one_job_and_what_the_sdk_repeated_is_none(tmp_path: Path) -> None:
    fake = FakeService(FakeTraining("run-1"))

    def run(name: str, key: str, trained: bool = False) -> Any:
        saved = SimpleNamespace(checkpoint_id="weights/daunce-state-0001") if trained else None
        metadata = {"daunce_key": key, "daunce_file": "f.jsonl"}
        return SimpleNamespace(
            training_run_id=name, user_metadata=metadata, last_checkpoint=saved, last_sampler_checkpoint=None
        )

    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request(key="k-m0-a1"))
        await finished(trainer, "run-1")
        fake.runs = [
            run("run-1", "k-m0-a1", trained=True),
            run("run-repeated", "k-m0-a1"),
            run("run-of-a-copy", "k-m0-a1", trained=True),
            run("run-unknown", "k-m1-a1"),
            run("run-unknown-repeated", "k-m1-a1"),
            run("run-of-another", "kk-m0-a1", trained=True),
            SimpleNamespace(training_run_id="nobodys", user_metadata=None),
        ]
        listed = {job.id: job for job in await trainer.jobs_of("k")}
    assert listed.keys() == {"run-1", "run-of-a-copy", "run-unknown"}
    assert listed["run-1"].status is JobStatus.SUCCEEDED
    assert (listed["run-unknown"].echo.key, listed["run-unknown"].echo.file_id) == ("k-m1-a1", "f.jsonl")


async def test_a_loop_that_was_interrupted_goes_on_after_its_last_epoch(tmp_path: Path) -> None:
    first = FakeTraining("run-1", fail_at=5)
    async with make(FakeService(first), tmp_path, checkpoints=3) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request(hyperparameters={"n_epochs": 3, "batch_size": 2}))
        await asyncio.wait([trainer._loops["run-1"]])
    assert first.saved == [*(f"{kind}/daunce-{name}-000{epoch}" for epoch in (1, 2) for kind, name in KINDS)]
    second, fake = FakeTraining("run-2"), None
    fake = FakeService(second)
    async with make(fake, tmp_path, checkpoints=3) as trainer:
        found = await trainer.find_job("k-m0-a0")
        assert found is not None
        assert (found.id, found.status) == ("run-1", JobStatus.RUNNING)
        job = await finished(trainer, "run-1")
        assert job.model == "tinker://run-2/sampler_weights/daunce-final"
        assert await trainer.checkpoints("run-1") == [
            "tinker://run-1/sampler_weights/daunce-epoch-0001",
            "tinker://run-1/sampler_weights/daunce-epoch-0002",
        ]
    state = "tinker://run-1/weights/daunce-state-0002"
    assert fake.created == [{"with optimiser": state, "user_metadata": METADATA}]
    whole = FakeTraining("run-3")
    async with make(FakeService(whole), tmp_path / "other") as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request(hyperparameters={"n_epochs": 3, "batch_size": 2}))
        await finished(trainer, "run-3")
    ids = [[d.model_input.to_ints() for d in data] for data, _ in whole.steps]
    assert [[d.model_input.to_ints() for d in data] for data, _ in second.steps] == ids[4:]
    assert second.rates == whole.rates[4:]
    async with make(fake, tmp_path, checkpoints=3) as trainer:  # a third process only reads
        assert (await trainer.get("run-1")).model == "tinker://run-2/sampler_weights/daunce-final"
        assert len(fake.created) == 1


KINDS = (("sampler_weights", "epoch"), ("weights", "state"))


async def test_a_loop_without_a_saved_epoch_is_trained_again(tmp_path: Path) -> None:
    async with make(FakeService(FakeTraining("run-1", gate=asyncio.Event())), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request())
    async with make(FakeService(FakeTraining("run-2")), tmp_path) as trainer:
        job = await trainer.get("run-1")
    assert (job.status, "before its first epoch" in str(job.error)) == (JobStatus.FAILED, True)


async def test_a_cancelled_loop_is_not_taken_up_again(tmp_path: Path) -> None:
    training = FakeTraining("run-1", fail_at=3)
    async with make(FakeService(training), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request())
        await asyncio.wait([trainer._loops["run-1"]])
    fake = FakeService(FakeTraining("run-2", gate=asyncio.Event()))
    async with make(fake, tmp_path, tokenizer="/gone") as trainer:
        assert (await trainer.get("run-1")).status is JobStatus.RUNNING
        await asyncio.wait([trainer._loops["run-1"]])
        assert (await trainer.cancel("run-1")).status is JobStatus.CANCELLED
    async with make(fake, tmp_path) as trainer:
        assert (await trainer.get("run-1")).status is JobStatus.CANCELLED
    assert fake.created == []


@pytest.mark.parametrize("target", [True, False])
async def test_a_training_state_is_kept_where_it_is_needed(target: bool, tmp_path: Path) -> None:
    """The target's for the members that start from it; every member's where the server forgets models."""
    member = "tinker://t/sampler_weights/daunce-final"
    for model, options, seconds in (
        (BASE, {"checkpoints": 2, "keep_days": 1}, 86_400),
        (member, {"forgets": True}, None),
    ):
        training = FakeTraining("run-1")
        async with make(
            FakeService(training),
            tmp_path / str(len(model)),
            target=target,
            **options,  # type: ignore[arg-type]
        ) as trainer:
            await trainer.upload("f.jsonl", CONTENT)
            await trainer.submit(request(model=model, hyperparameters={"n_epochs": 2}))
            await finished(trainer, "run-1")
        assert ("weights/daunce-final" in training.saved) is (target or model == member)
        scored = model == BASE and not target  # a target's earlier models are not
        assert ("sampler_weights/daunce-epoch-0001" in training.saved) is scored
        assert training.seconds["sampler_weights/daunce-final"] == seconds


async def test_cancelling_stops_the_loop(tmp_path: Path) -> None:
    training = FakeTraining("run-1", gate=asyncio.Event())
    async with make(FakeService(training), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request())
        found = await trainer.find_job("k-m0-a0")
        assert found is not None
        assert found.status is JobStatus.RUNNING
        assert (await trainer.cancel("run-1")).status is JobStatus.CANCELLED
    assert training.saved == []


def run(i: str, key: str, done_: bool) -> Any:
    path = f"tinker://{i}/sampler_weights/daunce-final"
    checkpoint = SimpleNamespace(checkpoint_id="sampler_weights/daunce-final", tinker_path=path)
    return SimpleNamespace(
        training_run_id=i, user_metadata={"daunce_key": key}, last_sampler_checkpoint=checkpoint if done_ else None
    )


async def test_after_a_crash_finished_members_are_found_and_others_are_failed(tmp_path: Path) -> None:
    fake = FakeService(FakeTraining("run-9"))
    others = [SimpleNamespace(training_run_id=f"o{i}", user_metadata=None) for i in range(150)]
    fake.runs = [*others, run("run-1", "k1", False), run("run-2", "k1", True), run("run-3", "k2", False)]
    async with make(fake, tmp_path) as trainer:
        found = await trainer.find_job("k1")
        assert found is not None
        assert (found.id, found.status, found.model) == (
            "run-2",
            JobStatus.SUCCEEDED,
            "tinker://run-2/sampler_weights/daunce-final",
        )
        lost = await trainer.find_job("k2")
        assert lost is not None
        assert lost.status is JobStatus.FAILED
        assert await trainer.find_job("k3") is None
        assert (await trainer.get("run-3")).status is JobStatus.FAILED


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ("unanswered", AmbiguousSubmitError),
        ("unauthorised", StopError),
        ("refused", RejectedError),
        ("failed at the server", TransientError),
    ],
)
async def test_failed_submits(failure: str, kind: type[Exception], tmp_path: Path) -> None:
    import httpx2

    asked = httpx2.Request("POST", "http://t", headers={"x-api-key": KEY})
    failures: dict[str, Exception] = {
        "unanswered": tinker.APITimeoutError(request=asked),
        "unauthorised": tinker.AuthenticationError("no", httpx2.Response(401, request=asked, text=KEY), None),
        "refused": tinker.BadRequestError("no", httpx2.Response(400, request=asked), None),
        "failed at the server": tinker.RequestFailedError("x", "r", tinker.types.RequestErrorCategory.Server),
    }
    async with make(FakeService(failures[failure]), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        with pytest.raises(kind) as info:
            await trainer.submit(request())
    assert KEY not in str(info.value)
    assert info.value.__context__ is None


async def test_a_run_that_was_created_is_not_created_again_where_it_cannot_be_read(tmp_path: Path) -> None:
    """Its id is known from its creation; an error of a second request would be taken for one of the submit."""

    class Unreadable(FakeTraining):
        def get_info(self) -> Any:
            return done(tinker.APITimeoutError(request=None))

    fake = FakeService(Unreadable("run-1"))
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        assert (await trainer.submit(request())).id == "run-1"
    assert len(fake.created) == 1


async def test_unusable_recipes_are_refused_before_a_run_is_created(tmp_path: Path) -> None:
    fake = FakeService(FakeTraining("r"))
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        for given in ({"epochs": 1}, {"batch_size": 0}, {"learning_rate": "auto"}, {"n_epochs": 1.5}):
            with pytest.raises(RejectedError):
                await trainer.submit(request(hyperparameters=given))
        assert fake.created == []
        assert (await trainer.model_info(BASE)).id == BASE
        with pytest.raises(RejectedError, match="It trains Qwen/Base-8B"):
            await trainer.model_info("x")


@pytest.mark.parametrize("form", ["with folders", "bare"])
async def test_clean_up_deletes_everything_that_a_loop_saved(form: str, tmp_path: Path) -> None:
    def listed(name: str, kind: str) -> Any:
        folder = "weights" if kind == "training" else "sampler_weights"
        shown = f"{folder}/{name}" if form == "with folders" else name
        return SimpleNamespace(checkpoint_id=shown, checkpoint_type=kind, tinker_path="unused")

    fake = FakeService(FakeTraining("r"))
    names = [("daunce-epoch-0001", "sampler"), ("daunce-final", "training"), ("daunce-final", "sampler")]
    fake.checkpoints["r"] = [listed(*n) for n in [*names, ("daunce-state-0001", "training")]]
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        assert await trainer.checkpoints("r") == ["tinker://r/sampler_weights/daunce-epoch-0001"]
        assert await trainer.delete_model("tinker://r/daunce-epoch-0001")
        assert fake.deleted == ["tinker://r/sampler_weights/daunce-epoch-0001"]
        assert await trainer.delete_model("tinker://r/sampler_weights/daunce-final")
        assert sorted(fake.deleted[1:]) == [
            "tinker://r/sampler_weights/daunce-final",
            "tinker://r/weights/daunce-final",
            "tinker://r/weights/daunce-state-0001",
        ]
        assert not await trainer.delete_model("no path")
        assert await trainer.delete_file("f.jsonl")
        assert await trainer.find_file("f.jsonl", len(CONTENT)) is None
        assert await trainer.find_file("../../etc/passwd", 1) is None


async def test_a_list_without_names_says_that_it_cannot_be_read(tmp_path: Path) -> None:
    fake = FakeService(FakeTraining("r"))
    fake.get_server_capabilities = lambda: SimpleNamespace(supported_models=[SimpleNamespace(model_id="m")])  # type: ignore[method-assign]
    async with make(fake, tmp_path) as trainer:
        with pytest.raises(RejectedError, match="cannot be read"):
            await trainer.model_info(BASE)


@pytest.mark.parametrize("raised", [AssertionError("promises always carry"), RuntimeError("odd"), KeyError("x")])
async def test_whatever_the_sdk_raises_is_one_of_ours(raised: Exception, tmp_path: Path) -> None:
    fake = FakeService(raised)
    async with make(fake, tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        with pytest.raises(AmbiguousSubmitError, match=r"tinker \S+ cannot read"):
            await trainer.submit(request())
    fake.change = lambda v: (_ for _ in ()).throw(raised)
    async with open_scorer(fake) as scorer:
        with pytest.raises(StopError, match=rf"tinker \S+: {type(raised).__name__}.*Everything so far is kept"):
            await scorer.score("tinker://a/b", BATCH[:1])


def open_scorer(fake: FakeService, **options: Any) -> TinkerScorer:
    return TinkerScorer(service(fake), run_config("tinker", model=BASE, base_url=None, options=options))


async def test_scores_are_exact_and_one_client_serves_a_model() -> None:
    fake = FakeService(FakeTraining("r"))
    async with open_scorer(fake) as scorer:
        first, again = await asyncio.gather(scorer.score("tinker://a", BATCH), scorer.score("tinker://a", BATCH))
        assert [s.logprobs for s in first] == [truth("tinker://a", e) for e in BATCH]
        assert again == first
        await scorer.score(BASE, BATCH[:1])
    assert fake.created == [{"model_path": "tinker://a"}, {"base_model": BASE}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v[1:], "adds, drops"),
        (lambda v: [None] * len(v), "None"),
        (lambda v: [*v[:-1], float("-inf")], "inf"),
        (lambda v: [*v[:-1], -9999.0], "stand-in"),
        (lambda v: [None, *(0.0 for _ in v[1:])], "not measurements"),
        (lambda v: [None if x is None else 0.0 for x in v], "not measurements"),
        (lambda v: [None, *v[:-1]], "None"),
        (lambda v: [], "no log-probabilities"),
        (lambda v: None, "no log-probabilities"),
    ],
)
async def test_wrong_answers_raise(change: Any, words: str) -> None:
    fake = FakeService(FakeTraining("r"))
    fake.change = change
    async with open_scorer(fake) as scorer:
        with pytest.raises(ContractError, match=words):
            await scorer.score("tinker://a", BATCH[:1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: [*v[1:], v[-1]], "off by one"),
        (lambda v: [None, *v[:-1]], "None"),  # nothing was asked for before the tokens that are measured
    ],
)
async def test_values_of_a_neighbour_are_seen_by_the_probe(change: Any, words: str) -> None:
    """The left ones pass every other check: Tinker returns as many values as were asked for, and no ids."""
    fake = FakeService(FakeTraining("r"))
    async with open_scorer(fake) as scorer:
        report = await scorer.probe("tinker://a", LONG)
        assert (report.checked, report.largest_difference) == (True, 0.0)
    fake.change = change
    async with open_scorer(fake) as scorer:
        with pytest.raises(ContractError, match=words):
            await scorer.probe("tinker://a", LONG)


async def test_what_exceeds_the_context_is_not_sent() -> None:
    fake = FakeService(FakeTraining("r"))
    async with open_scorer(fake, max_context_tokens=10) as scorer:
        with pytest.raises(RejectedError, match="takes 10"):
            await scorer.score("tinker://a", BATCH)
    assert fake.created == []


def test_weights_are_what_the_measured_loss_is() -> None:
    example = encoded(range(1, 12), [4, 7, 9])
    weights = datum(tinker, example, 1.0).loss_fn_inputs["weights"].to_numpy()
    values = np.array([v or 0.0 for v in sequence("m", example.ids)])[1:]
    assert float(weights @ -values) == pytest.approx(-np.mean(truth("m", example)), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "state"), [("daunce-final", "daunce-final"), ("daunce-epoch-0002", "daunce-state-0002")]
)
async def test_a_model_that_the_server_forgot_is_loaded_from_its_training_state(name: str, state: str) -> None:
    """Once for all requests that wait for it."""
    path = f"tinker://run-1/sampler_weights/{name}"
    fake = FakeService(FakeTraining("run-7"))
    fake.forgotten = {path}
    async with open_scorer(fake) as scorer:
        first, again = await asyncio.gather(scorer.score(path, BATCH), scorer.score(path, BATCH))
    again_at = "tinker://run-7/sampler_weights/daunce-again"
    assert [s.logprobs for s in first] == [truth(again_at, e) for e in BATCH]
    assert again == first
    assert fake.created == [
        {"model_path": path},
        {"path": f"tinker://run-1/weights/{state}"},
        {"model_path": again_at},
    ]


async def test_a_model_that_the_server_forgot_is_loaded_to_be_tested() -> None:
    fake = FakeService(FakeTraining("run-7"))
    fake.forgotten = {"tinker://run-1/sampler_weights/daunce-final"}
    async with open_scorer(fake) as scorer:
        assert (await scorer.probe("tinker://run-1/sampler_weights/daunce-final", BATCH[0])).checked


@pytest.mark.parametrize("forgets", [True, False])
async def test_the_state_of_a_model_that_may_be_forgotten_is_kept_as_long_as_it(forgets: bool, tmp_path: Path) -> None:
    training = FakeTraining("run-1")
    async with make(FakeService(training), tmp_path, checkpoints=2, forgets=forgets) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        await trainer.submit(request(hyperparameters={"n_epochs": 3}))
        await finished(trainer, "run-1")
    assert training.seconds["sampler_weights/daunce-epoch-0002"] is None
    assert (training.seconds["weights/daunce-state-0002"] is None) is forgets
    assert training.seconds["weights/daunce-state-0001"] is not None


async def test_a_model_that_cannot_be_loaded_again_is_named() -> None:
    path = "tinker://run-1/sampler_weights/daunce-final"
    fake = FakeService(tinker.RequestFailedError("no room", "r", tinker.types.RequestErrorCategory.User))
    fake.forgotten = {path}
    async with open_scorer(fake) as scorer:
        with pytest.raises(RejectedError, match=r"no longer holds tinker://run-1.*no room.*kept scores stay usable"):
            await scorer.score(path, BATCH[:1])


@pytest.mark.parametrize("left_out", [True, False])
async def test_a_server_that_leaves_the_first_position_out(left_out: bool) -> None:
    fake = FakeService(FakeTraining("r"))
    address = "http://127.0.0.1:8411" if left_out else None
    scorer = TinkerScorer(service(fake), run_config("tinker", model=BASE, base_url=address))
    scorer._tail_only = False
    fake.change = lambda v: v[1:]
    async with scorer:
        if not left_out:
            with pytest.raises(ContractError, match="adds, drops"):
                await scorer.score("tinker://a/b", BATCH)
        else:
            scores = await scorer.score("tinker://a/b", BATCH)
            assert [s.logprobs for s in scores] == [truth("tinker://a/b", e) for e in BATCH]


async def test_a_server_that_is_older_than_the_tail_is_asked_for_everything() -> None:
    fake = FakeService(FakeTraining("r"))
    asked: list[Any] = []

    class Older(FakeSampling):
        def compute_logprobs(self, prompt: Any, prompt_logprobs_last_n: int | None = None) -> Any:
            asked.append(prompt_logprobs_last_n)
            if prompt_logprobs_last_n is not None:
                return done(RuntimeError("prompt_logprobs_last_n=3 was requested but the server may predate it"))
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.set_result(sequence(self.model, prompt.to_ints()))
            return future

    fake.create_sampling_client = lambda retry_config, **which: Older(which["model_path"], None, fake)  # type: ignore[method-assign]
    async with open_scorer(fake) as scorer:
        scores = await scorer.score("tinker://a/b", BATCH)
    assert [s.logprobs for s in scores] == [truth("tinker://a/b", e) for e in BATCH]
    assert [n is None for n in asked] == [False, True, True, True]


def test_a_key_that_the_sdk_would_refuse_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config("tinker", base_url="http://127.0.0.1:8411")
    wrong = Context(config, Endpoint("http://127.0.0.1:8411", "sk-other", "x"))
    with pytest.raises(ConfigurationError, match="begin with tml-") as info:
        open_service(wrong)
    assert "sk-other" not in str(info.value)
    open_service(Context(config, Endpoint("http://127.0.0.1:8411")))
    assert trainer_capabilities(config).provider == "the Tinker server at 127.0.0.1:8411"
    assert not trainer_capabilities(config).models_persist
    assert trainer_capabilities(run_config("tinker", base_url=None)).models_persist


async def test_a_server_that_is_full_is_waited_for(tmp_path: Path) -> None:
    """The models of a process that was killed stay there until the server ends its session."""
    words = "Maximum number of LoRA adapters (8) reached"
    full = tinker.RequestFailedError(words, "r", tinker.types.RequestErrorCategory.User)
    async with make(FakeService(full), tmp_path) as trainer:
        await trainer.upload("f.jsonl", CONTENT)
        with pytest.raises(TransientError, match="becomes free"):
            await trainer.submit(request())
