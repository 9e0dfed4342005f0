"""Fireworks through its own SDK: ids chosen by the client, states, the missing seed, adapters on one deployment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_stub import serving
from provider_support import BATCH, Server, body_of, polling, run_config, sequence, truth
from sdk_support import KEY, Service, error, httpx

from daunce_api import Dataset, Run
from daunce_api._util.clock import InstantClock
from daunce_api.errors import AmbiguousSubmitError, ContractError, RejectedError, StopError, TransientError
from daunce_api.providers.base import JobRequest, JobStatus, mark_of
from daunce_api.providers.calls import Calls
from daunce_api.providers.fireworks import scorer as fireworks_scorer
from daunce_api.providers.fireworks import trainer as fireworks_trainer
from daunce_api.providers.fireworks.trainer import FireworksTrainer, dataset_id_of, job_id_of, trainer_capabilities
from daunce_api.providers.tokenizers import chat_template, embedded_folder
from daunce_api.store import RunStore
from daunce_api.train import JobClient, cancel_jobs

fireworks = pytest.importorskip("fireworks")

BASE = "accounts/fireworks/models/base-8b"
DATASET = "accounts/me/datasets/daunce-abc-0123"
REQUEST = JobRequest("abc-m0-a1", BASE, DATASET, 77, {"epochs": 2, "learning_rate": 1e-4, "lora_rank": 8}, "run-m0")
JOBS = "/v1/accounts/me/supervisedFineTuningJobs"


def calls() -> Calls:
    return Calls("Fireworks", [KEY], fireworks)


def sdk(stub: Service) -> Any:
    return fireworks.AsyncFireworks(
        api_key=KEY, account_id="me", base_url="http://fireworks.test", max_retries=0, http_client=stub.http()
    )


def make(stub: Service, clock: InstantClock | None = None) -> FireworksTrainer:
    config = run_config("fireworks", model=BASE, base_url=None)
    return polling(FireworksTrainer(sdk(stub), calls(), config), clock)


def job(state: str = "JOB_STATE_CREATING", **changes: Any) -> dict[str, Any]:
    return {"name": f"accounts/me/supervisedFineTuningJobs/{job_id_of(REQUEST.key)}", "state": state, **changes}


async def test_a_job_is_created_under_an_id_that_follows_from_its_key() -> None:
    stub = Service().on(f"POST {JOBS}", job())
    created = await make(stub).submit(REQUEST)
    assert (created.id, created.status) == (job_id_of("abc-m0-a1"), JobStatus.QUEUED)
    (body,) = stub.bodies(f"POST {JOBS}")
    assert stub.requests[0].url.params["supervisedFineTuningJobId"] == created.id
    assert body == {
        "dataset": DATASET,
        "baseModel": BASE,
        "outputModel": f"accounts/me/models/{created.id}",
        "displayName": REQUEST.marked_suffix(63),
        "epochs": 2,
        "learningRate": 1e-4,
        "loraRank": 8,
        "evalAutoCarveout": False,
        "earlyStop": False,
    }


async def test_a_fine_tune_is_continued_by_warm_start() -> None:
    stub = Service().on(f"POST {JOBS}", job())
    await make(stub).submit(JobRequest(REQUEST.key, "accounts/me/models/target", DATASET, 1, {}, "s"))
    (body,) = stub.bodies(f"POST {JOBS}")
    assert body["warmStartFrom"] == "accounts/me/models/target"
    assert "baseModel" not in body


def test_the_missing_seed_is_said_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its text, for people and for programs, before a key is needed."""
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    for side, count in (("train", 12), ("test", 2)):
        records = [{"id": f"{side}{i}", "prompt": f"p{i}", "completion": f" c{i}"} for i in range(count)]
        Dataset.from_records(records).to_jsonl(tmp_path / f"{side}.jsonl")
    run = Run.create(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {side: str(tmp_path / f"{side}.jsonl") for side in ("train", "test")},
            "backend": {"kind": "fireworks", "model": BASE, "tokenizer": str(embedded_folder())},
            "ensemble": {"members": 3},
            "training": {"hyperparameters": {"epochs": 1}},
        }
    )
    plan = run.plan()
    assert "Note: Fireworks takes no seed" in plan.text()
    assert any("takes no seed" in note for note in plan.to_json()["notes"])
    assert not trainer_capabilities(run.config).honours_seed


