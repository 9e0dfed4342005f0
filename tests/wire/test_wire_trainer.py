"""The trainer against every shape of job, list and error that a server may send."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from wire_support import Server, failing, job_object, openai_error

from daunce_api.errors import AmbiguousSubmitError, RejectedError, StopError, TransientError
from daunce_api.providers.base import Checkpointing, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from daunce_api.providers.openai_wire.trainer import WireTrainer, WireTrainerOptions

REQUEST = JobRequest("abc-m3-a0", "base", "file-1", 17, {"n_epochs": 2, "learning_rate_multiplier": 0.5}, "run-m3")


async def test_submit_sends_everything_once() -> None:
    server = Server(lambda _: job_object(status="queued"))
    job = await server.trainer().submit(REQUEST)
    assert (job.id, job.status, job.model, job.error) == ("ftjob-1", JobStatus.QUEUED, None, None)
    assert server.body() == {
        "model": "base",
        "training_file": "file-1",
        "seed": 17,
        "suffix": "run-m3",
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.5}},
        },
        "metadata": {"daunce_key": "abc-m3-a0", "daunce_run": "abc"},
    }
    assert len(server.requests) == 1
    await server.trainer().submit(replace(REQUEST, validation_file_id="file-2"))
    assert server.body()["validation_file"] == "file-2"


async def test_suffix_is_cut_and_no_hyperparameters_are_invented() -> None:
    server = Server(lambda _: job_object())
    await server.trainer().submit(JobRequest("k", "base", "f", 0, {}, "s" * 100))
    assert server.body()["suffix"] == "s" * 64
    assert server.body()["method"] == {"type": "supervised", "supervised": {}}


@pytest.mark.parametrize("broken", [{"id": None}, {"id": 3}, {"status": None}])
async def test_a_submit_answered_with_nonsense_is_ambiguous(broken: dict[str, Any]) -> None:
    with pytest.raises(AmbiguousSubmitError):
        await Server(lambda _: job_object(**broken)).trainer().submit(REQUEST)
    with pytest.raises(TransientError):
        await Server(lambda _: job_object(**broken)).trainer().get("ftjob-1")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("validating_files", JobStatus.QUEUED),
        ("queued", JobStatus.QUEUED),
        ("running", JobStatus.RUNNING),
        ("paused", JobStatus.RUNNING),
        ("some_future_state", JobStatus.RUNNING),
        ("failed", JobStatus.FAILED),
        ("cancelled", JobStatus.CANCELLED),
    ],
)
async def test_states(status: str, expected: JobStatus) -> None:
    job = await Server(lambda _: job_object(status=status)).trainer().get("ftjob-1")
    assert job.status is expected


@pytest.mark.parametrize("error", [{}, None, {"code": None, "message": None, "param": None}])
async def test_an_empty_error_on_a_healthy_job_is_none(error: Any) -> None:
    done = job_object(status="succeeded", fine_tuned_model="ft:base:x", trained_tokens=1234, error=error)
    job = await Server(lambda _: done).trainer().get("ftjob-1")
    assert (job.status, job.model, job.error, job.trained_tokens) == (JobStatus.SUCCEEDED, "ft:base:x", None, 1234)
    job = await Server(lambda _: job_object(status="failed", error=error)).trainer().get("ftjob-1")
    assert job.error == "the provider gave no reason"


async def test_a_failed_job_says_why() -> None:
    error = {"code": "invalid_training_file", "message": "line 3\x1b is bad", "param": "training_file"}
    job = await Server(lambda _: job_object(status="failed", error=error)).trainer().get("ftjob-1")
    assert job.error == "invalid_training_file: line 3  is bad: training_file"
    assert job.refused
    crashed = {"code": "server_error", "message": "internal error", "param": None}
    job = await Server(lambda _: job_object(status="failed", error=crashed)).trainer().get("ftjob-1")
    assert not job.refused


@pytest.mark.parametrize("blocked", [{"data": {"blocked": True}}, {"level": "error"}])
async def test_a_withheld_model_is_a_failure_and_a_late_name_is_not(blocked: dict[str, Any]) -> None:
    events: list[dict[str, Any]] = [{"type": "message", "message": "done", "created_at": 1}]

    def handler(request: httpx2.Request) -> Any:
        return {"data": events} if request.url.path.endswith("/events") else job_object(status="succeeded")

    trainer = Server(handler).trainer()
    job = await trainer.get("ftjob-1")
    assert (job.status, job.model) == (JobStatus.SUCCEEDED, None)  # whoever waits for it decides how long
    check: dict[str, Any] = {"type": "moderation_checks", "level": "info", "message": "passed", "created_at": 2}
    events.append({**check, "data": {"blocked": False, "results": []}})
    assert (await trainer.get("ftjob-1")).status is JobStatus.SUCCEEDED, "a check that it passed"
    events[1] = {**check, "message": "refused by a safety check", **blocked}
    job = await trainer.get("ftjob-1")
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert "refused by a safety check" in job.error


async def test_checkpoints_are_the_models_before_the_final_one() -> None:
    """By step, whatever the order of the list; the highest step holds the final model's weights."""
    names = {80: "ft:base::x:ckpt-step-80", 160: "ft:base::x:ckpt-step-160", 240: "ft:base::x"}
    items: list[Any] = [
        {"id": f"ckpt-{step}", "step_number": step, "fine_tuned_model_checkpoint": names[step]}
        for step in (240, 80, 160)
    ]
    asked: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> Any:
        asked.append(request)
        after = request.url.params.get("after")
        rest = items if after is None else items[[i["id"] for i in items].index(after) + 1 :]
        return {"object": "list", "data": [*rest[:2], "junk"], "has_more": len(rest) > 2}

    trainer = Server(handler).trainer()
    assert isinstance(trainer, Checkpointing)
    assert await trainer.checkpoints("ftjob-1") == [names[80], names[160]]
    assert [r.url.path.rpartition("/v1")[2] for r in asked] == ["/fine_tuning/jobs/ftjob-1/checkpoints"] * 2
    del items[:]
    assert await trainer.checkpoints("ftjob-1") == []


