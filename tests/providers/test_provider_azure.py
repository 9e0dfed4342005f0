"""Azure through ``AsyncAzureOpenAI``: its addresses, its key header, jobs and one-token scores."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from provider_support import KEY, Server, chat, run_config
from test_provider_chat_token import answer, entry

from daunce_api.backends import azure
from daunce_api.backends.base import JobRequest, JobStatus
from daunce_api.backends.hosting import HostedScorer
from daunce_api.backends.registry import open_backend
from daunce_api.backends.tokenizers import embedded_folder
from daunce_api.errors import ConfigurationError, StopError
from daunce_api.tokens import EncodedExample, encode_example

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


def test_the_key_and_the_address_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="base_url"):
        open_backend(run_config("azure", base_url=None))
    capabilities = azure.scorer_capabilities(config())
    assert capabilities.scope == "one_token"
    assert any("by the hour" in note for note in capabilities.notes)
