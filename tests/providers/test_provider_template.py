"""What every trainer has to hold, whatever its provider's wire looks like: a template for a new provider's test.

A provider takes part with one line in ``PROVIDERS``: a function that gives a trainer on a stub that answers over HTTP,
and the stub's switch that loses the answer to the next submit. The stub acts on a request before its answer is lost, as
networks do. ``embedded`` is the server itself behind a proxy. At ``tinker`` and ``local`` no submit is lost: Tinker's
SDK repeats the creation of a training run, which costs nothing, and the local trainer works in this process.
"""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import pytest
import yaml
from http_stub import serving
from provider_support import KEY as WIRE_KEY
from provider_support import run_config
from sdk_support import KEY, Service, httpx

from daunce_api._util.clock import InstantClock
from daunce_api.config import RunConfig
from daunce_api.errors import AmbiguousSubmitError, RejectedError, StopError, UnknownJobsError
from daunce_api.plan.planning import trainer_refusals
from daunce_api.providers import azure, embedded, nebius
from daunce_api.providers.base import JobRequest, JobStatus, Listing, Trainer
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.identity import contradiction
from daunce_api.providers.openai_wire import trainer as openai_wire
from daunce_api.providers.registry import BACKENDS, Context, capabilities_of, open_backend
from daunce_api.providers.tokenizers import embedded_folder
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore
from daunce_api.train import JobClient, cancel_jobs
from daunce_api.train.audit import check
from tests.reliability.proxy import Proxy, Sent

BASE = "org/Base-8B"
CONTENT = "".join(
    json.dumps({"prompt": f"Q: What is {i}?\nA:", "completion": f" number {i}."}) + "\n" for i in range(10)
).encode()


@dataclass
class Stub:
    """A trainer on a stub of its provider. ``lose`` has the answer to the next submit lost (None: nothing can be lost);
    ``submits`` counts them. ``recipe``: hyperparameters of a job that does not end while it is looked at."""

    trainer: Trainer
    lose: Callable[[], None] | None
    submits: Callable[[], int]
    model: str = BASE
    file: str = "file-1"
    recipe: dict[str, Any] | None = None


class WireJobs:
    """OpenAI's jobs in memory; ``metadata``: whether they are kept."""

    def __init__(self, *, metadata: bool) -> None:
        self.metadata = metadata
        self.jobs: dict[str, dict[str, Any]] = {}
        self.lost = False

    def __call__(self, request: httpx2.Request) -> Any:
        path = request.url.path.removeprefix("/openai").removeprefix("/v1")
        if path == "/fine_tuning/jobs" and request.method == "POST":
            body = json.loads(request.content)
            job = {"id": f"ftjob-{len(self.jobs)}", "object": "fine_tuning.job", "status": "running", "created_at": 1}
            job |= body if self.metadata else {k: v for k, v in body.items() if k != "metadata"}
            self.jobs[job["id"]] = job
            if self.lost:
                self.lost = False
                raise httpx2.ReadTimeout("lost")
            return job
        if path == "/fine_tuning/jobs":
            return {"object": "list", "data": list(self.jobs.values()), "has_more": False}
        if path.startswith("/fine_tuning/jobs/"):
            job_id, _, action = path.removeprefix("/fine_tuning/jobs/").partition("/")
            if job_id not in self.jobs:
                return httpx2.Response(404, json={"error": {"message": f"no job {WIRE_KEY}"}})
            if action == "cancel":
                self.jobs[job_id]["status"] = "cancelled"
            return self.jobs[job_id]
        return httpx2.Response(404, json={"error": {"message": f"no route {path} {WIRE_KEY}"}})


def wire(stack: ExitStack, kind: str, open_trainer: Callable[..., Trainer], *, metadata: bool) -> Stub:
    jobs = WireJobs(metadata=metadata)
    url = stack.enter_context(serving(jobs))
    trainer = open_trainer(Context(run_config(kind, model=BASE), Endpoint(f"{url}/v1", WIRE_KEY, "the server")))
    return Stub(trainer, lambda: setattr(jobs, "lost", True), lambda: len(jobs.jobs))


