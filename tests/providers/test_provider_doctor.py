"""What the doctor says of good, noisy, slow, shifted and useless endpoints."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import BATCH, SHORT, Server, body_of, run_config, sequence, toy
from test_provider_chat_token import LISTED, answer, entry, example

from daunce_api import Run
from daunce_api._util.clock import SystemClock
from daunce_api.cli import doctor, noise
from daunce_api.cli.doctor import Findings, examine_backend
from daunce_api.errors import ConfigurationError
from daunce_api.providers.openai_wire.echo import echo_options, presets
from daunce_api.providers.registry import open_backend
from daunce_api.providers.tokenizers import embedded_folder

Change = Callable[[list[Any], list[int], int], list[Any]]


class Echo:
    """Completions with echo and greedy generation over the toy model; ``change`` spoils the echoed values."""

    def __init__(self, change: Change | None = None, owner: str = "me", busy: int = 0) -> None:
        self.change = change
        self.owner = owner
        self.busy = busy
        self.seen = 0

    def __call__(self, request: httpx2.Request) -> Any:
        if request.method == "GET" and request.url.path.endswith("/models"):
            return {"data": [{"id": "m", "owned_by": self.owner}]}
        if request.method == "GET" and request.url.path.endswith("/fine_tuning/jobs"):
            return {"data": [], "has_more": False}
        if request.method == "GET":
            return {"id": request.url.path.rsplit("/", 1)[-1], "shutdown_date": "2027-01-14"}
        self.seen += 1
        if 0 < self.busy < self.seen:
            return httpx2.Response(429, json={"error": {"message": "slow down"}}, headers={"retry-after": "0"})
        body = body_of(request)
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            ids, values = list(prompt), sequence(body["model"], prompt)
            tops: list[Any] = [None, *({"x": max(toy(body["model"], tuple(ids[:t])))} for t in range(1, len(ids)))]
            if self.change is not None and body["echo"]:
                values = self.change(values, ids, len(body["prompt"]))
            made: list[int] = []
            for _ in range(body["max_tokens"]):
                following = toy(body["model"], (*ids, *made))
                best = max(range(len(following)), key=following.__getitem__)
                made.append(best)
                values.append(following[best])
                tops.append({"x": following[best]})
            if not body["echo"]:
                values, tops = values[len(ids) :], tops[len(ids) :]
            logprobs = {"token_logprobs": values, "top_logprobs": tops, "tokens": ["x"] * len(values)}
            choices.append({"index": index, "text": "", "token_ids": made, "logprobs": logprobs})
        return httpx2.Response(200, content=json.dumps({"model": body["model"], "choices": choices}))


async def look(
    handler: Any, *, scorer: str = "echo", examples: Any = BATCH, fine_tunes: Sequence[str] = (), **options: Any
) -> Findings:
    server = Server(handler)
    config = run_config(scorer=scorer, options=options)
    async with open_backend(config, http_client=server.http()) as backend:
        return await examine_backend(backend, "m", examples, Findings(), fine_tunes=fine_tunes)


def check(findings: Findings, name: str) -> doctor.Check:
    return next(c for c in findings.checks if c.name == name)


async def test_an_honest_endpoint_is_found_usable() -> None:
    findings = await look(Echo())
    assert findings.ok
    assert check(findings, "base model").detail == "m is available; it shuts down on 2027-01-14"
    assert findings.sigma_example == 0.0
    assert check(findings, "batches").ok
    assert check(findings, "alignment").ok
    assert check(findings, "speed").detail.endswith("a second")
    assert "return_token_ids: true" in findings.advice[0]
    assert "This endpoint can be used." in findings.text()
    assert json.loads(json.dumps(findings.to_json()))["ok"] is True


async def test_vllm_is_recognised_and_its_dialect_advised() -> None:
    findings = await look(Echo(owner="vllm"))
    assert check(findings, "server").detail == "it is vllm"
    assert "dialect: vllm" in findings.advice[0]
    assert presets("vllm", None)["return_token_ids"] is True


async def test_noise_is_measured_and_advice_follows() -> None:
    noise = itertools.cycle([0.0, 0.02, -0.02, 0.01])

    def shake(values: list[Any], ids: list[int], prompts: int) -> list[Any]:
        shift = next(noise)
        return [None, *(min(v - 0.03 + shift, 0.0) for v in values[1:])]

    findings = await look(Echo(shake))
    assert findings.ok
    assert findings.sigma_example == pytest.approx(0.0167, abs=0.002)
    assert any("noisy" in a for a in findings.advice)


async def test_values_that_depend_on_the_batch_fail() -> None:
    def beside(values: list[Any], ids: list[int], prompts: int) -> list[Any]:
        return [None, *(v - 0.1 * (prompts > 1) for v in values[1:])]

    findings = await look(Echo(beside))
    assert not findings.ok
    assert any("prompts_per_request: 1" in a for a in findings.advice)


async def test_values_of_the_next_position_fail() -> None:
    def shifted(values: list[Any], ids: list[int], prompts: int) -> list[Any]:
        return [None, *values[2:], values[-1]]

    findings = await look(Echo(shifted))
    assert not findings.ok
    assert "cannot be used" in findings.text()


@pytest.mark.parametrize("right", [True, False])
async def test_a_fine_tune_of_the_run_is_tested_beside_the_base_model(right: bool) -> None:
    """vLLM issue 51594: prompt log-probabilities leave out what an adapter does to the last layer."""

    class Server(Echo):
        def __call__(self, request: httpx2.Request) -> Any:
            def of_the_base(values: list[Any], ids: list[int], prompts: int) -> list[Any]:
                return sequence("m", ids)

            tuned = request.method == "POST" and body_of(request)["model"] == "ft"
            self.change = of_the_base if tuned and not right else None
            return super().__call__(request)

    findings = await look(Server(), fine_tunes=["ft"])
    assert check(findings, "alignment").ok
    assert findings.ok is right
    if right:
        assert check(findings, "fine-tune's alignment").ok
    else:
        assert "or to another model" in check(findings, "fine-tune's alignment").detail


async def test_an_endpoint_without_echo_says_what_to_use() -> None:
    findings = await look(Echo(lambda values, ids, prompts: []))
    assert "daunce serve" in check(findings, "log-probabilities").detail
    assert not findings.ok


async def test_being_turned_away_at_once_becomes_advice() -> None:
    # Five for the noise, one batch and two for the alignment; then three of eight at once.
    findings = await look(Echo(busy=11))
    assert findings.ok
    assert any("scoring.concurrency to 3" in a for a in findings.advice)


async def test_a_missing_model_and_a_wrong_key_are_findings() -> None:
    gone = {"error": {"message": "no such model", "code": "model_not_found"}}
    findings = await look(lambda _: httpx2.Response(404, json=gone))
    assert check(findings, "base model").ok is False
    assert check(findings, "log-probabilities").ok is False
    findings = await look(lambda _: httpx2.Response(401, json={"error": {"message": "bad key"}}))
    assert "backend.api_key_env" in check(findings, "base model").detail


async def test_a_gateway_without_a_jobs_route_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_wait(clock: SystemClock, seconds: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(SystemClock, "sleep", no_wait)
    echo = Echo()

    def handler(request: httpx2.Request) -> Any:
        if request.url.path.endswith("/fine_tuning/jobs"):
            return httpx2.Response(501, json={"error": {"message": "Only premium users"}})
        return echo(request)

    findings = await look(handler)
    assert check(findings, "fine-tuning jobs").ok is False
    assert any("LiteLLM" in advice for advice in findings.advice)

    def gone(request: httpx2.Request) -> Any:
        raise httpx2.ConnectError("refused")

    assert not (await look(gone)).advice


async def test_a_chat_endpoint_that_censors_says_so() -> None:
    def handler(request: httpx2.Request) -> Any:
        if request.method == "GET":
            return {"id": "m", "data": []}
        return {**answer([*LISTED, entry("odd", -5.0)]), "model": "m"}

    server = Server(handler)
    config = run_config(scorer="chat_token", tokenizer=str(embedded_folder()))
    from test_provider_chat_token import make

    async with open_backend(config, http_client=server.http()) as backend:
        findings = await examine_backend(
            replace(backend, scorer=make(server)), "m", [example("Is it?", "never")], Findings()
        )
    assert findings.ok
    assert "at least 5.000 nats (censored)" in check(findings, "log-probabilities").detail
    assert any("endpoint with echo" in a for a in findings.advice)


async def test_text_of_a_server_is_shown_and_not_obeyed() -> None:
    findings = await look(lambda _: httpx2.Response(400, json={"error": {"message": "\x1b[2Jgone"}}), examples=[SHORT])
    assert "\x1b" not in findings.text()


def test_dialects_follow_the_address_or_the_config() -> None:
    assert presets("auto", "https://api.fireworks.ai/inference/v1")["max_tokens"] == 1
    assert presets("auto", "http://localhost:8000/v1") == {}
    assert presets("auto", None) == {}
    with pytest.raises(ConfigurationError, match=r"scorer\.kind: together"):
        presets("auto", "https://api.together.ai/v1")
    with pytest.raises(
        ConfigurationError, match="dialect: Input should be 'auto', 'plain', 'vllm', 'daunce', 'fireworks'"
    ):
        echo_options(run_config(scorer="echo", options={"dialect": "llama"}))


async def test_noise_in_company_is_measured_beside_other_examples() -> None:
    """Some servers batch requests: alone an example is bit-identical, among others it is not."""
    at_once = itertools.count()

    class Batching(Echo):
        def __call__(self, request: httpx2.Request) -> Any:
            if request.method == "POST" and self.seen >= 9:  # noise, batches and alignment are over
                self.change = lambda values, ids, _: [None, *(v - 0.01 * (next(at_once) % 3) for v in values[1:])]
            return super().__call__(request)

    findings = await look(Batching())
    assert "standard deviation 0 nats" in check(findings, "noise").detail
    assert "nats of its loss" in check(findings, "noise under load").detail
    assert findings.sigma_example is not None
    assert findings.sigma_example > noise.NOISY
    assert any("noisy" in a for a in findings.advice)


@pytest.mark.parametrize("status", [404, 501])
async def test_a_jobs_route_that_does_not_work_is_named_before_a_run_is_started(status: int) -> None:
    class NoJobs(Echo):
        def __call__(self, request: httpx2.Request) -> Any:
            if request.url.path.endswith("/fine_tuning/jobs"):
                return httpx2.Response(status, content=b"Internal Server Error")
            return super().__call__(request)

    findings = await look(NoJobs())
    assert not findings.ok
    assert check(findings, "fine-tuning jobs").ok is False
    assert any("LiteLLM" in a for a in findings.advice)


def test_every_example_is_looked_at_as_the_plan_does(tmp_path: Path) -> None:
    records: list[Any] = [
        {"messages": [{"role": "user", "content": f"Is {n} odd?"}, {"role": "assistant", "content": "yn"[n % 2]}]}
        for n in range(300)
    ]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    records[290]["messages"][1] = {"role": "assistant", "tool_calls": [call]}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {
        "run_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "backend": {
            "kind": "openai_wire",
            "model": "m",
            "base_url": "http://127.0.0.1:9/v1",
            "tokenizer": str(embedded_folder()),
            "scorer": {"kind": "chat_token", "options": {"first_token": True}},
        },
    }
    findings = Findings()
    assert len(doctor._short_examples(Run.create(config), findings)) == 4
    assert not findings.ok
    assert "calls a tool" in findings.text()
    assert "test.jsonl:291, train.jsonl:291" in findings.text()
