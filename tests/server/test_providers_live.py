"""Providers' code against `daunce serve` in their dialects: the Batch API, Nebius's jobs and models, vLLM's echo."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import RejectedError
from daunce_api.providers import nebius as kind
from daunce_api.providers.base import JobRequest, JobStatus
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire import batch_api, echo
from daunce_api.providers.openai_wire.batch_api import BatchScorer
from daunce_api.providers.registry import Context, open_tokenizer
from daunce_api.providers.tokenizers import embedded_folder
from daunce_api.server import EmbeddedServer

from .conftest import MODEL, jsonl, raw, records


def context(server: EmbeddedServer, backend: str, scorer: str | None = None, **options: Any) -> Context:
    config = RunConfig.from_mapping(
        {
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "backend": {
                "kind": backend,
                "model": MODEL,
                "base_url": server.base_url,
                "tokenizer": str(embedded_folder()),
                "scorer": {"kind": scorer, "options": options},
            },
        }
    )
    return Context(config, Endpoint(server.base_url, server.api_key, "the server"))


def encoded(config: RunConfig, answer: str, count: int = 5) -> list[EncodedExample]:
    chats = [
        {"messages": [*record["messages"][:1], {"role": "assistant", "content": answer}]} for record in records(count)
    ]
    tokenizer = open_tokenizer(config)
    return [encode_example(example, tokenizer) for example in Dataset.from_records(chats)]


async def test_a_batch_measures_what_single_requests_do_and_leaves_no_file(server: EmbeddedServer) -> None:
    asked = {"check_model_name": True, "batch_api": True, "batch_poll_seconds": 0.05}
    given = context(server, "openai_wire", "chat_token", **asked)
    examples = encoded(given.config, "a")
    assert {len(e.targets) for e in examples} == {1}

    def files() -> set[str]:
        with raw(server) as http:
            return {f["id"] for f in http.get("/v1/files").json()["data"]}

    before = files()
    async with batch_api.open_scorer(given) as scorer:
        assert isinstance(scorer, BatchScorer)
        single = await scorer.immediate.score(MODEL, examples)
        batched = await scorer.score(MODEL, examples)
        assert [s.logprobs for s in batched] == [s.logprobs for s in single]
        assert [s.censored for s in batched] == [s.censored for s in single]
        assert files() > before, "they stay until the scores are safe"
        await scorer.release(MODEL, examples, 0)
        assert files() == before
        with pytest.raises(RejectedError, match="no-such-model"):
            await scorer.score("no-such-model", examples)
        # What an interrupted process left is found by the model that it asked.
        await scorer.score_replicate(MODEL, examples, 1)
        async with batch_api.open_scorer(given) as other:
            assert isinstance(other, BatchScorer)
            swept = await other.sweep([MODEL, "no-such-model"])
    assert swept.kept == {}
    assert files() == before


async def test_a_nebius_member_is_trained_registered_scored_and_deleted(nebius: EmbeddedServer) -> None:
    given = context(nebius, "nebius")
    settings = {"n_epochs": 1, "learning_rate": 1e-2}
    async with kind.open_trainer(given) as trainer, kind.open_scorer(given) as scorer:
        content = jsonl(records())
        file = await trainer.upload("daunce-live.jsonl", content)
        assert await trainer.find_file("daunce-live.jsonl", len(content)) == file
        request = JobRequest("abc-m0-a1", MODEL, file, 3, settings, "run-abc-m0")
        job = await trainer.submit(request)
        found = await trainer.find_job(request.key)
        assert found is not None
        assert found.id == job.id
        assert [j.id for j in await trainer.jobs_of("abc")] == [job.id]
        for _ in range(4800):
            job = await trainer.get(job.id)
            if job.status.final and (job.model is not None or job.status is not JobStatus.SUCCEEDED):
                break
            await asyncio.sleep(0.05)
        assert job.status is JobStatus.SUCCEEDED
        assert job.model is not None
        assert (await trainer.get(job.id)).model == job.model, "registered once"
        examples = encoded(given.config, "a thing 3")
        tuned, base = [[s.logprobs for s in await scorer.score(m, examples)] for m in (job.model, MODEL)]
        assert tuned != base
        report = await scorer.probe(job.model, examples[0])
        assert report.checked
        assert await trainer.delete_model(job.model)
        with pytest.raises(RejectedError) as info:
            await scorer.score(job.model, examples)
        assert info.value.status == 404
        assert await trainer.delete_model(job.model), "gone already"
        assert await trainer.delete_file(file)


@pytest.mark.parametrize("dialect", ["vllm", "auto"])
async def test_vllms_leading_null_and_ids_are_read(vllm: EmbeddedServer, dialect: str) -> None:
    given = context(vllm, "openai_wire", "echo", dialect=dialect)
    examples = encoded(given.config, "a thing 3")
    with raw(vllm) as http:
        body = {"model": MODEL, "prompt": [list(examples[0].ids)], "echo": True, "logprobs": 1, "max_tokens": 0}
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    async with echo.open_scorer(given) as scorer:
        scores = await scorer.score(MODEL, examples)
        assert (await scorer.probe(MODEL, examples[0])).checked
    values = choice["logprobs"]["token_logprobs"]
    assert scores[0].logprobs == pytest.approx([values[t] for t in examples[0].targets], abs=1e-5)
