"""Answers that look right and are not, in whole runs: each ends with a sentence instead of scores.

A proxy spoils what an honest server answers, in the ways of servers that exist. The members are trained once; each
fault meets a copy of the run in which nothing is scored yet.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from daunce_api import Run, RunConfig
from daunce_api.cli.doctor import examine
from daunce_api.errors import ContractError
from daunce_api.plan.inputs import TESTS
from daunce_api.store import RunStore
from tests.store_rows import by_key, members_scored

from .harness import KEY, MEMBERS, NOISE, Provider, asked, encoded_ids, outcome
from .proxy import Sent

Quiet = tuple[RunConfig, dict[str, Any]]
Body = dict[str, Any]
TEMPLATE = [5, 6]


def _echoed(choice: Body, request: Body) -> list[Any] | None:
    """The log-probabilities of an echoed prompt, to be spoiled in place."""
    return choice["logprobs"]["token_logprobs"] if request.get("echo") else None


def _each(change: Callable[[Body, list[Any], list[int]], None]) -> Callable[[Body, Body], None]:
    def spoil(request: Body, answer: Body) -> None:
        for choice in answer["choices"]:
            values = _echoed(choice, request)
            if values is not None:
                change(choice, values, request["prompt"][choice["index"]])

    return spoil


def _shift(_: Body, values: list[Any], __: list[int]) -> None:
    values[:] = [*values[1:], values[-1]]


def _zeros(_: Body, values: list[Any], __: list[int]) -> None:
    values[1:] = [0.0] * (len(values) - 1)


def _minus_9999(_: Body, values: list[Any], __: list[int]) -> None:
    values[-1] = -9999.0


def _null(_: Body, values: list[Any], __: list[int]) -> None:
    values[-1] = None


def _one_short(_: Body, values: list[Any], __: list[int]) -> None:
    del values[0]


def _shifted_ids(choice: Body, _: list[Any], ids: list[int]) -> None:
    choice["prompt_token_ids"] = [*ids[1:], ids[0]]


def _generated_only(request: Body, answer: Body) -> None:
    """llama.cpp's server: chat-style log-probabilities of generated tokens, whatever ``echo`` says."""
    for choice in answer["choices"]:
        choice["logprobs"] = {"content": [{"id": 5, "token": "x", "logprob": -0.5, "top_logprobs": []}]}


def _other_name(_: Body, answer: Body) -> None:
    answer["model"] = "ft:daunce-tiny:local:other-m9:ffffffff"


def _choices_crossed(_: Body, answer: Body) -> None:
    indices = [choice["index"] for choice in answer["choices"]]
    for choice, index in zip(answer["choices"], reversed(indices), strict=True):
        choice["index"] = index


ANSWERS: dict[str, tuple[Callable[[Body, Body], None], str]] = {
    "echo ignored": (_generated_only, "no log-probabilities"),
    "off by one": (_each(_shift), "off by one|shifted against each other"),
    "all zero": (_each(_zeros), "not measurements|off by one"),
    "-9999": (_each(_minus_9999), "stand-in|off by one"),
    "null": (_each(_null), "'None'|off by one"),
    "one value short": (_each(_one_short), "adds, drops or truncates|echoes"),
    "shifted ids": (_each(_shifted_ids), "other tokens than were sent"),
    "another adapter, named": (_other_name, "another model"),
}
REQUESTS: dict[str, tuple[Callable[[list[int]], list[int]], str]] = {
    "template added": (lambda ids: TEMPLATE + ids, "other tokens than were sent|another model|adds, drops"),
    "template added and cut to length": (
        lambda ids: (TEMPLATE + ids)[: len(ids)],
        "other positions|other tokens than were sent",
    ),
    "context truncated": (lambda ids: ids[-12:], "adds, drops or truncates|echoes 12 log-probabilities"),
}


@pytest.fixture
def unscored(quiet: Quiet, tmp_path: Path, key: None) -> RunConfig:
    """A copy of the finished run with its models and without any score."""
    config = quiet[0].model_copy(update={"run_dir": tmp_path / "run"})
    shutil.copytree(quiet[0].run_dir, config.run_dir)
    with RunStore.open(config.run_dir) as store:
        for member in range(MEMBERS):
            store.scores.set_aside([member], "to be scored again", suspect=False)
        store.set_value(TESTS, None)
    return config


