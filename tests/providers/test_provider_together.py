"""Together through its own SDK: requests as it builds them, states, seeds, and what a lost answer leads to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import Server, body_of, polling, run_config, sequence
from sdk_support import KEY, Service, error, httpx

from daunce_api._util.clock import InstantClock
from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import encode_example
from daunce_api.errors import (
    AmbiguousSubmitError,
    ConfigurationError,
    ContractError,
    RejectedError,
    ReplayError,
    StopError,
    TransientError,
)
from daunce_api.providers.base import JobRequest, JobStatus, mark_of
from daunce_api.providers.calls import Calls
from daunce_api.providers.replay import record, replay
from daunce_api.providers.together import scorer as together_scorer
from daunce_api.providers.together.trainer import (
    SUFFIX_CHARACTERS,
    TogetherTrainer,
    trainer_capabilities,
)
from daunce_api.providers.tokenizers import tokenizer_of

together = pytest.importorskip("together")

BASE = "meta-llama/Base-8B"
REQUEST = JobRequest("abc-m0-a1", BASE, "file-1", 1234, {"n_epochs": 3, "learning_rate": 1e-4, "lora": 1}, "daunce-run")
LIMITS = {
    "model_name": BASE,
    "default_gradient_accumulation_steps": 1,
    "max_learning_rate": 1.0,
    "min_learning_rate": 0.0,
    "max_num_checkpoints": 10,
    "max_num_epochs": 20,
    "max_num_evals": 10,
    "max_seq_length_dpo": 8192,
    "max_seq_length_sft": 8192,
    "min_max_seq_length": 128,
    "merge_output_lora": True,
    "supports_full_training": True,
    "supports_reasoning": False,
    "supports_tools": False,
    "supports_vision": False,
    "full_training": {"max_batch_size": 96, "max_batch_size_dpo": 48, "min_batch_size": 8},
    "lora_training": {
        "default_rank": 16,
        "max_batch_size": 128,
        "max_batch_size_dpo": 64,
        "max_rank": 64,
        "min_batch_size": 8,
        "target_modules": ["k_proj"],
    },
}
ESTIMATE = {"allowed_to_proceed": True, "estimation_available": True, "estimated_total_price": 1.0}


def job(**changes: Any) -> dict[str, Any]:
    return {
        "id": "ft-1",
        "status": "pending",
        "created_at": "2026-11-22T19:00:00Z",
        "updated_at": "2026-11-22T19:00:00Z",
        "user_id": "u",
        "model": BASE,
        "model_output_name": None,
        "adapter_output_name": None,
        "suffix": REQUEST.marked_suffix(SUFFIX_CHARACTERS),
        "training_file": "file-1",
        "random_seed": 1234,
        **changes,
    }


def service() -> Service:
    return (
        Service()
        .on("GET /v1/fine-tunes/models/limits", LIMITS)
        .on("POST /v1/fine-tunes/estimate-price", ESTIMATE)
        .on("POST /v1/fine-tunes", job())
    )


def make(stub: Service | None, project: str | None = None) -> TogetherTrainer:
    """A trainer that talks to the stub; without one, to whatever answers on the network."""
    http_client = None if stub is None else stub.http()
    sdk = together.AsyncTogether(
        api_key=KEY, base_url="http://together.test", max_retries=0, http_client=http_client, project_id=project
    )
    calls = Calls("Together", [KEY], together)
    return TogetherTrainer(sdk, calls, run_config("together", model=BASE, base_url=None))


def submitted(stub: Service) -> dict[str, Any]:
    return [b for b in stub.bodies("POST /v1/fine-tunes") if "training_file" in b and "packing" in b][-1]


async def test_a_job_carries_subset_seed_and_recipe() -> None:
    stub = service()
    created = await make(stub).submit(REQUEST)
    assert (created.id, created.status) == ("ft-1", JobStatus.QUEUED)
    body = submitted(stub)
    assert body["random_seed"] == 1234
    assert (body["model"], body["training_file"], body["n_epochs"]) == (BASE, "file-1", 3)
    assert body["learning_rate"] == 1e-4
    assert body["training_type"]["type"] == "Lora"
    assert body["training_method"] == {"method": "sft", "train_on_inputs": False}
    assert body["suffix"].endswith(mark_of(REQUEST.key))
    assert len(body["suffix"]) <= SUFFIX_CHARACTERS


async def test_a_fine_tune_is_continued_as_a_checkpoint() -> None:
    stub = service()
    continued = JobRequest("k", "me/Base-8B-daunce", "file-1", 5, {}, "s")
    await make(stub).submit(continued)
    body = submitted(stub)
    assert body["from_checkpoint"] == "me/Base-8B-daunce"
    assert "model" not in body


STATES = {
    "pending": JobStatus.QUEUED,
    "queued": JobStatus.QUEUED,
    "running": JobStatus.RUNNING,
    "compressing": JobStatus.RUNNING,
    "uploading": JobStatus.RUNNING,
    "cancel_requested": JobStatus.RUNNING,
    "something new": JobStatus.RUNNING,
    "completed": JobStatus.SUCCEEDED,
    "cancelled": JobStatus.CANCELLED,
    "error": JobStatus.FAILED,
    "user_error": JobStatus.FAILED,
}


@pytest.mark.parametrize(("state", "status"), STATES.items())
async def test_states(state: str, status: JobStatus) -> None:
    stub = service().on("GET /v1/fine-tunes/ft-1", job(status=state, model_output_name="me/m", token_count=900))
    found = await make(stub).get("ft-1")
    assert found.status is status
    assert found.model == ("me/m" if status is JobStatus.SUCCEEDED else None)
    assert (found.error is None) == (status is not JobStatus.FAILED)
    assert found.trained_tokens == 900


async def test_a_failed_job_says_why() -> None:
    events = [
        {"object": "fine-tune-event", "type": "JOB_START", "message": "go"},
        {"object": "fine-tune-event", "type": "JOB_ERROR", "message": f"bad data {KEY}"},
    ]
    stub = service().on("GET /v1/fine-tunes/ft-1", job(status="error", events=events))
    found = await make(stub).get("ft-1")
    assert found.error == "bad data [key removed]"
    silent = await make(service().on("GET /v1/fine-tunes/ft-1", job(status="error"))).get("ft-1")
    assert silent.error == "the provider gave no reason"


async def test_a_completed_job_may_have_no_name_yet() -> None:
    stub = service().on("GET /v1/fine-tunes/ft-1", job(status="completed"))
    found = await make(stub).get("ft-1")
    assert (found.status, found.model) == (JobStatus.SUCCEEDED, None)


async def test_a_file_that_is_refused_is_not_tried_again() -> None:
    for state, refused in (("user_error", True), ("error", False)):
        stub = service().on("GET /v1/fine-tunes/ft-1", job(status=state))
        assert (await make(stub).get("ft-1")).refused is refused


@pytest.mark.parametrize("answer", [error(503), httpx.ReadTimeout("slow")])
async def test_an_estimate_that_fails_has_submitted_nothing(answer: Any) -> None:
    stub = service().on("POST /v1/fine-tunes/estimate-price", answer)
    with pytest.raises(TransientError):
        await make(stub).submit(REQUEST)
    assert "POST /v1/fine-tunes" not in stub.paths


async def test_defaults_that_train_are_sent_and_named_in_the_plan() -> None:
    stub = service()
    await make(stub).submit(JobRequest("k", BASE, "file-1", 1, {"n_epochs": 1}, "s"))
    body = submitted(stub)
    assert (body["n_epochs"], body["learning_rate"], body["batch_size"]) == (1, 1e-4, 8)
    (note,) = [n for n in trainer_capabilities(run_config("together")).notes if "not given" in n]
    assert "n_epochs: 3, learning_rate: 0.0001, batch_size: 8" in note
    given = {"n_epochs": 2, "learning_rate": 1e-3, "batch_size": 16}
    said = trainer_capabilities(run_config("together", training={"hyperparameters": given})).notes
    assert not any("not given" in note for note in said)


def post(answer: Any) -> Service:
    return service().on("POST /v1/fine-tunes", answer).on("POST /v1/fine-tunes/estimate-price", ESTIMATE)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(500), AmbiguousSubmitError),
        (error(408), AmbiguousSubmitError),
        (httpx.ReadTimeout("slow"), AmbiguousSubmitError),
        (httpx.RemoteProtocolError("gone"), AmbiguousSubmitError),
        (httpx.Response(200, content=b"{", headers={"content-type": "application/json"}), AmbiguousSubmitError),
        (httpx.Response(200, json={"status": "pending"}), AmbiguousSubmitError),
        (httpx.ConnectError("refused"), TransientError),
        (error(429, headers={"retry-after": "3"}), TransientError),
        (error(400, "bad file"), RejectedError),
        (error(404, "no model", "model_not_found"), RejectedError),
        (error(401), StopError),
        (error(402), StopError),
        (error(403), StopError),
    ],
)
async def test_failed_submits(answer: Any, kind: type[Exception]) -> None:
    stub = post(answer)
    with pytest.raises(kind) as info:
        await make(stub).submit(REQUEST)
    assert KEY not in str(info.value)
    assert info.value.__context__ is None
    assert sum(p == "POST /v1/fine-tunes" for p in stub.paths) == 1


async def test_what_the_sdk_refuses_is_rejected_before_anything_is_created() -> None:
    stub = service()
    with pytest.raises(RejectedError, match="batch size of 4096"):
        await make(stub).submit(JobRequest("k", BASE, "file-1", 1, {"batch_size": 4096, "lora": 1}, "s"))
    assert "POST /v1/fine-tunes" not in stub.paths


async def test_a_lost_job_is_found_by_the_hash_of_its_key() -> None:
    other = job(id="ft-9", suffix="something-else")
    twin = job(id="ft-2", created_at="2026-11-22T20:00:00Z")
    stub = service().on("GET /v1/fine-tunes", {"data": [other, twin, job()]}).on("GET /v1/fine-tunes/ft-1", job())
    trainer = make(stub)
    found = await trainer.find_job(REQUEST.key)
    assert found is not None
    assert found.id == "ft-1"
    assert await trainer.find_job("another-key") is None
    named = job(id="ft-1", suffix=None, model_output_name=f"me/Base-{mark_of('k2')}-1234")
    stub.on("GET /v1/fine-tunes", {"data": [named]})
    assert await trainer.find_job("k2") is not None


@pytest.mark.parametrize("answer", [{}, {"data": None}, {"data": {}}])
async def test_an_answer_without_a_list_is_no_empty_list(answer: Any) -> None:
    """Where it counts as one, a job whose submit got no answer is paid for twice."""
    trainer = make(Service().on("GET /v1/fine-tunes", answer).on("GET /v1/files", answer), "p")
    for look in (
        lambda: trainer.find_job(REQUEST.key),
        lambda: trainer.jobs_of("abc"),
        lambda: trainer.find_file("a.jsonl", 1),
        lambda: trainer.delete_model("me/m"),
    ):
        with pytest.raises(TransientError, match="no usable field 'data'"):
            await look()


async def test_answers_without_an_id_are_malformed_and_no_mistake_of_the_program() -> None:
    listed = job(suffix=replace(REQUEST, suffix="abc-m0").marked_suffix(SUFFIX_CHARACTERS))
    nameless = {k: v for k, v in listed.items() if k != "id"}
    stub = Service().on("GET /v1/fine-tunes/ft-1", nameless).on("GET /v1/fine-tunes", {"data": [nameless, listed]})
    with pytest.raises(TransientError, match="no usable field 'id'"):
        await make(stub).get("ft-1")
    assert [found.id for found in await make(stub).jobs_of("abc")] == ["ft-1"]


async def test_files() -> None:
    file = {
        "id": "file-7",
        "bytes": 12,
        "created_at": 1,
        "filename": "daunce-x.jsonl",
        "FileType": "jsonl",
        "object": "file",
        "purpose": "fine-tune",
    }
    stub = (
        Service()
        .on("GET /v1/files", {"data": [{**file, "processing_status": "FAILED"}, {**file, "id": "file-8"}]})
        .on(
            "POST /v1/files",
            httpx.Response(302, headers={"Location": "http://together.test/put", "X-Together-File-Id": "file-7"}),
        )
        .on("PUT /put", httpx.Response(200))
        .on("POST /v1/files/file-7/preprocess", file)
        .on("DELETE /v1/files/file-7", {"id": "file-7", "deleted": True})
    )
    trainer = make(stub)
    assert await trainer.find_file("daunce-x.jsonl", 12) == "file-8"
    assert await trainer.find_file("daunce-x.jsonl", 13) is None
    assert await trainer.upload("daunce-x.jsonl", b'{"a": 1}\n\n\n\n') == "file-7"
    put = next(r for r in stub.requests if r.method == "PUT")
    assert put.content == b'{"a": 1}\n\n\n\n'
    assert KEY not in str(put.headers)
    assert b"daunce-x.jsonl" in next(r for r in stub.requests if r.method == "POST").content
    assert await trainer.delete_file("file-7")


MADE = job(
    status="completed",
    model_output_name="me/m",
    model_object_id="ml_1",
    adapter_object_id="ml_2",
    adapter_object_name="project/me-m-adapter",
)


def with_made(stub: Service) -> Service:
    """Jobs, one of which made me/m. The list does not show the objects that the job itself does."""
    listed = [job(id="ft-9", model_output_name="me/other"), job(id="ft-1", model_output_name="me/m")]
    return stub.on("GET /v1/fine-tunes", {"data": listed}).on("GET /v1/fine-tunes/ft-1", MADE)


async def test_clean_up_deletes_the_model_and_its_adapter_and_says_what_it_keeps() -> None:
    stub = with_made(Service()).on("DELETE /v2/projects/p/models", {})
    assert await make(stub, "p").delete_model("me/m")
    assert [p for p in stub.paths if p.startswith("DELETE")] == [
        "DELETE /v2/projects/p/models/ml_2",
        "DELETE /v2/projects/p/models/ml_1",
    ]
    assert not await make(Service(), None).delete_model("me/m")
    stub.on("DELETE /v2/projects/p/models/ml_2", error(409, "in use"))
    assert not await make(stub, "p").delete_model("me/m")
    stub.on("DELETE /v2/projects/p/models/ml_2", error(500))
    with pytest.raises(TransientError):
        await make(stub, "p").delete_model("me/m")
    stub.on("DELETE /v2/projects/p/models/ml_2", error(403, "no permission"))
    assert not await make(stub, "p").delete_model("me/m")


async def test_a_model_whose_objects_are_not_known_counts_as_kept() -> None:
    stub = with_made(Service()).on("DELETE /v2/projects/p/models", {})
    assert not await make(stub, "p").delete_model("me/unknown")
    stub.on("GET /v1/fine-tunes/ft-1", {**MADE, "model_object_id": None, "adapter_object_id": ""})
    assert not await make(stub, "p").delete_model("me/m")
    assert not any(p.startswith("DELETE") for p in stub.paths)


@pytest.mark.parametrize(("status", "kind"), [(400, RejectedError), (409, TransientError)])
async def test_cancelling_a_job_that_has_ended_returns_it(status: int, kind: type[Exception]) -> None:
    stub = (
        Service()
        .on("POST /v1/fine-tunes/ft-1/cancel", error(status, "already finished"))
        .on("GET /v1/fine-tunes/ft-1", job(status="completed", model_output_name="me/m"))
    )
    assert (await make(stub).cancel("ft-1")).status is JobStatus.SUCCEEDED
    stub.on("GET /v1/fine-tunes/ft-1", job(status="running"))
    with pytest.raises(kind):
        await make(stub).cancel("ft-1")


async def test_model_info_is_refused_for_a_model_that_is_not_fine_tuned() -> None:
    assert (await make(service()).model_info(BASE)).id == BASE
    stub = Service().on("GET /v1/fine-tunes/models/limits", error(404, "unknown"))
    with pytest.raises(RejectedError):
        await make(stub).model_info("x")


async def test_a_recording_that_lacks_a_request_is_no_provider_out_of_reach(tmp_path: Path) -> None:
    pytest.importorskip("vcr")
    with record(tmp_path / "r"):
        pass
    with replay(tmp_path / "r"), pytest.raises(ReplayError, match=r"does not answer GET http://together.test.*Record"):
        await make(None).model_info(BASE)


def test_capabilities_say_what_is_paid() -> None:
    capabilities = trainer_capabilities(run_config("together", base_url=None))
    assert capabilities.honours_seed
    assert any("paid by the minute" in note for note in capabilities.notes)


TINY = tokenizer_of(run_config(model="daunce-tiny"))
EXAMPLE = encode_example(Example("p", prompt="Q: What is naïve ✓?\nA:", completion=" a word."), TINY)
Change = Callable[[dict[str, Any]], dict[str, Any]]


def echo(change: Change | None = None) -> Callable[[httpx2.Request], Any]:
    def handler(request: httpx2.Request) -> Any:
        body = body_of(request)
        ids = TINY.encode(body["prompt"])
        values = sequence(body["model"], [i % 40 for i in ids])
        found = {"token_logprobs": values, "token_ids": [float(i) for i in ids], "tokens": TINY.pieces(ids)}
        if change:
            found = change(found)
        choice = {"index": 0, "text": "x", "logprobs": {"token_logprobs": [-0.1], "tokens": ["x"]}}
        answer = {"model": body["model"], "choices": [choice], "prompt": [{"text": body["prompt"], "logprobs": found}]}
        return httpx2.Response(200, content=json.dumps(answer))

    return handler


def open_echo(server: Server, **options: Any) -> Any:
    config = run_config("together", model="daunce-tiny", options=options)
    return together_scorer.open_scorer(server.context(config))


def together_truth(model: str) -> tuple[float, ...]:
    values = sequence(model, [i % 40 for i in EXAMPLE.ids])
    return tuple(float(values[t] or 0.0) for t in EXAMPLE.targets)


async def test_echo_is_read_from_the_top_level_prompt() -> None:
    server = Server(echo())
    (scores,) = await open_echo(server).score("me/m", [EXAMPLE])
    assert scores.logprobs == together_truth("me/m")
    body = server.body()
    assert body["echo"] is True
    assert body["logprobs"] == 1
    assert isinstance(body["prompt"], str)


WRONG: dict[str, tuple[Change, str]] = {
    "no ids": (lambda p: {**p, "token_ids": None}, "did not say which tokens"),
    "other ids": (lambda p: {**p, "token_ids": [0.0, *p["token_ids"][1:]]}, "position 0"),
    "BOS": (lambda p: {k: [1, *v] for k, v in p.items()}, "other tokens"),
    "no values": (lambda p: {}, "did not echo"),
    "one short": (lambda p: {**p, "token_logprobs": p["token_logprobs"][:-1]}, "adds, drops"),
    "null inside": (lambda p: {**p, "token_logprobs": [None] * len(p["token_ids"])}, "None"),
    "stand-in": (lambda p: {**p, "token_logprobs": [-9999.0] * len(p["token_ids"])}, "stand-in"),
    "zeros": (lambda p: {**p, "token_logprobs": [None] + [0.0] * (len(p["token_ids"]) - 1)}, "not measurements"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
async def test_wrong_echoes_raise(change: Change, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        await open_echo(Server(echo(change))).score("me/m", [EXAMPLE])


async def test_an_ignored_echo_is_refused() -> None:
    def generated(request: httpx2.Request) -> Any:
        return {"model": "me/m", "choices": [{"index": 0, "logprobs": {"token_logprobs": [-0.1]}}], "prompt": []}

    with pytest.raises(ContractError, match="did not echo"):
        await open_echo(Server(generated)).score("me/m", [EXAMPLE])


async def test_the_probe_waits_for_a_fine_tune() -> None:
    """The base model may answer serverless, which tells nothing of a fine-tune's endpoint."""
    server = Server(echo(lambda p: {**p, "token_ids": None}))
    with pytest.raises(RejectedError, match="endpoints of their own"):
        await open_echo(server).probe("daunce-tiny", EXAMPLE)
    assert server.requests == []
    assert together_scorer.scorer_capabilities(run_config("together")).tried_on == "fine_tune"