def paged(items: list[dict[str, Any]], size: int) -> Any:
    """A list endpoint with ``after``."""

    def handler(request: httpx2.Request) -> dict[str, Any]:
        after = request.url.params.get("after")
        start = next((i + 1 for i, item in enumerate(items) if item["id"] == after), 0)
        return {"object": "list", "data": items[start : start + size], "has_more": start + size < len(items)}

    return handler


async def test_find_job_filters_and_pages() -> None:
    jobs = [job_object(id=f"ftjob-{i}", metadata={"daunce_key": f"abc-m{i}-a0"}) for i in range(7)]
    jobs[5]["metadata"] = None
    server = Server(paged(jobs, 2))
    job = await server.trainer().find_job("abc-m6-a0")
    assert job is not None
    assert job.id == "ftjob-6"
    assert server.requests[0].url.params["metadata[daunce_key]"] == "abc-m6-a0"
    assert [r.url.params.get("after") for r in server.requests] == [None, "ftjob-1", "ftjob-3", "ftjob-5"]
    assert await server.trainer().find_job("abc-m5-a0") is None


async def test_of_two_jobs_with_one_key_the_older_counts() -> None:
    jobs = [job_object(id="young", created_at=9), job_object(id="old", created_at=2)]
    job = await Server(paged(jobs, 10)).trainer().find_job("abc-m0-a0")
    assert job is not None
    assert job.id == "old"


async def test_a_server_that_repeats_its_page_does_not_hold_us_forever() -> None:
    page = {"data": [{"id": "file-1", "filename": "a", "bytes": 1}], "has_more": True}
    server = Server(lambda _: page)
    assert await server.trainer().find_file("b", 1) is None
    assert len(server.requests) == 2


async def test_find_file_by_name_and_size() -> None:
    files = [
        {"id": "file-1", "filename": "daunce-r-1.jsonl", "bytes": 10, "status": "error"},
        {"id": "file-2", "filename": "daunce-r-1.jsonl", "bytes": 11, "status": "processed"},
        {"id": "file-3", "filename": "daunce-r-1.jsonl", "bytes": 10, "status": "processed"},
        "nonsense",
    ]
    server = Server(lambda _: {"data": files})
    assert await server.trainer().find_file("daunce-r-1.jsonl", 10) == "file-3"
    assert server.requests[0].url.params["purpose"] == "fine-tune"
    assert await server.trainer().find_file("daunce-r-2.jsonl", 10) is None


async def test_upload() -> None:
    server = Server(lambda _: {"id": "file-9"})
    assert await server.trainer().upload("name.jsonl", b'{"a": 1}\n') == "file-9"
    sent = server.requests[0].content
    assert b'name="purpose"\r\n\r\nfine-tune\r\n' in sent
    assert b'filename="name.jsonl"' in sent
    assert b'{"a": 1}\n' in sent