STATES = {
    "JOB_STATE_PENDING": JobStatus.QUEUED,
    "JOB_STATE_VALIDATING": JobStatus.QUEUED,
    "JOB_STATE_RE_QUEUEING": JobStatus.QUEUED,
    "JOB_STATE_RUNNING": JobStatus.RUNNING,
    "JOB_STATE_WRITING_RESULTS": JobStatus.RUNNING,
    "JOB_STATE_CANCELLING": JobStatus.RUNNING,
    "JOB_STATE_UNSPECIFIED": JobStatus.RUNNING,
    "JOB_STATE_OF_THE_FUTURE": JobStatus.RUNNING,
    "JOB_STATE_COMPLETED": JobStatus.SUCCEEDED,
    "JOB_STATE_FAILED": JobStatus.FAILED,
    "JOB_STATE_EXPIRED": JobStatus.FAILED,
    "JOB_STATE_CANCELLED": JobStatus.CANCELLED,
    "JOB_STATE_DELETING": JobStatus.CANCELLED,
}


@pytest.mark.parametrize(("state", "status"), STATES.items())
async def test_states(state: str, status: JobStatus) -> None:
    i = job_id_of(REQUEST.key)
    answer = job(state, status={"code": "INTERNAL", "message": f"no GPU {KEY}"}, jobProgress={"percent": 40})
    found = await make(Service().on(f"GET {JOBS}/{i}", answer)).get(i)
    assert found.status is status
    assert found.model == (f"accounts/me/models/{i}" if status is JobStatus.SUCCEEDED else None)
    assert found.error == ("no GPU [key removed]" if status is JobStatus.FAILED else None)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(409, "already exists"), AmbiguousSubmitError),
        (error(500), AmbiguousSubmitError),
        (httpx.ReadTimeout("slow"), AmbiguousSubmitError),
        (httpx.ConnectError("refused"), TransientError),
        (error(429), TransientError),
        (error(400, "bad"), RejectedError),
        (error(401), StopError),
        (error(403), StopError),
    ],
)
async def test_failed_submits(answer: Any, kind: type[Exception]) -> None:
    stub = Service().on(f"POST {JOBS}", answer)
    with pytest.raises(kind) as info:
        await make(stub).submit(REQUEST)
    assert KEY not in str(info.value)
    assert sum(r.startswith("POST") for r in stub.paths) == 1


async def test_a_lost_job_is_read_by_its_id() -> None:
    i = job_id_of(REQUEST.key)
    stub = Service().on(f"GET {JOBS}/{i}", job("JOB_STATE_RUNNING"))
    found = await make(stub).find_job(REQUEST.key)
    assert found is not None
    assert found.id == i
    assert await make(stub).find_job("another") is None
    with pytest.raises(TransientError):
        await make(Service().on(f"GET {JOBS}", error(503))).find_job(REQUEST.key)


@pytest.mark.parametrize("answer", [{}, {"name": "accounts/me/supervisedFineTuningJobs/another", "state": "x"}])
async def test_an_answer_that_names_no_job_or_another_one_is_not_this_job(answer: Any) -> None:
    stub = Service().on(f"GET {JOBS}", answer).on(f"POST {JOBS}", answer)
    with pytest.raises(TransientError, match="nothing of it was used"):
        await make(stub).find_job(REQUEST.key)
    with pytest.raises(AmbiguousSubmitError):
        await make(stub).submit(REQUEST)


async def test_names_of_another_form_are_refused_before_anything_is_sent() -> None:
    stub = Service()
    with pytest.raises(RejectedError, match="accounts/ACCOUNT/models/ID"):
        await make(stub).model_info("base-8b")
    assert stub.requests == []


NAME, CONTENT = "daunce-ABC-0123.jsonl", b'{"messages":[]}\n{"messages":[]}\n'
ID = "daunce-abc-0123"
DATASETS = "/v1/accounts/me/datasets"


class SlowData:
    """A service whose data set is ready after some looks at it, and that refuses jobs until then."""

    def __init__(self, looks: int, **changes: Any) -> None:
        self.looks = looks
        self.stub = (
            Service()
            .on(f"POST {DATASETS}", {"name": DATASET, "state": "UPLOADING"})
            .on(f"POST {DATASETS}/{ID}:upload", {"id": ID})
            .on(f"POST {DATASETS}/{ID}:validateUpload", {})
            .on(f"GET {DATASETS}/{ID}", self.look)
            .on(f"POST {JOBS}", self.submit)
        )
        for route, answer in changes.items():
            self.stub.on(f"POST {DATASETS}/{ID}:{route}", answer)

    def look(self, request: Any) -> dict[str, Any]:
        self.looks -= 1
        return {"state": "READY" if self.looks < 0 else "UPLOADING"}

    def submit(self, request: Any) -> Any:
        return job() if self.looks < 0 else error(400, "dataset is not in a READY state")


