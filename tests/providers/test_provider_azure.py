"""Azure through ``AsyncAzureOpenAI``: its addresses, its key header, jobs and one-token scores."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from provider_support import KEY, Server, chat, polling, run_config
from test_provider_chat_token import answer, entry

from daunce_api._util.clock import InstantClock
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import ConfigurationError, MissingExtraError, RejectedError, StopError, TransientError
from daunce_api.providers import azure
from daunce_api.providers.azure import AzureScorerOptions
from daunce_api.providers.base import JobRequest, JobStatus
from daunce_api.providers.hosting import HostedScorer
from daunce_api.providers.registry import open_backend
from daunce_api.providers.tokenizers import embedded_folder

URL = "https://res.openai.azure.com"
RESOURCE = {"subscription": "sub", "resource_group": "group", "account": "acct"}


def job(**changes: Any) -> dict[str, Any]:
    created = {"id": "ftjob-1", "status": "pending", "created_at": 1, "model": "gpt-4o-mini", "error": {}}
    return {**created, "metadata": {"daunce_key": "k-m0-a0"}, **changes}


def config(**options: Any) -> Any:
    return run_config("azure", base_url=URL, model="gpt-4o-mini", tokenizer=str(embedded_folder()), options=options)


def question() -> EncodedExample:
    """A chat whose answer is one token of the embedded model's tokenizer, which needs no download."""
    return encode_example(chat("Is it?", "or"), azure.open_tokenizer(config()))


LISTED = [entry("no", -0.3), entry("or", -1.5), entry("maybe", -4.0)]


async def test_jobs_go_to_the_resources_own_address_with_its_key_header() -> None:
    server = Server(lambda _: job())
    trainer = azure.open_trainer(server.context(config(), URL))
    async with trainer:
        created = await trainer.submit(JobRequest("k-m0-a0", "gpt-4o-mini", "file-1", 7, {"n_epochs": 2}, "s"))
    assert created.status is JobStatus.RUNNING
    sent = server.requests[0]
    assert f"{sent.url.scheme}://{sent.url.host}{sent.url.path}" == f"{URL}/openai/fine_tuning/jobs"
    assert sent.url.params["api-version"]
    assert sent.headers["api-key"] == KEY
    assert KEY not in sent.headers.get("authorization", "")
    body = server.body(0)
    assert (body["seed"], body["training_file"]) == (7, "file-1")
    assert body["metadata"]["daunce_key"] == "k-m0-a0"


async def test_a_lost_job_is_found_by_its_metadata() -> None:
    server = Server(lambda _: {"data": [job(id="other", metadata={}), job()], "has_more": False})
    trainer = azure.open_trainer(server.context(config(), URL))
    found = await trainer.find_job("k-m0-a0")
    assert found is not None
    assert found.id == "ftjob-1"


def file(status: str, **changes: Any) -> dict[str, Any]:
    return {"id": "file-1", "object": "file", "filename": "daunce-x.jsonl", "bytes": 3, "status": status, **changes}


def azure_trainer(server: Server, clock: InstantClock | None = None) -> azure.AzureTrainer:
    return polling(azure.AzureTrainer(server.client(URL), config()), clock)