def together(stack: ExitStack) -> Stub:
    pytest.importorskip("together")
    import test_provider_together as given

    from daunce_api.providers.together import trainer as kind

    jobs: list[dict[str, Any]] = []
    lost: list[bool] = []

    def submit(request: Any) -> Any:
        body = json.loads(request.content)
        kept = {name: body[name] for name in ("suffix", "training_file", "random_seed")}
        jobs.append(given.job(id=f"ft-{len(jobs)}", status="running", **kept))
        if lost:
            lost.clear()
            return httpx.ReadTimeout("lost")
        return jobs[-1]

    def one(request: Any) -> Any:
        job_id = request.url.path.split("/")[3]
        known = [job for job in jobs if job["id"] == job_id]
        if not known:
            return httpx.Response(404, json={"error": {"message": f"no job {KEY}"}})
        if request.url.path.endswith("/cancel"):
            known[0]["status"] = "cancelled"
        return known[0]

    stub = given.service().on("POST /v1/fine-tunes", submit).on("GET /v1/fine-tunes", lambda _: {"data": jobs})
    stub.on("POST /v1/fine-tunes/estimate-price", given.ESTIMATE)
    stub.on("GET /v1/fine-tunes/ft-", one).on("POST /v1/fine-tunes/ft-", one)
    config = run_config("together", model=given.BASE)
    trainer = kind.open_trainer(Context(config, Endpoint(f"{stack.enter_context(serving(stub))}/v1", KEY, "Together")))
    return Stub(trainer, lambda: lost.append(True), lambda: len(jobs), given.BASE)


def fireworks(stack: ExitStack) -> Stub:
    pytest.importorskip("fireworks")
    import test_provider_fireworks as given

    from daunce_api.providers.fireworks import trainer as kind

    jobs: dict[str, dict[str, Any]] = {}
    lost: list[bool] = []

    def submit(request: Any) -> Any:
        job_id, body = request.url.params["supervisedFineTuningJobId"], json.loads(request.content)
        jobs[job_id] = {**body, "name": f"accounts/me/x/{job_id}", "state": "JOB_STATE_RUNNING"}
        if lost:
            lost.clear()
            return httpx.ReadTimeout("lost")
        return jobs[job_id]

    def one(request: Any) -> Any:
        job_id, _, action = request.url.path.rsplit("/", 1)[-1].partition(":")
        if job_id not in jobs:
            return httpx.Response(404, json={"error": {"message": f"no job {KEY}"}})
        if action == "cancel":
            jobs[job_id]["state"] = "JOB_STATE_CANCELLED"
        return jobs[job_id]

    stub = Service().on(f"POST {given.JOBS}", submit).on(f"GET {given.JOBS}/", one).on(f"POST {given.JOBS}/", one)
    stub.on(f"GET {given.JOBS}", lambda _: {"supervisedFineTuningJobs": list(jobs.values())})
    options = {"account_id": "me", "send_template": False}
    config = run_config("fireworks", model=given.BASE, trainer_options=options)
    url = stack.enter_context(serving(stub))
    trainer = kind.open_trainer(Context(config, Endpoint(f"{url}/inference/v1", KEY, "Fireworks")))
    return Stub(trainer, lambda: lost.append(True), lambda: len(jobs), given.BASE, "accounts/me/datasets/d")


def tinker(stack: ExitStack) -> Stub:
    pytest.importorskip("tinker")
    import tinker_stub as given

    from daunce_api.providers.tinker import trainer as kind

    stub = stack.enter_context(given.serving())
    run_dir, key = stack.enter_context(TemporaryDirectory()), Endpoint(stub.url, "tml-marked-0123", "Tinker")
    config = run_config("tinker", model=given.BASE, tokenizer=str(embedded_folder()), run_dir=run_dir)
    trainer = kind.open_trainer(Context(config, key))
    (Path(run_dir) / kind.FILES_FOLDER).mkdir()
    (Path(run_dir) / kind.FILES_FOLDER / "train.jsonl").write_bytes(CONTENT)
    recipe = {"n_epochs": 50, "batch_size": 1}
    return Stub(trainer, None, lambda: len(stub.runs), given.BASE, "train.jsonl", recipe)


class Behind(Proxy):
    """The embedded server, which starts one job at a time; ``lost``: the answer to the next submit does not arrive."""

    lost = False

    def lose(self) -> None:
        self.lost = True

    def submits(self) -> int:
        return sum(sent.route == "POST /v1/fine_tuning/jobs" for sent in self.sent)

    def answered(self, sent: Sent) -> bytes:
        if self.lost and sent.route == "POST /v1/fine_tuning/jobs":
            self.lost = False
            return b"{"
        return sent.answer


@pytest.fixture(scope="module")
def behind(server: EmbeddedServer) -> Iterator[tuple[Behind, Endpoint]]:
    with Behind() as proxy:
        proxy.upstream, proxy.change_answer = server.base_url, proxy.answered
        yield proxy, Endpoint(proxy.base_url, server.api_key, "the embedded server")


def served(proxy: Behind, endpoint: Endpoint) -> Stub:
    proxy.sent.clear()
    config = run_config("embedded", model="daunce-tiny", base_url=None)
    trainer = embedded.open_trainer(Context(config, endpoint))
    return Stub(trainer, proxy.lose, proxy.submits, "daunce-tiny", "", {"n_epochs": 50})