async def test_a_paused_job_stops_the_run_with_advice_and_can_be_cancelled(tmp_path: Path) -> None:
    i = job_id_of(REQUEST.key)
    said = {"code": "OK", "message": f"suspended {KEY}"}
    paused = job("JOB_STATE_PAUSED", displayName=f"abc-m0-{mark_of(REQUEST.key)}", status=said)
    stub = Service().on(f"POST {JOBS}", job()).on(f"GET {JOBS}", {"supervisedFineTuningJobs": [paused]})
    trainer = make(stub.on(f"GET {JOBS}/{i}", paused).on(f"POST {JOBS}/{i}:cancel", {}))
    assert [found.id for found in await trainer.jobs_of("abc")] == [i]
    with RunStore.create_or_open(tmp_path, {"config": {}}, run_key="abc") as store:
        client = JobClient(trainer, store, clock=InstantClock())
        await client.submit(REQUEST, 0, 1)
        with pytest.raises(StopError, match=r"paused job .*suspended.*settle that at Fireworks") as info:
            await client.watch(store.jobs.rows()[0])
        assert KEY not in str(info.value)
        stub.on(f"GET {JOBS}/{i}", [paused, paused, job("JOB_STATE_CANCELLED")])
        assert (await cancel_jobs(client)).cancelled == [REQUEST.key]


async def test_a_job_that_fails_for_its_file_is_not_tried_again() -> None:
    i = job_id_of(REQUEST.key)
    for code, refused in (("INVALID_ARGUMENT", True), ("INTERNAL", False)):
        answer = job("JOB_STATE_FAILED", status={"code": code, "message": "no"})
        assert (await make(Service().on(f"GET {JOBS}/{i}", answer)).get(i)).refused is refused