def test_half_a_dedicated_endpoint_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="give all three"):
        together_scorer.scorer_capabilities(run_config("together", options={"endpoint_id": "ep_1"}))


ADAPTERS = "/v2/projects/p/endpoints/ep_1/deployments/dep_1/adapters"


def attachment(state: str) -> dict[str, Any]:
    cluster = {"state": f"ADAPTER_LOAD_STATE_{state}", "adapterModelId": "ml_2", "clusterId": "c"}
    return {"id": "dad_1", "etag": "e7", "adapterModelId": "ml_2", "desiredRevisionId": "r", "perCluster": [cluster]}


def attaching() -> Service:
    return (
        with_made(Service())
        .on(f"POST {ADAPTERS}", attachment("PENDING"))
        .on(f"GET {ADAPTERS}/dad_1", [attachment("LOADING"), attachment("READY"), attachment("READY")])
        .on(f"DELETE {ADAPTERS}/dad_1", {})
    )


def adapter_host(stub: Service, clock: InstantClock | None = None) -> together_scorer.AdapterHost:
    sdk = together.AsyncTogether(
        api_key=KEY, base_url="http://together.test", max_retries=0, http_client=stub.http(), project_id="p"
    )
    calls = Calls("Together", [KEY], together)
    options = together_scorer.TogetherScorerOptions(project_id="p", endpoint_id="ep_1", deployment_id="dep_1")
    return polling(together_scorer.AdapterHost(sdk, calls, options), clock)


