"""The Batch API: submitted once, polled, merged by id, failed lines asked again, nothing left behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import Server, run_config
from test_provider_chat_token import answer, entry, example
from test_provider_chat_token import make as one_by_one

from daunce_api._util.clock import InstantClock
from daunce_api.attribution.matrices import measure_noise
from daunce_api.cli.doctor import Findings, examine_backend
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import ConfigurationError, ContractError, RejectedError, StopError, TransientError
from daunce_api.providers.base import JobStatus, TrainerCapabilities
from daunce_api.providers.openai_wire import batch_api, batches, chat_token
from daunce_api.providers.openai_wire.batch_api import ROUNDS, BatchScorer
from daunce_api.providers.openai_wire.trainer import WireTrainer, WireTrainerOptions
from daunce_api.providers.registry import Backend, capabilities_of, open_backend, open_tokenizer
from daunce_api.providers.tokenizers import embedded_folder
from daunce_api.score.cleaning import clean_everything
from daunce_api.score.client import ScoringClient
from daunce_api.store import RunStore
from daunce_api.train import CleanReport, JobClient
from tests.store_rows import by_key

EXAMPLES = [example(f"question {i}", f"word{i}", name=f"e{i}") for i in range(4)]


class OpenAI:
    """Files and batches as OpenAI's service keeps them; a batch completes at its second poll."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.uploads = 0
        self.batches: dict[str, dict[str, Any]] = {}
        self.fail: dict[str, int] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.end = "completed"
        self.lose_answer = 0
        self.token_limit = 99
        self.noise = 0.0
        self.polls = self.busy = 0
        self.other: Any = None

    def __call__(self, request: httpx2.Request) -> Any:
        path = request.url.path.removeprefix("/v1/")
        if self.other is not None:
            return self.other
        if request.method == "DELETE":
            gone = self.files.pop(path.split("/")[1], None) is None
            return httpx2.Response(404, json={"error": {"message": "no file"}}) if gone else {"deleted": True}
        if path == "files" and request.method == "GET":
            listed = [{"id": name, "filename": self.names.get(name, name)} for name in self.files]
            return {"object": "list", "data": listed, "has_more": False}
        if path == "files":
            name = request.content.split(b'filename="')[1].split(b'"')[0].decode()
            self.uploads += 1
            self.names[f"file-{self.uploads - 1}"] = name
            content = request.content.split(b"\r\n\r\n")[-1].rsplit(b"\r\n--", 1)[0]
            raw = next(p for p in request.content.split(b"\r\n\r\n") if p.startswith(b'{"custom_id"'))
            self.files[f"file-{self.uploads - 1}"] = raw.rsplit(b"\r\n--", 1)[0] or content
            return {"id": f"file-{self.uploads - 1}"}
        if path.startswith("files/"):
            found = self.files.get(path.split("/")[1])
            missing = httpx2.Response(404, json={"error": {"message": "no file"}})
            return missing if found is None else httpx2.Response(200, content=found)
        if path == "batches" and request.method == "POST":
            body = json.loads(request.content)
            batch = {"id": f"batch-{len(self.batches)}", "status": "validating", **body}
            self.batches[batch["id"]] = batch
            if self.lose_answer:
                self.lose_answer -= 1
                return httpx2.Response(500, json={"error": {"message": "gone"}})
            return batch
        if path == "fine_tuning/jobs":
            return {"object": "list", "data": [], "has_more": False}
        if path == "batches":
            return {"object": "list", "data": list(self.batches.values()), "has_more": False}
        batch = self.batches[path.split("/")[1]]
        if path.endswith("/cancel"):
            batch["status"] = "cancelling"
            return batch
        self.polls += 1
        if self.busy:
            self.busy -= 1
            return httpx2.Response(503, json={"error": {"message": "busy"}})
        if batch["status"] == "validating":
            running = sum(b["status"] == "in_progress" for b in self.batches.values())
            batch["status"] = "in_progress"
            if running >= self.token_limit:
                said = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for ft:m"}
                batch.update(status="failed", errors={"data": [said]})
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
            if question in self.refuse:
                status, message = self.refuse[question]
                body = {"error": {"message": message}}
                bad.append({"custom_id": asked["custom_id"], "response": {"status_code": status, "body": body}})
                continue
            word = f"word{question.split()[1]}"
            body = answer([entry("other", -1.0), entry(word, -2.0 - float(question.split()[1]) + self.noise)])
            good.append(
                {"custom_id": asked["custom_id"], "response": {"status_code": 200, "body": {**body, "model": "ft:m"}}}
            )
        for name, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):
            if lines:
                file = f"out-{name[:3]}-{batch['id']}"
                self.files[file] = "".join(json.dumps(x) + "\n" for x in lines).encode() + b"not json\n"
                batch[name] = file