async def test_chats_are_rendered_by_the_template_that_they_are_measured_with(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    stub = Service().on(f"POST {JOBS}", job())
    config = run_config("fireworks", model=BASE, tokenizer=str(tmp_path))
    await FireworksTrainer(sdk(stub), calls(), config).submit(REQUEST)
    assert stub.bodies(f"POST {JOBS}")[0]["jinjaTemplate"] == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("its own file wins")
    assert chat_template(str(tmp_path)) == "its own file wins"
    assert chat_template("accounts/fireworks/models/m") is None


async def test_a_large_file_goes_to_the_address_that_fireworks_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def bucket(request: Any) -> Any:
        path = request.url.raw_path.decode()
        sent.append((path, request.headers["x-goog-content-length-range"], request.content))
        return httpx.Response(200 if len(sent) == 1 else 403)

    monkeypatch.setattr(fireworks_trainer, "LARGEST_UPLOAD", 3)
    with serving(bucket) as url:
        signed = {"filenameToSignedUrls": {NAME: f"{url}/b?signature=secret"}}
        stub = SlowData(0).stub.on(f"POST {DATASETS}/{ID}:getUploadEndpoint", signed)
        assert await make(stub).upload(NAME, CONTENT) == DATASET
        size = len(CONTENT)
        assert sent == [("/b?signature=secret", f"{size},{size}", CONTENT)]
        assert stub.bodies(f"POST {DATASETS}/{ID}:getUploadEndpoint") == [{"filenameToSize": {NAME: str(size)}}]
        with pytest.raises(StopError) as info:
            await make(stub).upload(NAME, CONTENT)
        assert "secret" not in str(info.value)


async def test_files_are_data_sets() -> None:
    assert dataset_id_of(NAME) == ID
    stub, clock = SlowData(0).stub, InstantClock()
    trainer = make(stub, clock)
    assert await trainer.upload(NAME, CONTENT) == DATASET
    assert clock.now() == 0.0
    assert json.loads(stub.requests[0].content) == {
        "dataset": {"userUploaded": {}, "exampleCount": "2", "format": "CHAT"},
        "datasetId": ID,
    }
    assert CONTENT in stub.requests[1].content
    stub.on(f"GET {DATASETS}/{ID}", [{"state": "UPLOADING"}, {"state": "READY"}]).on(f"DELETE {DATASETS}/{ID}", {})
    assert await trainer.find_file(NAME, len(CONTENT)) is None
    assert await trainer.find_file(NAME, len(CONTENT)) == DATASET
    assert await trainer.delete_file(DATASET)
    assert await make(Service()).find_file(NAME, 3) is None
    again = SlowData(0).stub.on(f"POST {DATASETS}", error(409))
    again.on(f"POST {DATASETS}/{ID}:upload", {"id": ID})
    assert await make(again).upload(NAME, CONTENT) == DATASET
    with pytest.raises(RejectedError):
        await make(Service().on(f"POST {DATASETS}", error(400))).upload(NAME, CONTENT)


async def test_an_upload_is_validated_and_waited_for_before_a_job_is_submitted() -> None:
    slow, clock = SlowData(5), InstantClock()
    trainer = make(slow.stub, clock)
    assert await trainer.upload(NAME, CONTENT) == DATASET
    assert slow.stub.paths.count(f"POST {DATASETS}/{ID}:validateUpload") == 1
    assert clock.now() == 25.0
    assert (await trainer.submit(REQUEST)).status is JobStatus.QUEUED


async def test_a_job_on_data_that_is_not_ready_is_tried_again() -> None:
    slow = SlowData(1)
    trainer = make(slow.stub)
    with pytest.raises(TransientError, match="still reading"):
        await trainer.submit(REQUEST)
    with pytest.raises(RejectedError, match="READY state"):  # it was ready when the reason was looked for
        await trainer.submit(REQUEST)
    assert (await trainer.submit(REQUEST)).status is JobStatus.QUEUED
    gone = Service().on(f"POST {JOBS}", error(400, "no such dataset"))
    with pytest.raises(RejectedError, match="no such dataset"):
        await make(gone).submit(REQUEST)


@pytest.mark.parametrize("status", [400, 409])
async def test_what_is_refused_while_an_earlier_upload_is_validated_is_no_failure(status: int) -> None:
    refusals = {"upload": error(status, "has a file"), "validateUpload": error(status, "is being validated")}
    slow = SlowData(4, **refusals)
    slow.stub.on(f"POST {DATASETS}", error(409))
    assert await make(slow.stub).upload(NAME, CONTENT) == DATASET
    never = SlowData(1000, **refusals)
    never.stub.on(f"POST {DATASETS}", error(409))
    with pytest.raises(RejectedError if status == 400 else TransientError, match="has a file"):
        await make(never.stub).upload(NAME, CONTENT)
    fresh = SlowData(4, upload=error(400, "too big"))
    with pytest.raises(RejectedError, match="too big"):
        await make(fresh.stub).upload(NAME, CONTENT)


async def test_data_at_fault_and_data_that_takes_too_long() -> None:
    broken = {"state": "UPLOADING", "status": {"code": "INVALID_ARGUMENT", "message": f"line 2 {KEY}"}}
    with pytest.raises(RejectedError, match=r"line 2 \[key removed\]"):
        await make(SlowData(9).stub.on(f"GET {DATASETS}/{ID}", broken)).upload(NAME, CONTENT)
    with pytest.raises(TransientError, match="not ready after 10 minutes"):
        await make(SlowData(1000).stub).upload(NAME, CONTENT)


async def test_cancel_and_clean_up() -> None:
    i = job_id_of(REQUEST.key)
    stub = (
        Service()
        .on(f"POST {JOBS}/{i}:cancel", [{}, error(400, "finished")])
        .on(f"GET {JOBS}/{i}", [job("JOB_STATE_CANCELLING"), job("JOB_STATE_COMPLETED")])
        .on("DELETE /v1/accounts/me/models/m", [{}, error(404), error(409, "deployed"), error(401)])
    )
    trainer = make(stub)
    assert (await trainer.cancel(i)).status is JobStatus.RUNNING
    assert (await trainer.cancel(i)).status is JobStatus.SUCCEEDED
    assert await trainer.delete_model("accounts/me/models/m")
    assert await trainer.delete_model("accounts/me/models/m")
    assert not await trainer.delete_model("accounts/me/models/m")
    with pytest.raises(StopError):
        await trainer.delete_model("accounts/me/models/m")


def echo(**changes: Any) -> Any:
    def handler(request: Any) -> Any:
        body = body_of(request)
        model = body["model"].split("#")[0]
        choices = []
        for i, ids in enumerate(body["prompt"]):
            values = [*sequence(model, ids), -0.5]
            found = {"token_logprobs": values, "token_ids": [*ids, 3], "tokens": ["x"] * len(values)}
            choices.append({"index": i, "text": "", "logprobs": {**found, **changes}})
        return {"model": model, "choices": choices}

    return handler


async def test_echo_speaks_fireworks_dialect() -> None:
    server = Server(echo())
    scorer = fireworks_scorer.open_scorer(server.context(run_config("fireworks")))
    scores = await scorer.score("accounts/me/models/m#accounts/me/deployments/d", BATCH)
    assert [s.logprobs for s in scores] == [truth("accounts/me/models/m", e) for e in BATCH]
    body = server.body()
    assert body["context_length_exceeded_behavior"] == "error"
    assert body["return_token_ids"] is True
    assert body["max_tokens"] == 1


async def test_echo_of_other_ids_or_without_ids_is_refused() -> None:
    for changes, words in (({"token_ids": [9] * 16}, "other tokens"), ({"token_ids": None}, "does not return the")):
        scorer = fireworks_scorer.open_scorer(Server(echo(**changes)).context(run_config("fireworks")))
        with pytest.raises(ContractError, match=words):
            await scorer.score("accounts/me/models/m", BATCH[:1])


def deployment(stub: Service, clock: InstantClock | None = None) -> fireworks_scorer.DeploymentHost:
    options = fireworks_scorer.FireworksScorerOptions(deployment="accounts/me/deployments/d")
    return polling(fireworks_scorer.DeploymentHost(sdk(stub), calls(), options, BASE), clock)


async def test_members_are_loaded_on_the_deployment_and_unloaded() -> None:
    root = "/v1/accounts/me/deployedModels"
    name = "accounts/me/deployedModels/m-1"
    stub = (
        Service()
        .on(f"POST {root}", {"name": name, "state": "DEPLOYING"})
        .on(f"GET {root}/m-1", [{"name": name, "state": "DEPLOYING"}, {"name": name, "state": "DEPLOYED"}])
        .on(f"DELETE {root}/m-1", {})
    )
    clock = InstantClock()
    host = deployment(stub, clock)
    served = await host.load("accounts/me/models/m")
    assert served == "accounts/me/models/m#accounts/me/deployments/d"
    assert clock.now() == 10.0
    assert stub.bodies(f"POST {root}") == [{"model": "accounts/me/models/m", "deployment": "accounts/me/deployments/d"}]
    await host.unload("accounts/me/models/m")
    assert stub.paths[-1] == f"DELETE {root}/m-1"
    stub.on(f"POST {root}", {"name": name, "state": "UNDEPLOYING", "status": {"message": "no room"}})
    with pytest.raises(RejectedError, match="no room"):
        await host.load("accounts/me/models/m")


async def test_what_another_process_left_on_the_deployment_is_found_and_unloaded() -> None:
    root = "/v1/accounts/me/deployedModels"

    def item(name: str, model: str, where: str = "d") -> dict[str, Any]:
        deployment = f"accounts/me/deployments/{where}"
        return {
            "name": f"accounts/me/deployedModels/{name}",
            "model": f"accounts/me/models/{model}",
            "deployment": deployment,
        }

    first = {"deployedModels": [item("m-1", "m"), item("m-2", "other")], "nextPageToken": "next"}
    second = {"deployedModels": [item("m-3", "m", "elsewhere"), item("m-4", "m")]}
    stub = Service().on(f"GET {root}", [first, second]).on(f"DELETE {root}/m-1", {})
    await deployment(stub).unload("accounts/me/models/m")
    assert [p for p in stub.paths if p.startswith("DELETE")] == [f"DELETE {root}/m-1", f"DELETE {root}/m-4"]
    assert deployment(Service()).always_served(BASE) is not None  # it takes no place
    none = Service().on(f"GET {root}", {"deployedModels": []})
    await deployment(none).unload("accounts/me/models/m")
    assert len(none.requests) == 1


async def test_a_busy_answer_while_a_model_is_loaded_is_no_failure() -> None:
    root = "/v1/accounts/me/deployedModels"
    name = "accounts/me/deployedModels/m-1"
    stub = (
        Service()
        .on(f"POST {root}", {"name": name, "state": "DEPLOYING"})
        .on(f"GET {root}/m-1", [error(503), {"name": name, "state": "DEPLOYED"}])
    )
    assert (await deployment(stub).load("accounts/me/models/m")).startswith("accounts/me/models/m#")
