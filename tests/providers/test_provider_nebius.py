"""Nebius over real HTTP: jobs without metadata, registered checkpoints, echo that is not taken for granted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2
import pytest
from http_stub import serving
from provider_support import BATCH, run_config, sequence, truth

from daunce_api._util.clock import InstantClock
from daunce_api.errors import StopError
from daunce_api.plan.planning import trainer_refusals
from daunce_api.plan.tokens import epochs_of
from daunce_api.providers import nebius
from daunce_api.providers.base import JobRequest, JobStatus, mark_of
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire import trainer as openai_wire
from daunce_api.providers.registry import Context
from daunce_api.store import RunStore
from daunce_api.train import JobClient, cancel_jobs

KEY = "nebius-marked-0123456789"
BASE = "meta-llama/Meta-Llama-3.1-8B-Instruct"
REQUEST = JobRequest("abc-m0-a1", BASE, "file-1", 1234, {"n_epochs": 2, "lora_r": 8}, "daunce-run")


class Nebius:
    """The provider as its documentation describes it: jobs without metadata and without a model's name."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = []
        self.requests: list[tuple[str, Any]] = []
        self.status = "validating"
        self.url = ""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        route = f"{method} {path}"
        self.requests.append((route, body))
        if route == "POST /v1/fine_tuning/jobs":
            if "metadata" in body or "method" in body:
                return 422, {"detail": "unknown field"}
            job = {"id": f"ftjob-{len(self.jobs)}", "object": "fine_tuning.job", "status": "running", **body}
            self.jobs.append(job)
            return 200, job
        if route == "GET /v1/fine_tuning/jobs":
            return 200, {"data": self.jobs, "has_more": False}
        if path.startswith("/v1/fine_tuning/jobs/"):
            job_id, _, what = path.removeprefix("/v1/fine_tuning/jobs/").partition("/")
            if what == "checkpoints":
                found = [{"id": f"ftckpt_{s}", "created_at": s, "result_files": []} for s in (20, 10)]
                return 200, {"data": found, "has_more": False}
            if what == "events":
                return 404, {"detail": "no such route"}
            return 200, next(j for j in self.jobs if j["id"] == job_id)
        if route == "GET /v0/models":
            return 200, self.models
        if route == "POST /v0/models":
            if self.status == "refused":
                return 400, {"detail": "no such base"}
            model = {**body, "name": f"{BASE}-LoRa:{body['name']}-udpd", "created_at": 1, "status": self.status}
            self.models.append(model)
            return 200, model
        if method == "DELETE" and path.startswith("/v0/models/"):
            name = unquote(path.removeprefix("/v0/models/"))
            known = [m for m in self.models if m["name"] == name]
            self.models = [m for m in self.models if m["name"] != name]
            return (200, {"status": "deleted"}) if known else (404, {"detail": "no such model"})
        if route == "POST /v1/completions":
            model = body["model"]
            choices = [
                {"index": i, "text": "", "logprobs": {"token_logprobs": sequence(model, ids), "tokens": []}}
                for i, ids in enumerate(body["prompt"])
            ]
            return 200, {"model": model, "choices": choices}
        return 404, {"detail": f"no route {route}"}


