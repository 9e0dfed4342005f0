"""One tiny job for the doctor: billed tokens against counted ones, and nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import Server, run_config, sequence

from daunce_api import Dataset, Run
from daunce_api._util.clock import InstantClock
from daunce_api.cli.findings import Findings
from daunce_api.cli.train_one import compare_tokens, tiny_job, train_one
from daunce_api.data.tokenizers import encode_example
from daunce_api.providers.registry import open_backend

WORDS = ["river", "stone", "garden", "engine", "cat"]
RECORDS = [{"prompt": f"Q: {WORDS[i % 5]} {i}\nA:", "completion": f" {WORDS[(i + 1) % 5]}."} for i in range(14)]


class Provider:
    """Files and jobs in memory. ``billed`` tokens are reported; ``faults`` answer submits first."""

    def __init__(self, billed: int, *faults: Any, end: str = "succeeded") -> None:
        self.billed = billed
        self.faults = list(faults)
        self.end = end
        self.files: dict[str, dict[str, Any]] = {}
        self.jobs: list[dict[str, Any]] = []
        self.deleted: list[str] = []

    def __call__(self, request: httpx2.Request) -> Any:
        path = request.url.path.removeprefix("/v1")
        if request.method == "DELETE":
            self.deleted.append(path)
            return {"id": path.rsplit("/", 1)[-1], "deleted": True}
        if path == "/files" and request.method == "POST":
            name = request.content.split(b'filename="')[1].split(b'"')[0].decode()
            content = request.content.split(b"\r\n\r\n", 2)[2].rsplit(b"\r\n--", 1)[0]
            sized = {"id": "file-1", "object": "file", "filename": name, "bytes": len(content), "purpose": "fine-tune"}
            self.files["file-1"] = sized
            return sized
        if path == "/files":
            return {"data": list(self.files.values()), "has_more": False}
        if path == "/fine_tuning/jobs" and request.method == "POST":
            body = json.loads(request.content)
            job = {"id": f"ftjob-{len(self.jobs)}", "object": "fine_tuning.job", "status": "running", **body}
            job["hyperparameters"] = body["method"]["supervised"]["hyperparameters"]
            self.jobs.append(job)
            if self.faults:
                fault = self.faults.pop(0)
                if isinstance(fault, Exception):
                    raise fault
                return fault
            return job
        if path == "/fine_tuning/jobs":
            return {"data": self.jobs, "has_more": False}
        if path.endswith("/checkpoints"):
            return {"data": [], "has_more": False}
        if path.startswith("/fine_tuning/jobs/"):
            job = self.jobs[0]
            job |= {"status": self.end, "fine_tuned_model": "ft:tiny", "trained_tokens": self.billed}
            return job
        if path == "/completions":
            body = json.loads(request.content)
            made = [1] * body["max_tokens"]
            choices = []
            for index, ids in enumerate(body["prompt"]):
                values = sequence(body["model"], [i % 40 for i in [*ids, *made]])
                shown = values if body["echo"] else values[len(ids) :]
                logprobs = {"token_logprobs": shown, "tokens": ["x"] * len(shown)}
                choices.append({"index": index, "text": "", "token_ids": made, "logprobs": logprobs})
            return httpx2.Response(200, content=json.dumps({"model": body["model"], "choices": choices}))
        return httpx2.Response(404, json={"error": {"message": f"no route {path}"}})


async def looked(provider: Provider, tmp_path: Path) -> tuple[Findings, Any, Provider]:
    data = Dataset.from_records(RECORDS)
    data.to_jsonl(tmp_path / "train.jsonl")
    Dataset.from_records(RECORDS[:2]).to_jsonl(tmp_path / "test.jsonl")
    files = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}
    config = run_config("openai_wire", model="daunce-tiny", training={"hyperparameters": {"n_epochs": 3}})
    config = config.model_copy(update={"data": config.data.model_copy(update=files), "run_dir": tmp_path / "run"})
    run = Run.create(config)
    job = tiny_job(run)
    findings = Findings()
    example = encode_example(data[0], run.tokenizer, "last")
    async with open_backend(config, http_client=Server(provider).http()) as backend:
        await train_one(run, backend, job, example, findings, clock=InstantClock())
    assert sorted(os.listdir(tmp_path)) == ["test.jsonl", "train.jsonl"]
    return findings, job, provider


async def test_one_epoch_of_the_shortest_examples_is_trained_compared_and_deleted(tmp_path: Path) -> None:
    _, job, _ = await looked(Provider(0), tmp_path)
    assert len(job.positions) == 10, "as few as the provider takes"
    findings, job, provider = await looked(Provider(job.tokens), tmp_path)
    checks = {c.name: c for c in findings.checks}
    assert checks["billed tokens"].ok is True
    assert checks["fine-tune's alignment"].ok is True
    assert findings.advice == []
    assert provider.jobs[0]["hyperparameters"] == {"n_epochs": 1}
    assert provider.deleted == ["/models/ft:tiny", "/files/file-1"]


async def test_a_template_that_adds_tokens_shows(tmp_path: Path) -> None:
    _, job, _ = await looked(Provider(0), tmp_path)
    findings, _, _ = await looked(Provider(job.tokens + 10 * 12), tmp_path)
    (billed,) = [c for c in findings.checks if c.name == "billed tokens"]
    assert "+12.0 an example" in billed.detail
    assert any("template" in a for a in findings.advice)


@pytest.mark.parametrize(
    ("billed", "ok", "words"), [(None, None, "reports none"), (90, None, "-1.0 an example"), (100, True, "the same")]
)
def test_what_billed_tokens_say(billed: int | None, ok: bool | None, words: str) -> None:
    findings = Findings()
    compare_tokens(billed, 100, 10, findings)
    assert findings.checks[0].ok is ok
    assert words in findings.checks[0].detail


async def test_a_submit_without_an_answer_is_looked_up_and_not_repeated(tmp_path: Path) -> None:
    findings, _, provider = await looked(Provider(5, httpx2.ReadTimeout("slow")), tmp_path)
    assert len(provider.jobs) == 1
    assert any(c.name == "billed tokens" for c in findings.checks)


async def test_a_look_that_was_killed_goes_on_with_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def killed(*_: object) -> None:
        raise RuntimeError("killed")

    provider = Provider(5)
    with monkeypatch.context() as patch:
        patch.setattr("daunce_api.cli.train_one.JobClient.watch", killed)
        patch.setattr("daunce_api.cli.train_one.clean_up", killed)
        with pytest.raises(RuntimeError, match="killed"):
            await looked(provider, tmp_path)
    findings, _, _ = await looked(provider, tmp_path)
    assert len(provider.jobs) == 1
    assert any(c.name == "billed tokens" for c in findings.checks)


async def test_a_job_that_fails_is_a_finding_and_its_file_is_deleted(tmp_path: Path) -> None:
    findings, _, provider = await looked(Provider(5, end="failed"), tmp_path)
    assert not findings.ok
    assert "/files/file-1" in provider.deleted