async def test_adapters_are_attached_waited_for_and_detached() -> None:
    stub, clock = attaching(), InstantClock()
    host = adapter_host(stub, clock)
    assert await host.load("me/m") == "project/me-m-adapter"
    assert clock.now() == 10.0
    assert stub.bodies(f"POST {ADAPTERS}") == [{"adapterModelId": "ml_2"}]
    await host.unload("me/m")
    assert stub.paths[-1] == f"DELETE {ADAPTERS}/dad_1"
    assert stub.requests[-1].url.params["etag"] == "e7"
    stub.on(f"POST {ADAPTERS}", attachment("FAILED"))
    with pytest.raises(RejectedError, match="could not load"):
        await host.load("me/m")
    with pytest.raises(RejectedError, match="no adapter"):
        await host.load("me/unknown")


async def test_what_another_process_left_attached_is_found_and_detached() -> None:
    other = {**attachment("READY"), "id": "dad_2", "adapterModelId": "ml_9"}
    listed = {"data": [other, attachment("READY")]}
    stub = attaching().on(f"GET {ADAPTERS}", listed).on(f"GET {ADAPTERS}/dad_1", attachment("READY"))
    await adapter_host(stub).unload("me/m")
    assert [p for p in stub.paths if p.startswith("DELETE")] == [f"DELETE {ADAPTERS}/dad_1"]
    stub.on(f"DELETE {ADAPTERS}/dad_1", error(404))
    await adapter_host(stub).unload("me/m")
    await adapter_host(stub).unload("me/unknown")


async def test_a_busy_answer_while_an_adapter_is_attached_is_no_failure() -> None:
    stub = attaching().on(f"GET {ADAPTERS}/dad_1", [error(503), attachment("READY")])
    assert await adapter_host(stub).load("me/m") == "project/me-m-adapter"