@pytest.mark.parametrize("date", [None, "2027-01-14"])
async def test_model_info_carries_the_shutdown_date(date: str | None) -> None:
    answer = {"id": "m", "object": "model", "created": 0, "owned_by": "x", "shutdown_date": date}
    assert await Server(lambda _: answer).trainer().model_info("m") == ModelInfo("m", date)
    with pytest.raises(RejectedError, match="shut down"):
        await Server(failing(404, openai_error("gone", "model_not_found"))).trainer().model_info("m")


@pytest.mark.parametrize("status", [400, 409])
async def test_cancelling_a_finished_job_returns_it(status: int) -> None:
    def handler(request: httpx2.Request) -> Any:
        if request.method == "POST":
            return httpx2.Response(status, json=openai_error("Job has already completed"))
        return job_object(status="failed")

    assert (await Server(handler).trainer().cancel("ftjob-1")).status is JobStatus.FAILED
    with pytest.raises(RejectedError):
        await Server(failing(404, openai_error("no job"))).trainer().cancel("ftjob-1")


@pytest.mark.parametrize(
    ("handler", "gone"),
    [
        (lambda _: {"id": "file-1", "deleted": True}, True),
        (lambda _: {"id": "file-1", "deleted": False}, False),
        (failing(404, openai_error("no such thing")), True),
        (failing(404, openai_error("Invalid URL (DELETE /files/file-1)")), False),
        (failing(403, openai_error("owners only")), False),
        (failing(400, openai_error("in use")), False),
    ],
)
async def test_delete_says_what_is_gone(handler: Any, gone: bool) -> None:
    trainer = Server(handler).trainer()
    assert await trainer.delete_file("file-1") is gone
    assert await trainer.delete_model("ft:x") is gone


async def test_delete_with_a_bad_key_stops() -> None:
    with pytest.raises(StopError):
        await Server(failing(401, openai_error("bad key"))).trainer().delete_file("file-1")


async def test_a_job_without_metadata_is_found_by_its_suffix() -> None:
    """Servers of OpenAI's wire that drop metadata would otherwise be paid twice for a submit without an answer."""
    jobs: list[dict[str, Any]] = []

    def handler(request: httpx2.Request) -> Any:
        if request.method == "POST":
            body = json.loads(request.content)
            jobs.append({"id": f"ftjob-{len(jobs)}", "status": "running", "suffix": body["suffix"]})
            return jobs[-1]
        return {"data": jobs, "has_more": False}

    server = Server(handler)
    trainer = server.trainer(key_in={"metadata", "suffix"})
    request = JobRequest("abc-m0-a0", "base", "file-1", 1, {"lora": True, "n_epochs": 2}, "a-run-with-a-long-name" * 4)
    job = await trainer.submit(request)
    body = json.loads(server.requests[0].content)
    assert body["method"]["supervised"]["hyperparameters"] == {"lora": True, "n_epochs": 2}
    assert body["metadata"]["daunce_key"] == "abc-m0-a0"
    assert len(body["suffix"]) <= 64
    found = await trainer.find_job("abc-m0-a0")
    assert found is not None
    assert found.id == job.id
    assert await trainer.find_job("abc-m0-a1") is None
    jobs[0]["metadata"] = {"daunce_key": "abc-m9-a0"}
    assert await trainer.find_job("abc-m0-a0") is None, "metadata says whose it is"


async def test_fields_of_the_provider_travel_with_a_job() -> None:
    server = Server(lambda _: job_object())
    await server.trainer(extra_body={"trainingType": "developerTier"}).submit(
        JobRequest("abc-m0-a0", "base", "file-1", 1, {}, "s")
    )
    assert json.loads(server.requests[0].content)["trainingType"] == "developerTier"


@pytest.mark.parametrize("events", [404, 200])
async def test_the_model_of_a_job_without_a_name_is_its_last_checkpoint(events: int) -> None:
    def handler(request: httpx2.Request) -> Any:
        if request.url.path.endswith("/checkpoints"):
            listed = [{"id": f"c{s}", "step_number": s, "fine_tuned_model_checkpoint": f"ft:s{s}"} for s in (9, 3)]
            return {"data": listed, "has_more": False}
        if request.url.path.endswith("/events"):
            return httpx2.Response(events, json={"data": []} if events == 200 else {"error": {"message": "no route"}})
        return job_object(status="succeeded")

    server = Server(handler)
    capabilities = TrainerCapabilities("test", 3)
    trainer = WireTrainer(server.client(), capabilities, WireTrainerOptions(), checkpoint_is_model=True)
    assert (await trainer.get("ftjob-1")).model == "ft:s9"
    assert (await WireTrainer(server.client(), capabilities, WireTrainerOptions()).get("ftjob-1")).model is None
