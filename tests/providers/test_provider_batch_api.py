"""The Batch API: submitted once, polled, merged by id, failed lines asked again."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from provider_support import Server, run_config
from test_provider_chat_token import TOKENIZER, answer, entry, example

from daunce_api.backends.openai_wire import chat_token
from daunce_api.backends.openai_wire.batch_api import ROUNDS, BatchScorer
from daunce_api.clock import InstantClock
from daunce_api.errors import ContractError, RejectedError, StopError, TransientError

EXAMPLES = [example(f"question {i}", f"word{i}", name=f"e{i}") for i in range(4)]


class OpenAI:
    """Files and batches as OpenAI's service keeps them; a batch completes at its second poll."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.fail: dict[str, int] = {}
        self.end = "completed"
        self.lose_answer = 0
        self.polls = 0
        self.other: Any = None

    def __call__(self, request: httpx2.Request) -> Any:
        path = request.url.path.removeprefix("/v1/")
        if self.other is not None:
            return self.other
        if path == "files":
            content = request.content.split(b"\r\n\r\n")[-1].rsplit(b"\r\n--", 1)[0]
            raw = next(p for p in request.content.split(b"\r\n\r\n") if p.startswith(b'{"custom_id"'))
            self.files[f"file-{len(self.files)}"] = raw.rsplit(b"\r\n--", 1)[0] or content
            return {"id": f"file-{len(self.files) - 1}"}
        if path.startswith("files/"):
            return httpx2.Response(200, content=self.files[path.split("/")[1]])
        if path == "batches" and request.method == "POST":
            body = json.loads(request.content)
            batch = {"id": f"batch-{len(self.batches)}", "status": "validating", **body}
            self.batches[batch["id"]] = batch
            if self.lose_answer:
                self.lose_answer -= 1
                return httpx2.Response(500, json={"error": {"message": "gone"}})
            return batch
        if path == "batches":
            return {"object": "list", "data": list(self.batches.values()), "has_more": False}
        batch = self.batches[path.split("/")[1]]
        self.polls += 1
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        elif batch["status"] == "in_progress":
            self.finish(batch)
        return batch

    def finish(self, batch: dict[str, Any]) -> None:
        batch["status"] = self.end
        if self.end == "failed":
            batch["errors"] = {"data": [{"message": "the file is too odd", "line": 1}]}
            return
        good, bad = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            asked = json.loads(line)
            question = asked["body"]["messages"][0]["content"]
            if self.fail.get(question, 0) > 0:
                self.fail[question] -= 1
                error = {"error": {"message": "overloaded"}}
                bad.append({"custom_id": asked["custom_id"], "response": {"status_code": 500, "body": error}})
                continue
            word = f"word{question.split()[1]}"
            body = answer([entry("other", -1.0), entry(word, -2.0 - float(question.split()[1]))])
            good.append(
                {"custom_id": asked["custom_id"], "response": {"status_code": 200, "body": {**body, "model": "ft:m"}}}
            )
        for name, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):
            if lines:
                file = f"out-{len(self.files)}"
                self.files[file] = "".join(json.dumps(x) + "\n" for x in lines).encode() + b"not json\n"
                batch[name] = file


def make(service: OpenAI) -> tuple[BatchScorer, Server, InstantClock]:
    server, clock = Server(service), InstantClock()
    config = run_config(scorer="chat_token", options={"batch_api": True})
    scorer = chat_token.ChatTokenScorer(
        server.client(),
        chat_token.scorer_capabilities(config),
        chat_token.chat_options(config),
        tokenizer=TOKENIZER,
    )
    return BatchScorer(scorer, poll_seconds=60, clock=clock), server, clock


TRUTH = [(-2.0,), (-3.0,), (-4.0,), (-5.0,)]


async def test_a_batch_is_submitted_polled_and_merged_in_order() -> None:
    service = OpenAI()
    scorer, server, clock = make(service)
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES)] == TRUTH
    (batch,) = service.batches.values()
    assert batch["endpoint"] == "/v1/chat/completions"
    assert batch["completion_window"] == "24h"
    assert clock.now() == 120.0
    lines = [json.loads(x) for x in service.files["file-0"].splitlines()]
    assert {x["url"] for x in lines} == {"/v1/chat/completions"}
    assert {x["body"]["model"] for x in lines} == {"ft:m"}
    assert all(len(x["custom_id"]) <= 64 for x in lines)
    sent = len(server.requests)
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES[:2])] == TRUTH[:2]
    assert len(server.requests) == sent


async def test_failed_lines_are_asked_again_alone() -> None:
    service = OpenAI()
    service.fail = {"question 2": 1}
    scorer, _, _ = make(service)
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES)] == TRUTH
    assert len(service.batches) == 2
    again = service.files[list(service.batches.values())[1]["input_file_id"]]
    assert again.count(b"custom_id") == 1


async def test_a_line_that_keeps_failing_is_named_and_the_others_are_kept() -> None:
    service = OpenAI()
    service.fail = {"question 2": 99}
    scorer, _, _ = make(service)
    with pytest.raises(TransientError, match=r"1 of 4 requests.*'e2'.*overloaded"):
        await scorer.score("ft:m", EXAMPLES)
    assert len(service.batches) == ROUNDS
    service.fail = {}
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES)] == TRUTH


async def test_an_interrupted_run_finds_the_batch_that_it_paid_for() -> None:
    service = OpenAI()
    first, _, _ = make(service)
    await first.score("ft:m", EXAMPLES)
    second, _, _ = make(service)
    assert [s.logprobs for s in await second.score("ft:m", EXAMPLES)] == TRUTH
    assert len(service.batches) == 1
    await second.score("ft:m", EXAMPLES[:1])
    assert len(service.batches) == 1


async def test_a_lost_answer_to_the_submit_does_not_make_a_second_batch() -> None:
    service = OpenAI()
    service.lose_answer = 1
    scorer, _, _ = make(service)
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES)] == TRUTH
    assert len(service.batches) == 1


async def test_a_refused_batch_says_why_and_an_expired_one_keeps_what_it_answered() -> None:
    service = OpenAI()
    service.end = "failed"
    scorer, _, _ = make(service)
    with pytest.raises(RejectedError, match="the file is too odd"):
        await scorer.score("ft:m", EXAMPLES)
    service.end = "expired"
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES)] == TRUTH


async def test_wrong_answers_inside_a_batch_are_refused() -> None:
    service = OpenAI()
    finish = service.finish

    def wrong(batch: dict[str, Any]) -> None:
        finish(batch)
        file = batch["output_file_id"]
        service.files[file] = service.files[file].replace(b"ft:m", b"gpt-other")

    service.finish = wrong  # type: ignore[method-assign]
    with pytest.raises(ContractError, match="another model"):
        await make(service)[0].score("ft:m", EXAMPLES)
    service.other = httpx2.Response(401, json={"error": {"message": "no"}})
    with pytest.raises(StopError):
        await make(service)[0].score("ft:m", EXAMPLES)


def test_half_the_price_is_in_the_capabilities() -> None:
    batched = chat_token.scorer_capabilities(run_config(scorer="chat_token", options={"batch_api": True}))
    assert batched.price_factor == 0.5
    assert batched.max_prompts_per_request == 50_000
    assert any("half the list price" in note for note in batched.notes)
    assert chat_token.scorer_capabilities(run_config(scorer="chat_token")).price_factor == 1.0