def local(stack: ExitStack) -> Stub:
    pytest.importorskip("peft")
    from daunce_api.providers.local import trainer as kind

    run_dir = stack.enter_context(TemporaryDirectory())
    options = {"engine": "thread"}
    config = run_config("local", model="daunce-tiny", base_url=None, run_dir=run_dir, trainer_options=options)
    trainer = kind.open_trainer(Context(config, None))
    return Stub(trainer, None, lambda: 0, "daunce-tiny", "", {"n_epochs": 50})


PROVIDERS: dict[str, Callable[[ExitStack], Stub]] = {
    "openai": lambda stack: wire(stack, "openai", openai_wire.open_trainer, metadata=True),
    "openai_wire": lambda stack: wire(stack, "openai_wire", openai_wire.open_trainer, metadata=True),
    "openai_wire without metadata": lambda stack: wire(stack, "openai_wire", openai_wire.open_trainer, metadata=False),
    "azure": lambda stack: wire(stack, "azure", azure.open_trainer, metadata=True),
    "nebius": lambda stack: wire(stack, "nebius", nebius.open_trainer, metadata=False),
    "together": together,
    "fireworks": fireworks,
    "tinker": tinker,
    "local": local,
}


def request(stub: Stub, key: str) -> JobRequest:
    return JobRequest(key, stub.model, stub.file, 7, stub.recipe or {}, f"a-long-name-{key.rpartition('-')[0]}")


@pytest.fixture(params=[*PROVIDERS, "embedded"])
async def stub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stub]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with ExitStack() as stack:
        if request.param == "embedded":
            found = served(*request.getfixturevalue("behind"))
        else:
            found = PROVIDERS[request.param](stack)
        async with found.trainer:
            if not found.file:
                found.file = await found.trainer.upload("train.jsonl", CONTENT)
            yield found


async def test_a_submit_without_an_answer_is_found_by_its_key_and_by_no_other(stub: Stub) -> None:
    """The promise that no job is paid for twice rests on this."""
    await stub.trainer.submit(request(stub, "abc-m0-a1"))
    if stub.lose is None:
        await stub.trainer.submit(request(stub, "abc-m1-a1"))
    else:
        stub.lose()
        with pytest.raises(AmbiguousSubmitError) as info:
            await stub.trainer.submit(request(stub, "abc-m1-a1"))
        assert KEY not in str(info.value)
        assert WIRE_KEY not in str(info.value)
        assert stub.submits() == 2, "never repeated inside"
    found = await stub.trainer.find_job("abc-m1-a1")
    assert found is not None
    first = await stub.trainer.find_job("abc-m0-a1")
    assert first is not None
    assert first.id != found.id
    assert await stub.trainer.find_job("abc-m2-a1") is None
    for job in (first, found):  # a real server would go on with it
        await stub.trainer.cancel(job.id)


async def test_the_jobs_of_a_run_are_listed_with_what_they_were_sent_with(stub: Stub) -> None:
    """So that a copy of a run is noticed, an orphan is named and `--adopt` knows whose job it takes over."""
    if not isinstance(stub.trainer, Listing):
        pytest.skip("its jobs are files of the run folder")
    assert await stub.trainer.jobs_of("abe") == []
    keys = ["abe-m-1-a1", "abe-m0-a1", "abe-m0-a12", "abd-m0-a1"]
    sent = [request(stub, key) for key in keys]
    sent[0] = replace(sent[0], suffix="a-long-name-abe-target")
    submitted = [await stub.trainer.submit(each) for each in sent]
    listed = {job.echo.key: job for job in await stub.trainer.jobs_of("abe")}
    assert {key: job.id for key, job in listed.items()} == dict(
        zip(keys[:3], (job.id for job in submitted), strict=False)
    )
    for each, job in zip(sent, submitted, strict=True):
        for shown in (job, await stub.trainer.get(job.id), *([listed[each.key]] if each.key in listed else ())):
            assert (shown.echo.key, shown.echo.file_id) == (each.key, each.file_id)
            assert contradiction(each, shown, stub.trainer.capabilities.echoes) is None
            other = replace(each, file_id="file-of-another")
            assert "training file" in str(contradiction(other, shown, stub.trainer.capabilities.echoes))
    for job in submitted:
        await stub.trainer.cancel(job.id)


async def test_a_job_of_the_run_that_its_folder_does_not_know_stops_it_and_is_cancelled(
    stub: Stub, tmp_path: Path
) -> None:
    if not isinstance(stub.trainer, Listing):
        pytest.skip("its jobs are files of the run folder")
    config = run_config("openai_wire").model_dump(mode="json")
    with RunStore.create_or_open(tmp_path, {"config": config}, run_key="acc") as store:
        client = JobClient(stub.trainer, store, clock=InstantClock())
        own = await client.submit(request(stub, "acc-m0-a1"), 0, 1)
        await check(client)
        copys = await stub.trainer.submit(request(stub, "acc-m1-a1"))  # by a copy of the folder
        with pytest.raises(UnknownJobsError, match="acc-m1-a1") as raised:
            await check(client)
        assert raised.value.jobs == (copys.id,)
        report = await cancel_jobs(client)
    assert report.cancelled == ["acc-m0-a1"]
    assert report.unknown == {copys.id: "acc-m1-a1 is not known to this run folder: cancelled"}
    assert (await stub.trainer.get(own.id)).status is JobStatus.CANCELLED


