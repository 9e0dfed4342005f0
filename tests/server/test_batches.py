"""The Batch API, and the dialects of other services, as the official SDK sees them."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from daunce_api.server import EmbeddedServer, InjectSettings, routes_batches
from daunce_api.server.gate import MAX_BODY_BYTES

from .conftest import MODEL, jsonl, offline, raw, records, upload, wait


def _sdk(server: EmbeddedServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0)


def _question(identity: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": f"what is {identity}"}], "temperature": 0}
    return {"custom_id": identity, "method": "POST", "url": url, "body": asked | {"max_tokens": 1} | body}


def _batch(sdk: openai.OpenAI, lines: list[Any], endpoint: Any = "/v1/chat/completions") -> Any:
    file = sdk.files.create(file=("batch.jsonl", jsonl(lines)), purpose="batch")
    batch = sdk.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"mark": "m-1"}
    )
    deadline = time.monotonic() + 240
    while batch.status not in ("completed", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.05)
        batch = sdk.batches.retrieve(batch.id)
    return batch


def test_a_batch_answers_as_single_requests_do(server: EmbeddedServer) -> None:
    sdk = _sdk(server)
    lines = [_question(f"q-{i}", logprobs=True, top_logprobs=5) for i in range(4)] + [_question("bad", n=2)]
    batch = _batch(sdk, lines)
    assert (batch.status, batch.metadata) == ("completed", {"mark": "m-1"})
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 4, 1)
    answers = [json.loads(line) for line in sdk.files.content(batch.output_file_id).text.splitlines()]
    assert [a["custom_id"] for a in answers] == ["q-0", "q-1", "q-2", "q-3"]
    for line, answer in zip(lines, answers, strict=False):
        single = sdk.chat.completions.create(**line["body"])
        assert answer["response"]["body"]["choices"][0]["logprobs"] == single.choices[0].logprobs.model_dump()  # type: ignore[union-attr]
    [error] = [json.loads(line) for line in sdk.files.content(batch.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
    assert batch.id in [b.id for b in sdk.batches.list()]
    with pytest.raises(openai.BadRequestError, match="completed already"):
        sdk.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"custom_id": "a"}], "Line 1"),
        ([_question("a"), _question("a")], "custom_id of line 2"),
        ([_question("a", url="/v1/completions")], "not a POST to"),
        ([_question("a", user="x" * MAX_BODY_BYTES)], "Line 1 has more than"),
    ],
)
def test_files_that_are_no_batch(server: EmbeddedServer, lines: list[Any], words: str) -> None:
    batch = _batch(_sdk(server), lines)
    assert batch.status == "failed"
    assert words in batch.errors.data[0].message


def test_a_batch_needs_a_file_of_its_own_purpose(server: EmbeddedServer) -> None:
    sdk = _sdk(server)
    file = upload(sdk, jsonl(records()))
    for identity in (file, "file-unknown"):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.batches.create(input_file_id=identity, endpoint="/v1/chat/completions", completion_window="24h")
        assert caught.value.param == "input_file_id"


def test_a_nebius_job_names_no_model_and_its_checkpoint_becomes_one(nebius: EmbeddedServer) -> None:
    sdk = _sdk(nebius)
    file = upload(sdk, jsonl(records()))
    with raw(nebius) as http:
        job = {"model": MODEL, "training_file": file, "seed": 1, "suffix": "m0-a1"}
        for change, param in (({}, "lora"), ({"lora": True}, "packing")):
            refused = http.post("/v1/fine_tuning/jobs", json={**job, "hyperparameters": change})
            assert refused.json()["error"]["param"] == f"hyperparameters.{param}"
        assert http.post("/v1/fine_tuning/jobs", json={**job, "metadata": {"k": "v"}}).status_code == 400
        settings = {"lora": True, "packing": False, "learning_rate": 1e-3, "n_epochs": 2}
        created = http.post("/v1/fine_tuning/jobs", json={**job, "hyperparameters": settings}).json()
        done = wait(sdk, created["id"])
        assert done.status == "succeeded"
        shown = http.get(f"/v1/fine_tuning/jobs/{done.id}").json()
        assert not {"fine_tuned_model", "metadata"} & set(shown)
        assert shown["suffix"] == "m0-a1"
        [last, first] = http.get(f"/v1/fine_tuning/jobs/{done.id}/checkpoints").json()["data"]
        ask = {"prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 0}
        unserved = http.post("/v1/completions", json={**ask, "model": last["fine_tuned_model_checkpoint"]})
        assert unserved.status_code == 404

        def make(checkpoint: Any) -> Any:
            source = f"{done.id}:{checkpoint['id']}"
            return http.post("/v0/models", json={"name": "m", "base_model": MODEL, "source": source}).json()

        models = {checkpoint["id"]: make(checkpoint)["name"] for checkpoint in (last, first)}
        twin = make(first)
        assert twin["status"] == "active"
        values = [
            http.post("/v1/completions", json={**ask, "model": name}).json()["choices"][0]["logprobs"]["token_logprobs"]
            for name in (MODEL, *models.values())
        ]
        assert len({tuple(v) for v in values}) == 3
        listed = http.get("/v0/models").json()["data"]
        assert {m["name"] for m in listed} == {*models.values(), twin["name"]}
        assert http.delete(f"/v1/models/{twin['name']}").status_code == 200  # and its weights stay with the other one
        assert http.delete(f"/v0/models/{models[last['id']]}").json()["status"] == "deleted"
        assert http.get(f"/v0/models/{models[last['id']]}").status_code == 404
        assert http.post("/v1/completions", json={**ask, "model": models[first["id"]]}).status_code == 200
        bad = http.post("/v0/models", json={"name": "m", "base_model": MODEL, "source": f"{done.id}:ftckpt-x"})
        assert bad.json()["error"]["param"] == "source"
        lacking = http.post("/v0/models", json={"name": "m", "base_model": MODEL})
        assert lacking.json()["error"]["param"] == "source"


async def test_what_is_new_at_nebius_is_hidden_for_a_while(tmp_path: Path) -> None:
    app, service = offline(tmp_path, dialect="nebius", inject=InjectSettings(model_lag=1000))
    values = {"checkpoint_id": "ckpt", "base": MODEL, "created_at": 1, "adapter": "ftjob-1/final", "fingerprint": "f"}
    service.state.insert("models", id="ft:m", job="ftjob-1", **values)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as http:
        body = {"name": "m", "base_model": MODEL, "source": "ftjob-1:ckpt"}
        made = await http.post("/v0/models", json=body)
        assert made.status_code == 200
        assert (await http.get(f"/v0/models/{made.json()['name']}")).status_code == 404
        assert (await http.get("/v0/models")).json()["data"] == []
    service.state.close()


async def test_a_batch_is_checked_beside_other_requests_and_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read in a thread. While the disk is full the batch is in progress; then it is answered once more, and
    nothing is left of the first time."""
    app, service = offline(tmp_path)
    begun, checked = asyncio.Event(), threading.Event()
    failures = [OSError(errno.ENOSPC, "No space left on device")]
    loop = asyncio.get_running_loop()
    check, answer = routes_batches._check, routes_batches._answer

    def slow_check(*arguments: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert checked.wait(10)
        check(*arguments)

    async def answer_or_fail(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return await answer(*arguments)

    monkeypatch.setattr(routes_batches, "_check", slow_check)
    monkeypatch.setattr(routes_batches, "_answer", answer_or_fail)
    monkeypatch.setattr("daunce_api.server.scheduler.STORAGE_WAIT_SECONDS", 0.0)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as http:
        part = ("b.jsonl", jsonl([_question("a", n=2), _question("b", n=2)]))
        file = (await http.post("/v1/files", files={"file": part}, data={"purpose": "batch"})).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await http.post("/v1/batches", json=body)).json()
        [task] = service.batches.values()
        await begun.wait()
        assert (await http.get(f"/v1/batches/{batch['id']}")).json()["status"] == "in_progress"
        checked.set()
        await task
        batch = (await http.get(f"/v1/batches/{batch['id']}")).json()
    assert (batch["status"], batch["request_counts"]["failed"]) == ("completed", 2)
    assert batch["output_file_id"] is None
    assert {path.name for path in service.state.files_dir.iterdir()} == {file, batch["error_file_id"]}
    service.state.close()


async def test_batches_that_a_server_left_are_answered_by_the_next_one(tmp_path: Path) -> None:
    _, service = offline(tmp_path)
    service.state.file_path("file-a").write_bytes(jsonl([_question("a", n=2)]))
    service.state.add_file("file-a", "b.jsonl", "batch")
    left = {"endpoint": "/v1/chat/completions", "output_file_id": None, "error_file_id": None}
    batches = {"left": ("file-a", "in_progress"), "bare": ("file-b", "in_progress"), "over": ("file-a", "cancelled")}
    for identity, (file, status) in batches.items():
        body = {**left, "id": identity, "input_file_id": file, "status": status}
        service.state.insert("batches", id=identity, body=json.dumps(body))
    routes_batches.start(service)
    await asyncio.gather(*service.batches.values())
    found = {r["id"]: json.loads(r["body"]) for r in service.state.rows("SELECT * FROM batches")}
    assert {identity: batch["status"] for identity, batch in found.items()} == {
        "left": "completed",
        "bare": "failed",
        "over": "cancelled",
    }
    assert found["left"]["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
    assert found["bare"]["errors"]["data"][0]["message"] == "The input file was deleted."
    service.state.close()


def test_vllm_s_null_and_prompt_logprobs(vllm: EmbeddedServer, http: httpx2.Client) -> None:
    ask = {"model": MODEL, "prompt": [[5, 6, 7], [8, 9]], "echo": True, "logprobs": 1, "max_tokens": 0}
    with raw(vllm) as client:
        assert client.get("/v1/models").json()["data"][0]["owned_by"] == "vllm"
        choices = client.post("/v1/completions", json={**ask, "prompt_logprobs": 1}).json()["choices"]
    plain = http.post("/v1/completions", json=ask).json()["choices"]
    for choice, default, ids in zip(choices, plain, ask["prompt"], strict=True):
        values = choice["logprobs"]["token_logprobs"]
        assert values == [None, *default["logprobs"]["token_logprobs"][1:]]
        assert choice["prompt_logprobs"][0] is None
        assert [
            row[str(i)]["logprob"] for row, i in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
        ] == values[1:]
    assert http.post("/v1/completions", json={**ask, "prompt_logprobs": 1}).status_code == 400