@pytest.fixture
def service() -> Iterator[Nebius]:
    nebius_ = Nebius()

    def answered(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        body = json.loads(request.content or b"null")
        status, answer = nebius_.answer(request.method, request.url.path, body)
        return httpx2.Response(status, json=answer)

    with serving(answered) as url:
        nebius_.url = f"{url}/v1"
        yield nebius_


def context(service: Nebius, **options: Any) -> Context:
    config = run_config("nebius", model=BASE, base_url=service.url, trainer_options=options)
    return Context(config, Endpoint(service.url, KEY, "Nebius"))


async def test_a_job_becomes_a_model_that_is_served_by_the_token(service: Nebius) -> None:
    async with nebius.open_trainer(context(service)) as trainer:
        job = await trainer.submit(REQUEST)
        assert (job.id, job.status) == ("ftjob-0", JobStatus.RUNNING)
        sent = service.jobs[0]
        assert sent["hyperparameters"] == {"lora": True, "packing": False, "n_epochs": 2, "lora_r": 8}
        assert (sent["seed"], sent["model"], sent["training_file"]) == (1234, BASE, "file-1")
        assert sent["suffix"].endswith(mark_of(REQUEST.key))
        service.jobs[0] |= {"status": "succeeded", "trained_tokens": 900, "fine_tuned_model": None}
        waiting = await trainer.get("ftjob-0")
        assert (waiting.status, waiting.model) == (JobStatus.SUCCEEDED, None), "Nebius is still checking the adapter"
        assert service.models[0]["source"] == "ftjob-0:ftckpt_20", "the last checkpoint"
        service.models[0]["status"] = "active"
        done = await trainer.get("ftjob-0")
        assert (done.model, done.trained_tokens) == (service.models[0]["name"], 900)
        assert len(service.models) == 1, "registered once, whoever looks"
        assert await trainer.checkpoints("ftjob-0") == []
        found = await trainer.find_job(REQUEST.key)
        assert found is not None
        assert found.model == done.model
        assert await trainer.find_job("another-key") is None
        assert done.model is not None
        assert await trainer.delete_model(done.model)
        assert await trainer.delete_model(done.model), "gone already"
        assert service.models == []


@pytest.mark.parametrize(("state", "why"), [("error", "the provider gave no reason"), ("refused", "no such base")])
async def test_an_adapter_that_nebius_does_not_serve_stops_the_run_and_can_be_cleaned(
    service: Nebius, state: str, why: str, tmp_path: Path
) -> None:
    """The next member's would not be served either, and costs as much."""
    service.status = state
    async with nebius.open_trainer(context(service)) as trainer:
        with RunStore.create_or_open(tmp_path, {"config": {}}, run_key="abc") as store:
            client = JobClient(trainer, store, clock=InstantClock())
            await client.submit(REQUEST, 0, 1)
            service.jobs[0]["status"] = "succeeded"
            with pytest.raises(
                StopError, match=rf"does not serve ftjob-0:ftckpt_20: .*{why}.*Everything so far is kept"
            ):
                await client.watch(store.jobs.rows()[0])
            assert (await cancel_jobs(client)).already_final == [REQUEST.key]
    assert len(service.jobs) == 1


async def test_echo_is_exact_and_not_taken_for_granted_of_a_fine_tune(service: Nebius) -> None:
    async with nebius.open_scorer(context(service)) as scorer:
        scores = await scorer.score("ft", BATCH)
        assert [s.logprobs for s in scores] == [truth("ft", e) for e in BATCH]
        assert not scorer.capabilities.fine_tunes_verified
        assert scorer.capabilities.tried_on == "base"


def test_any_hyperparameter_of_nebius_may_be_given() -> None:
    given = {"lora": True, "lora_alpha": 16, "context_length": 8192}
    config = run_config("nebius", model=BASE, training={"hyperparameters": given})
    assert trainer_refusals(config, nebius.trainer_capabilities(config)) == []
    assert any("not tested against Nebius" in note for note in nebius.trainer_capabilities(config).notes)


def test_any_hyperparameter_of_a_server_of_the_wire_may_be_given_but_none_that_openai_lacks() -> None:
    given = {"lora": True, "lora_alpha": 16}
    for kind, refused in (("openai_wire", 0), ("openai", 2)):
        config = run_config(kind, model=BASE, training={"hyperparameters": given})
        assert len(trainer_refusals(config, openai_wire.trainer_capabilities(config))) == refused


def test_the_plan_counts_the_epochs_that_a_provider_documents_or_that_are_sent() -> None:
    assert epochs_of(run_config("nebius", model=BASE), 100, target=False) == (3, None)
    assert epochs_of(run_config("together", model=BASE), 100, target=False) == (3, None)
    assert epochs_of(run_config("openai_wire", model=BASE), 100, target=False)[1] is not None