def make(service: OpenAI) -> tuple[BatchScorer, Server, InstantClock]:
    server, clock = Server(service), InstantClock()
    config = run_config(scorer="chat_token", options={"batch_api": True})
    capabilities = chat_token.scorer_capabilities(config)
    scorer = one_by_one(server)
    return BatchScorer(scorer, capabilities, poll_seconds=60, clock=clock), server, clock


TRUTH = [(-2.0,), (-3.0,), (-4.0,), (-5.0,)]


async def values(scorer: BatchScorer, examples: list[EncodedExample] = EXAMPLES, replicate: int = 0) -> list[Any]:
    return [s.logprobs for s in await scorer.score_replicate("ft:m", examples, replicate)]


async def test_a_batch_is_submitted_polled_and_merged_in_order() -> None:
    service = OpenAI()
    scorer, _, clock = make(service)
    assert [s.logprobs for s in await scorer.score("ft:m", EXAMPLES)] == TRUTH
    (batch,) = service.batches.values()
    assert batch["endpoint"] == "/v1/chat/completions"
    assert batch["completion_window"] == "24h"
    assert clock.now() == 120.0
    lines = [json.loads(x) for x in service.files["file-0"].splitlines()]
    assert {x["url"] for x in lines} == {"/v1/chat/completions"}
    assert {x["body"]["model"] for x in lines} == {"ft:m"}
    assert all(len(x["custom_id"]) <= 64 for x in lines)
    # What was returned is not answered from memory.
    service.noise = 0.5
    assert await values(scorer, EXAMPLES[:2]) == [(-1.5,), (-2.5,)]
    assert len(service.batches) == 2


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
    assert len(service.batches) == ROUNDS + 1


async def test_failed_lines_can_be_asked_again_by_another_process() -> None:
    """The old batches, all of whose lines failed, are not what it reads."""
    service = OpenAI()
    service.fail = {"question 2": 99}
    for life in (1, 2):
        with pytest.raises(TransientError, match="failed 3 times") as caught:
            await make(service)[0].score("ft:m", EXAMPLES)
        # The first process asks for everything once, the others only for what failed; an hour is longer than the
        # scoring client's patience, which would otherwise send further batches at once.
        assert len(service.batches) == ROUNDS * life
        assert caught.value.retry_after == 3600.0
    service.fail = {}
    assert await values(make(service)[0]) == TRUTH
    assert len(service.batches) == ROUNDS * 2 + 1


async def test_an_interrupted_run_finds_the_batch_that_it_paid_for() -> None:
    service = OpenAI()
    first, _, _ = make(service)
    await first.score("ft:m", EXAMPLES)
    second, _, _ = make(service)
    assert [s.logprobs for s in await second.score("ft:m", EXAMPLES)] == TRUTH
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
    assert batched.max_concurrent_requests == 64
    single = chat_token.scorer_capabilities(run_config(scorer="chat_token"))
    assert (single.price_factor, single.max_concurrent_requests) == (1.0, 8)


# -- measured twice -------------------------------------------------------------------------------------------------


async def test_a_replicate_is_measured_and_not_answered_by_the_first_measurement(tmp_path: Path) -> None:
    """As the scoring client asks: noise first, then the scores; and both in a process of their own."""
    service = OpenAI()
    service.noise = 0.25
    for life in range(2):
        scorer, _, clock = make(service)
        with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
            scoring = ScoringClient(scorer, store, clock=clock)
            if life == 0:
                await scoring.measure(0, "ft:m", EXAMPLES[:4])
                service.noise = 0.0
            else:
                await scoring.score_member(0, "ft:m", EXAMPLES)
            noise = measure_noise(store, [0])
    assert noise == pytest.approx(0.25 / 2**0.5)
    assert len(service.batches) == 2


async def test_an_interrupted_replicate_is_found_again_and_not_taken_for_the_first_measurement() -> None:
    service = OpenAI()
    service.noise = 0.25
    await values(make(service)[0], replicate=1)
    service.noise = 0.0
    assert await values(make(service)[0], replicate=0) == TRUTH
    assert await values(make(service)[0], replicate=1) == [(-1.75,), (-2.75,), (-3.75,), (-4.75,)]
    assert len(service.batches) == 2