def spoil_answers(provider: Provider, change: Callable[[Body, Body], None]) -> None:
    def changed(sent: Sent) -> bytes:
        if sent.route != "POST /v1/completions":
            return sent.answer
        answer = json.loads(sent.answer)
        change(json.loads(sent.body), answer)
        return json.dumps(answer).encode()

    provider.proxy.change_answer = changed


def spoil_requests(provider: Provider, change: Callable[[Body], None]) -> None:
    """What the server does to a prompt before it answers as if it had done nothing; the model's name is put back."""

    def changed(sent: Sent) -> bytes:
        if sent.route != "POST /v1/completions":
            return sent.body
        body = json.loads(sent.body)
        change(body)
        return json.dumps(body).encode()

    def named(sent: Sent) -> bytes:
        if sent.route != "POST /v1/completions" or sent.status != 200:
            return sent.answer
        return json.dumps({**json.loads(sent.answer), "model": json.loads(sent.body)["model"]}).encode()

    provider.proxy.change_request = changed
    provider.proxy.change_answer = named


def refused(config: RunConfig, words: str) -> None:
    """The run ends with a ContractError, and nothing wrong was stored; so does the doctor's look at the endpoint."""
    with pytest.raises(ContractError, match=words):
        Run.create(config).execute()
    with RunStore.open(config.run_dir, read_only=True) as store:
        assert not any(by_key(store, member).keys() for member in range(MEMBERS))


def test_an_honest_server_is_scored_again_to_the_same_bits(quiet: Quiet, unscored: RunConfig) -> None:
    Run.create(unscored).execute()
    assert outcome(unscored.run_dir)["scores"] == quiet[1]["scores"]


@pytest.mark.parametrize("fault", ANSWERS)
def test_spoiled_answers_stop_the_run_and_fail_the_doctor(provider: Provider, unscored: RunConfig, fault: str) -> None:
    change, words = ANSWERS[fault]
    spoil_answers(provider, change)
    refused(unscored, words)
    findings = examine(Run.create(unscored))
    assert not findings.ok, findings.text()


@pytest.mark.parametrize("fault", REQUESTS)
def test_prompts_that_the_server_changes_stop_the_run_and_fail_the_doctor(
    provider: Provider, unscored: RunConfig, fault: str
) -> None:
    prompt, words = REQUESTS[fault]

    def change(body: Body) -> None:
        if body.get("echo"):
            body["prompt"] = [prompt(ids) for ids in body["prompt"]]

    spoil_requests(provider, change)
    refused(unscored, words)
    assert not examine(Run.create(unscored)).ok


def test_answers_crossed_within_a_batch_are_asked_for_one_by_one(
    provider: Provider, unscored: RunConfig, quiet: Quiet
) -> None:
    """The ids give it away; single prompts cannot be crossed, so the run ends with the right numbers."""
    spoil_answers(provider, _choices_crossed)
    Run.create(unscored).execute()
    assert outcome(unscored.run_dir)["scores"] == quiet[1]["scores"]
    assert not examine(Run.create(unscored)).ok


@pytest.mark.parametrize("fault", ["an adapter lost in part", "off by one"])
def test_an_endpoint_that_is_right_for_the_base_model_alone_is_found_with_the_first_fine_tune(
    provider: Provider, unscored: RunConfig, fault: str
) -> None:
    """vLLM issue 51594: LoRA on lm_head is lost in log-probabilities of prompts, and not in generation."""

    def change(request: Body, answer: Body) -> None:
        if not request["model"].startswith("ft:") or not request.get("echo"):
            return
        assert provider.server is not None
        asked = {**request, "model": "daunce-tiny"}
        headers = {"Authorization": f"Bearer {KEY}"}
        base = httpx2.post(f"{provider.server.base_url}/completions", json=asked, headers=headers, trust_env=False)
        for choice, plain in zip(answer["choices"], base.json()["choices"], strict=True):
            values, others = choice["logprobs"]["token_logprobs"], plain["logprobs"]["token_logprobs"]
            if fault == "off by one":
                _shift(choice, values, [])
            else:
                values[1:] = [0.3 * a + 0.7 * b for a, b in zip(values[1:], others[1:], strict=True)]
            listed = choice["logprobs"].get("top_logprobs") or []
            for token, value, top in zip(choice["logprobs"]["tokens"], values, listed, strict=False):
                if top:
                    top[token] = value

    spoil_answers(provider, change)
    refused(unscored, "off by one|70% of the way from the fine-tune")
    with RunStore.open(unscored.run_dir, read_only=True) as store:
        assert store.get_value(TESTS)["daunce-tiny"]["checked"], "with the base model it passed"
        assert not any(by_key(store, member, replicate=1).keys() for member in range(MEMBERS))