async def test_files_are_uploaded_read_found_and_deleted() -> None:
    states = iter(["pending", "running", "notRunning", "processed"])

    def handler(request: httpx2.Request) -> Any:
        if request.method == "DELETE":
            return {"id": "file-1", "deleted": True}
        if request.url.path.endswith("/files/file-1"):
            return file(next(states))
        if request.method == "POST":
            return file("pending")
        listed = [file("error", id="file-0"), file("pending", id="file-2", bytes=4), file("processed")]
        return {"data": listed, "has_more": False}

    server, clock = Server(handler), InstantClock()
    trainer = azure_trainer(server, clock)
    assert await trainer.upload("daunce-x.jsonl", b"{}\n") == "file-1"
    assert clock.now() == 15.0, "a job on a file that is not read yet is refused"
    assert await trainer.find_file("daunce-x.jsonl", 3) == "file-1"
    assert await trainer.find_file("daunce-x.jsonl", 5) is None
    assert await trainer.delete_file("file-1")
    gone = Server(lambda _: httpx2.Response(404, json={"error": {"code": "NotFound", "message": "gone"}}))
    assert await azure_trainer(gone).delete_file("file-1")
    kept = Server(lambda _: httpx2.Response(400, json={"error": {"code": "InUse", "message": "in use"}}))
    assert not await azure_trainer(kept).delete_file("file-1")
    assert not await azure_trainer(kept).delete_model("ft:m")


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("error", RejectedError, "line 3 is no chat"),
        ("deleted", RejectedError, "line 3 is no chat"),
        ("running", TransientError, "not ready after 10 minutes"),
    ],
)
async def test_files_at_fault_and_files_that_take_too_long(status: str, kind: type[Exception], words: str) -> None:
    server = Server(lambda _: file(status, status_details=f"line 3 is no chat {KEY}"))
    with pytest.raises(kind, match=words) as info:
        await azure_trainer(server).upload("daunce-x.jsonl", b"{}\n")
    assert KEY not in str(info.value)


async def test_a_job_on_a_file_that_is_not_read_yet_is_tried_again() -> None:
    refused = httpx2.Response(400, json={"error": {"code": "invalidPayload", "message": "the file is not ready"}})
    gone = httpx2.Response(404, json={"error": {"message": "gone"}})
    looks = iter([file("running"), file("processed"), gone])

    def handler(request: httpx2.Request) -> Any:
        return refused if request.method == "POST" else next(looks)

    trainer = azure_trainer(Server(handler))
    request = JobRequest("k-m0-a0", "gpt-4o-mini", "file-1", 7, {}, "s")
    with pytest.raises(TransientError, match="still reading"):
        await trainer.submit(request)
    for _ in range(2):  # read by now, then gone: neither is a matter of time
        with pytest.raises(RejectedError, match="not ready"):
            await trainer.submit(request)


STATES = {
    "notRunning": JobStatus.RUNNING,
    "pending": JobStatus.RUNNING,
    "validating_files": JobStatus.QUEUED,
    "queued": JobStatus.QUEUED,
    "running": JobStatus.RUNNING,
    "paused": JobStatus.RUNNING,
    "succeeded": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
}


@pytest.mark.parametrize(("state", "status"), STATES.items())
async def test_states_of_jobs(state: str, status: JobStatus) -> None:
    answer = job(status=state, fine_tuned_model="ft:m", trained_tokens=9, error={"code": "x", "message": f"bad {KEY}"})
    found = await azure_trainer(Server(lambda _: answer)).get("ftjob-1")
    assert (found.status, found.trained_tokens) == (status, 9)
    assert (found.error is not None) is (status is JobStatus.FAILED)
    assert KEY not in str(found.error)


async def test_jobs_are_cancelled_and_models_deleted() -> None:
    def handler(request: httpx2.Request) -> Any:
        if request.method == "DELETE":
            return {"id": "ft:m", "deleted": True}
        return job(status="cancelled" if any(path.endswith("/cancel") for path in server.paths) else "running")

    server = Server(handler)
    trainer = azure_trainer(server)
    assert (await trainer.cancel("ftjob-1")).status is JobStatus.CANCELLED
    assert await trainer.delete_model("ft:m")
    assert server.paths[-1].startswith("DELETE ")