async def test_the_doctor_asks_by_single_requests() -> None:
    service = OpenAI()

    def handler(request: httpx2.Request) -> Any:
        if request.url.path.endswith("/chat/completions"):
            return {**answer([entry("word0", -2.0), entry("no", -3.0)]), "model": "ft:m"}
        return {"id": "ft:m"} if "/models/" in request.url.path else service(request)

    server = Server(handler)
    config = run_config(
        scorer="chat_token", options={"batch_api": True, "batch_poll_seconds": 1e-6}, tokenizer=str(embedded_folder())
    )
    async with open_backend(config, http_client=server.http()) as backend:
        assert isinstance(backend.scorer, BatchScorer)
        assert backend.scorer.capabilities.max_prompts_per_request == 50_000
        question = encode_example(EXAMPLES[0].example, open_tokenizer(config))
        first = replace(question, targets=question.targets[:1])
        findings = await examine_backend(backend, "ft:m", [first, first], Findings())
    assert findings.ok, findings.text()
    assert service.batches == {}
    assert "single requests" in findings.text()
    assert findings.seconds_per_request is not None


# -- refused, delayed, too large -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_line_that_will_never_be_answered_is_named_at_once(status: int) -> None:
    service = OpenAI()
    service.refuse = {"question 2": (status, "this prompt is not allowed")}
    scorer, _, _ = make(service)
    with pytest.raises(RejectedError, match=r"'e2' under ft:m: this prompt is not allowed") as caught:
        await scorer.score("ft:m", EXAMPLES)
    assert caught.value.status == status
    assert len(service.batches) == 1
    # Halving, as the scoring client does, sends nothing again.
    assert await values(scorer, EXAMPLES[:2]) == TRUTH[:2]
    with pytest.raises(RejectedError):
        await scorer.score("ft:m", EXAMPLES[2:])
    assert await values(scorer, EXAMPLES[3:]) == TRUTH[3:]
    assert len(service.batches) == 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
async def test_a_line_that_may_be_answered_later_is_asked_again(status: int) -> None:
    service = OpenAI()
    service.refuse = {"question 2": (status, "later")}
    with pytest.raises(TransientError, match="later"):
        await make(service)[0].score("ft:m", EXAMPLES)
    assert len(service.batches) == ROUNDS


async def test_the_example_at_fault_is_found_with_one_batch_and_the_others_are_stored(tmp_path: Path) -> None:
    service = OpenAI()
    service.refuse = {"question 1": (400, "not allowed")}
    scorer, _, clock = make(service)
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        scoring = ScoringClient(scorer, store, clock=clock)
        with pytest.raises(RejectedError, match="member 0, example 'e1'"):
            await scoring.score_member(0, "ft:m", EXAMPLES)
        assert len(by_key(store, 0).keys()) >= 1
    assert len(service.batches) == 1


async def test_a_line_without_credit_stops_everything() -> None:
    service = OpenAI()
    service.refuse = {"question 2": (402, "no credit")}
    with pytest.raises(StopError, match="no credit"):
        await make(service)[0].score("ft:m", EXAMPLES)


async def test_a_batch_over_the_token_limit_waits_for_the_others_and_is_not_uploaded_again() -> None:
    service = OpenAI()
    service.token_limit = 1
    busy = {"id": "batch-x", "status": "in_progress", "input_file_id": "none", "metadata": {}}
    service.batches["batch-x"] = busy
    scorer, _, clock = make(service)
    waiting = asyncio.create_task(values(scorer))
    while len(service.batches) < 5 and not waiting.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert not waiting.done()
    busy["status"] = "completed"
    assert await waiting == TRUTH
    assert service.uploads == 1
    assert clock.now() > 1800


async def test_a_batch_over_the_token_limit_by_itself_is_refused_so_that_it_is_halved() -> None:
    service = OpenAI()
    service.token_limit = 0
    with pytest.raises(RejectedError, match=r"too large, with no other under way: Enqueued token limit"):
        await make(service)[0].score("ft:m", EXAMPLES)


async def test_a_few_failed_polls_in_a_day_are_no_failure_of_the_request() -> None:
    service = OpenAI()
    service.busy = 9
    assert await values(make(service)[0]) == TRUTH
    service.busy = 10
    with pytest.raises(TransientError):
        await values(make(service)[0], replicate=1)


