"""What every trainer has to hold, whatever its provider's wire looks like: a template for a new provider's test.

A provider takes part with one line in ``PROVIDERS``: a function that gives a trainer on a stub, and the stub's switch
that loses the answer to the next submit. The stub acts on a request before its answer is lost, as networks do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from provider_support import KEY as WIRE_KEY
from provider_support import Server, run_config
from sdk_support import KEY, Service, httpx

from daunce_api.errors import AmbiguousSubmitError, RejectedError
from daunce_api.providers import nebius
from daunce_api.providers.base import JobRequest, JobStatus, Trainer
from daunce_api.providers.openai_wire import trainer as openai_wire

BASE = "org/Base-8B"


@dataclass
class Stub:
    """A trainer on a stub of its provider. ``lose`` has the answer to the next submit lost; ``submits`` counts them."""

    trainer: Trainer
    lose: Callable[[], None]
    submits: Callable[[], int]
    model: str = BASE


class WireJobs:
    """OpenAI's jobs in memory; ``metadata``: whether they are kept."""

    def __init__(self, *, metadata: bool) -> None:
        self.metadata = metadata
        self.jobs: dict[str, dict[str, Any]] = {}
        self.lost = False

    def __call__(self, request: httpx2.Request) -> Any:
        path = request.url.path.removeprefix("/v1")
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


def wire(kind: str, open_trainer: Callable[..., Trainer], *, metadata: bool) -> Stub:
    jobs = WireJobs(metadata=metadata)
    config = run_config(kind, model=BASE)
    trainer = open_trainer(Server(jobs).context(config))
    return Stub(trainer, lambda: setattr(jobs, "lost", True), lambda: len(jobs.jobs))


def together() -> Stub:
    pytest.importorskip("together")
    import test_provider_together as given

    jobs: list[dict[str, Any]] = []
    lost: list[bool] = []

    def submit(request: Any) -> Any:
        body = json.loads(request.content)
        jobs.append(given.job(id=f"ft-{len(jobs)}", suffix=body["suffix"], status="running"))
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
    return Stub(given.make(stub), lambda: lost.append(True), lambda: len(jobs), given.BASE)


def fireworks() -> Stub:
    pytest.importorskip("fireworks")
    import test_provider_fireworks as given

    jobs: dict[str, dict[str, Any]] = {}
    lost: list[bool] = []

    def submit(request: Any) -> Any:
        job_id = request.url.params["supervisedFineTuningJobId"]
        jobs[job_id] = {"name": f"accounts/me/x/{job_id}", "state": "JOB_STATE_RUNNING"}
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
    return Stub(given.make(stub), lambda: lost.append(True), lambda: len(jobs), given.BASE)


PROVIDERS: dict[str, Callable[[], Stub]] = {
    "openai": lambda: wire("openai", openai_wire.open_trainer, metadata=True),
    "openai_wire": lambda: wire("openai_wire", openai_wire.open_trainer, metadata=True),
    "openai_wire without metadata": lambda: wire("openai_wire", openai_wire.open_trainer, metadata=False),
    "nebius": lambda: wire("nebius", nebius.open_trainer, metadata=False),
    "together": together,
    "fireworks": fireworks,
}


def request(stub: Stub, key: str) -> JobRequest:
    return JobRequest(key, stub.model, "accounts/me/datasets/d" if "accounts" in stub.model else "file-1", 7, {}, "run")


@pytest.fixture(params=PROVIDERS)
def stub(request: pytest.FixtureRequest) -> Stub:
    return PROVIDERS[request.param]()


async def test_a_submit_without_an_answer_is_found_by_its_key_and_by_no_other(stub: Stub) -> None:
    """The promise that no job is paid for twice rests on this."""
    await stub.trainer.submit(request(stub, "abc-m0-a1"))
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


async def test_a_job_is_read_cancelled_and_stays_cancelled(stub: Stub) -> None:
    job = await stub.trainer.submit(request(stub, "abc-m0-a1"))
    assert not (await stub.trainer.get(job.id)).status.final
    assert (await stub.trainer.cancel(job.id)).status is JobStatus.CANCELLED
    assert (await stub.trainer.get(job.id)).status is JobStatus.CANCELLED


async def test_a_job_that_is_not_there_is_refused_without_the_key(stub: Stub) -> None:
    with pytest.raises(RejectedError) as info:
        await stub.trainer.get("ft-unknown")
    assert info.value.status == 404
    assert KEY not in str(info.value)
    assert WIRE_KEY not in str(info.value)


def test_capabilities_are_known_without_a_request(stub: Stub) -> None:
    said = stub.trainer.capabilities
    assert said.provider
    assert said.max_concurrent_jobs >= 1
    assert said.min_examples >= 1