async def test_a_job_is_read_cancelled_and_stays_cancelled(stub: Stub) -> None:
    job = await stub.trainer.submit(request(stub, "abc-m0-a1"))
    assert not (await stub.trainer.get(job.id)).status.final
    assert (await stub.trainer.cancel(job.id)).status is JobStatus.CANCELLED
    assert (await stub.trainer.get(job.id)).status is JobStatus.CANCELLED


async def test_a_job_that_is_not_there_is_refused_without_the_key(stub: Stub) -> None:
    with pytest.raises(RejectedError) as info:
        await stub.trainer.get("ft-unknown")
    assert info.value.status in (404, None)
    assert KEY not in str(info.value)
    assert WIRE_KEY not in str(info.value)


@pytest.mark.parametrize("kind", ["openai_wire", "azure", "together", "fireworks"])
async def test_a_redirect_takes_no_job_and_no_key_elsewhere(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in ("together", "fireworks"):
        pytest.importorskip(kind)
    received: list[str] = []

    def elsewhere(request: httpx2.Request) -> Any:
        received.append(request.url.path)
        there = None if request.url.path == "/there" else "/there"
        return httpx2.Response(
            200 if there is None else 307, json={}, headers={} if there is None else {"location": there}
        )

    monkeypatch.setenv("K", KEY)
    options = {"account_id": "me"} if kind == "fireworks" else {}
    with serving(elsewhere) as url:
        config = run_config(kind, model=BASE, base_url=f"{url}/v1", api_key_env="K", trainer_options=options)
        async with open_backend(config) as backend:
            with pytest.raises(RejectedError, match="307"):
                await backend.trainer.delete_file("file-1") or await backend.trainer.get("ft-1")
    assert "/there" not in received


@pytest.mark.parametrize("kind", [kind for kind in BACKENDS if kind not in ("embedded", "local")])
async def test_a_run_whose_tokenizer_is_gone_can_be_cancelled(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`daunce cancel` and `daunce clean` open trainer and scorer, whose jobs and deployments cost money."""
    monkeypatch.setenv("K", "tml-marked-0123456789")
    options = {"account_id": "me"} if kind == "fireworks" else {}
    config = run_config(
        kind,
        None,
        model="org/gone",
        base_url="http://127.0.0.1:9",
        api_key_env="K",
        tokenizer="/gone",
        trainer_options=options,
    )
    async with open_backend(config) as backend:
        assert backend.trainer.capabilities.provider


@pytest.mark.parametrize("kind", ["together", "fireworks", "tinker"])
def test_a_hyperparameter_that_a_provider_does_not_know_is_refused_by_the_plan(kind: str) -> None:
    config = run_config(kind, model=BASE, training={"hyperparameters": {"n_steps": 3}})
    [refusal] = trainer_refusals(config, capabilities_of(config)[0])
    assert "training.hyperparameters.n_steps" in str(refusal)
    assert "Nothing was sent" in str(refusal)


@pytest.mark.parametrize("kind", ["openai_wire", "together", "fireworks"])
async def test_a_process_that_has_run_out_of_files_stops_instead_of_trying_for_an_hour(kind: str) -> None:
    with ExitStack() as stack:
        first, second = (PROVIDERS[kind](stack).trainer for _ in range(2))
        async with first, second:
            assert await first.find_job("abc-m0-a1") is None  # what it imports is open now
            _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                with pytest.raises(StopError, match=r"not sent: Too many open files.*`ulimit -n 1024`.*kept"):
                    await second.find_job("abc-m0-a1")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_capabilities_are_known_without_a_request(stub: Stub) -> None:
    said = stub.trainer.capabilities
    assert said.provider
    assert said.max_concurrent_jobs >= 1
    assert said.min_examples >= 1


PAGE = Path(__file__).parents[2] / "examples" / "guide" / "docs" / "providers.md"


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_what_the_guide_says_to_write_is_a_valid_config(block: str) -> None:
    content = {"data": {"train": "train.jsonl", "test": "test.jsonl"}, **yaml.safe_load(block)}
    config = RunConfig.from_mapping(content)
    if config.backend.kind == "local":  # its model folder is the reader's
        return
    trainer, _ = capabilities_of(config)
    assert trainer_refusals(config, trainer) == []