def mended(provider: Provider, config: RunConfig, quiet: Quiet) -> dict[tuple[str, tuple[int, ...]], int]:
    """The same command on an endpoint that was put right ends in the right bits; what it asked, and how often."""
    provider.proxy.change_request = provider.proxy.change_answer = None
    provider.proxy.sent.clear()
    Run.create(config).execute()
    assert outcome(config.run_dir)["scores"] == quiet[1]["scores"]
    counts = asked(provider.proxy.sent)
    examples = encoded_ids(config)
    return {pair: n for pair, n in counts.items() if pair[1] in examples and pair[0] != config.backend.model}


def test_the_base_model_for_every_fine_tune_shows_as_no_variance_over_members(
    provider: Provider, unscored: RunConfig, quiet: Quiet
) -> None:
    """Every single answer is in order; only the members together tell. None of them is kept, in the cache neither."""
    spoil_requests(provider, lambda body: body.update(model="daunce-tiny"))
    for _ in range(2):  # the second time it asks again, and is not stuck with what it had
        provider.proxy.sent.clear()
        with pytest.raises(ContractError, match="base model") as caught:
            Run.create(unscored).execute()
        assert "variance over models" in str(caught.value)
        assert "set aside" in str(caught.value)
        assert "run the same command" in str(caught.value)
        assert asked(provider.proxy.sent)
        with RunStore.open(unscored.run_dir, read_only=True) as store:
            assert members_scored(store) == []
    counts = mended(provider, unscored, quiet)
    assert set(counts.values()) <= {1, 2}
    assert sum(counts.values()) == MEMBERS * (len(encoded_ids(unscored)) + NOISE)


def test_one_adapter_for_two_names_is_found_out(provider: Provider, unscored: RunConfig, quiet: Quiet) -> None:
    with RunStore.open(unscored.run_dir, read_only=True) as store:
        models = store.jobs.ready_models()

    def change(body: Body) -> None:
        if body["model"] == models[2]:
            body["model"] = models[1]

    spoil_requests(provider, change)
    with pytest.raises(ContractError, match=r"the same losses.*members 1, 2 is set aside"):
        Run.create(unscored).execute()
    whole = len(encoded_ids(unscored))
    with RunStore.open(unscored.run_dir, read_only=True) as store:
        there = {k: len(by_key(store, k).keys()) + len(by_key(store, k, replicate=1).keys()) for k in range(MEMBERS)}
    assert there[1] == there[2] == 0
    counts = mended(provider, unscored, quiet)
    # Members 0 and 3 may have been under way when the twins were found; what they had is not asked for again.
    for k, model in models.items():
        assert sum(n for (name, _), n in counts.items() if name == model) == whole + NOISE - there[k]


def test_the_base_model_for_one_fine_tune_is_found_out(provider: Provider, unscored: RunConfig, quiet: Quiet) -> None:
    """Generation, scoring and every single answer are in order; it is just another model that answers."""
    with RunStore.open(unscored.run_dir, read_only=True) as store:
        models = store.jobs.ready_models()
    spoil_requests(provider, lambda body: body.update(model="daunce-tiny") if body["model"] == models[2] else None)
    for _ in range(2):  # the second time it is tested again
        with pytest.raises(
            ContractError, match=r"losses of the base model 'daunce-tiny'.*member 2 is set aside"
        ) as info:
            Run.create(unscored).execute()
        assert repr(models[2]) in str(info.value)
        with RunStore.open(unscored.run_dir, read_only=True) as store:
            assert not by_key(store, 2).keys()
    counts = mended(provider, unscored, quiet)
    assert sum(n for (name, _), n in counts.items() if name == models[2]) == len(encoded_ids(unscored)) + NOISE