@pytest.mark.parametrize("address", [URL, f"{URL}/openai/v1", f"{URL}/openai"])
async def test_a_deployment_is_asked_and_may_answer_as_its_base_model(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(lambda _: {**answer(LISTED), "model": "gpt-4o-mini-2024-07-18"})
    scorer = azure.open_scorer(server.context(config(), address))
    (scores,) = await scorer.score("my-deployment", [question()])
    assert scores.logprobs == (-1.5,)
    sent = server.requests[0]
    assert sent.url.path == "/openai/deployments/my-deployment/chat/completions"
    assert sent.headers["api-key"] == KEY


async def test_fine_tunes_are_deployed_scored_and_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_MANAGEMENT_TOKEN", "token-marked")

    def handler(request: httpx2.Request) -> Any:
        if request.url.host == "management.azure.com":
            assert request.headers["authorization"] == "Bearer token-marked"
            assert KEY not in str(request.headers)
            return {"properties": {"provisioningState": "Succeeded"}}
        assert "token-marked" not in str(request.headers)
        return answer(LISTED)

    server = Server(handler)
    scorer = azure.open_scorer(server.context(config(**RESOURCE), URL))
    assert isinstance(scorer, HostedScorer)
    assert scorer.capabilities.max_models == 1
    async with scorer:
        (scores,) = await scorer.score("ft:gpt-4o-mini:x", [question()])
        assert scores.logprobs == (-1.5,)
    assert [p.split("/")[0].strip() for p in server.paths] == ["PUT", "POST", "DELETE"]


async def test_a_wrong_key_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(lambda _: httpx2.Response(401, json={"error": {"code": "401", "message": f"bad {KEY}"}}))
    trainer = azure.open_trainer(server.context(config(), URL))
    with pytest.raises(StopError) as info:
        await trainer.get("ftjob-1")
    assert KEY not in str(info.value)


async def test_the_key_and_the_address_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="base_url"):
        async with open_backend(run_config("azure", base_url=None)):
            pass
    capabilities = azure.scorer_capabilities(config())
    assert capabilities.scope == "one_token"
    assert any("by the hour" in note for note in capabilities.notes)


async def test_the_kind_of_training_and_the_surface_without_dates() -> None:
    server = Server(lambda _: {"id": "ftjob-1", "object": "fine_tuning.job", "status": "queued"})
    options = {"training_type": "developerTier", "api_version": "v1"}
    given = run_config("azure", base_url=URL, trainer_options=options)
    trainer = azure.open_trainer(server.context(given, URL))
    await trainer.submit(JobRequest("k-m0-a0", "gpt-4o-mini", "file-1", 7, {}, "s"))
    assert server.body()["trainingType"] == "developerTier"
    assert server.requests[0].url.path == "/openai/v1/fine_tuning/jobs"
    assert "api-version" not in server.requests[0].url.params
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_azures_own_sign_in_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    options = AzureScorerOptions(azure_identity=True)
    azure._credential.cache_clear()
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(MissingExtraError, match="azure"):
        azure.management_token(options)
    signed_in = SimpleNamespace(get_token=lambda scope: SimpleNamespace(token=f"token for {scope}"))
    monkeypatch.setitem(sys.modules, "azure", SimpleNamespace())
    module = SimpleNamespace(DefaultAzureCredential=lambda: signed_in)
    monkeypatch.setitem(sys.modules, "azure.identity", module)
    assert azure.management_token(options) == "token for https://management.azure.com/.default"

    def refuse(_: str) -> Any:
        raise RuntimeError(f"secret {KEY}")

    monkeypatch.setattr(signed_in, "get_token", refuse)
    with pytest.raises(ConfigurationError, match=r"az login") as info:
        azure.management_token(options)
    assert KEY not in str(info.value)
    azure._credential.cache_clear()


async def test_an_answer_is_generated_on_the_deployment_of_its_model() -> None:
    server = Server(lambda _: {"choices": [{"message": {"content": "yes"}}]})
    scorer: Any = azure.open_scorer(server.context(config(), URL))
    assert await scorer.generate("ft-m", [{"role": "user", "content": "Is it?"}], max_tokens=3) == "yes"
    assert server.paths == ["POST /openai/deployments/ft-m/chat/completions"]