@pytest.mark.parametrize("limited", [False, True])
async def test_a_batch_that_never_ends_is_given_up(limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that has to wait for other batches of the account, of which there is always one."""
    monkeypatch.setattr(batches, "LONGEST_WAIT", 86_400 / 24)
    service = OpenAI()
    service.end, service.token_limit = "in_progress", 0 if limited else 99
    service.batches["batch-x"] = {"id": "batch-x", "status": "in_progress", "metadata": {}}
    with pytest.raises(StopError, match=r"is still \w+ after .*Cancel it at the provider"):
        await values(make(service)[0])


async def test_a_cancelled_batch_keeps_what_it_answered_and_the_rest_is_asked_again() -> None:
    service = OpenAI()
    service.end = "cancelled"
    service.fail = {"question 2": 1}
    assert await values(make(service)[0]) == TRUTH
    assert len(service.batches) == 2


async def test_lines_beyond_the_limit_on_bytes_go_into_further_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_api, "MAX_BYTES", 700)
    service = OpenAI()
    scorer, _, clock = make(service)
    assert await values(scorer) == TRUTH
    assert len(service.batches) > 1
    assert all(len(content) <= 700 for name, content in service.files.items() if name.startswith("file-"))
    asked = b"".join(content for name, content in service.files.items() if name.startswith("file-"))
    assert asked.count(b"custom_id") == 4
    # All were submitted before the first was waited for.
    assert clock.now() <= 120.0 * len(service.batches)
    assert await values(make(service)[0]) == TRUTH
    assert len(service.batches) == len({b["metadata"]["daunce_batch"] for b in service.batches.values()})


# -- nothing left behind -------------------------------------------------------------------------------------------


async def test_files_are_deleted_once_their_answers_are_stored(tmp_path: Path) -> None:
    service = OpenAI()
    scorer, _, clock = make(service)
    await scorer.score("ft:m", EXAMPLES)
    assert len(service.files) == 2  # a run that ended here would find the answers again
    await scorer.release("ft:m", EXAMPLES[:3], 0)
    assert len(service.files) == 2
    await scorer.release("ft:m", EXAMPLES[3:], 0)
    assert service.files == {}
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        assert await ScoringClient(scorer, store, clock=clock).score_member(0, "ft:m", EXAMPLES) == 4
    assert service.files == {}
    assert len(service.batches) == 2


async def test_a_batch_whose_files_are_gone_is_asked_again() -> None:
    service = OpenAI()
    scorer, _, _ = make(service)
    await scorer.score("ft:m", EXAMPLES)
    await scorer.release("ft:m", EXAMPLES, 0)
    assert await values(make(service)[0]) == TRUTH
    assert len(service.batches) == 2


async def test_sweeping_finds_what_an_interrupted_run_left() -> None:
    service = OpenAI()
    await make(service)[0].score("ft:m", EXAMPLES)
    await make(service)[0].score("ft:m", EXAMPLES[:1])
    under_way = list(service.batches.values())[1]
    under_way["status"] = "in_progress"
    service.files["file-9"], service.names["file-9"] = b"orphan", service.names["file-0"]
    service.files["file-other"] = b"of somebody else"
    swept = await make(service)[0].sweep(["ft:m"])
    assert set(service.files) == {"file-other"}
    assert sorted(swept.files) == sorted({"file-0", "file-1", "file-9", "out-out-batch-0", "out-out-batch-1"})
    assert under_way["status"] == "cancelling"
    assert "clean again" in swept.kept[under_way["id"]]
    assert (await make(service)[0].sweep(["ft:other"])).files == []


def test_azure_is_refused_with_the_alternative() -> None:
    config = run_config("azure", options={"batch_api": True}, api_key_env="KEY", base_url="https://x.openai.azure.com")
    with pytest.raises(ConfigurationError, match=r"batch_api.*Azure.*single requests|backend\.kind: openai"):
        capabilities_of(config)


async def test_clean_takes_the_batches_of_every_model_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = OpenAI()
    scorer, _, _ = make(service)
    for model in ("ft:final", "ft:earlier", "ft:of-another-run"):
        batch = await scorer._batches.submit(b'{"custom_id": "x"}\n', model, model)
        service.batches[batch["id"]]["status"] = "failed"

    async def cleaned(client: JobClient) -> CleanReport:
        return CleanReport(["ft:final"], ["training-file"])

    monkeypatch.setattr("daunce_api.score.cleaning.clean_up", cleaned)

    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        store.jobs.intent("k-m0-a1", 0, 1, "{}")
        store.jobs.submitted("k-m0-a1", "job-1")
        store.jobs.state("k-m0-a1", JobStatus.SUCCEEDED, "ft:final")
        store.jobs.checkpoints_found("k-m0-a1", ["ft:earlier", None])
        client = JobClient(
            WireTrainer(Server(lambda _: {}).client(), TrainerCapabilities("test", 3), WireTrainerOptions()), store
        )
        report = await clean_everything(client, Backend(client.trainer, scorer))
    assert report.files == ["training-file", "file-0", "file-1"]
    assert list(service.files) == ["file-2"]
