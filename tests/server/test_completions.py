"""Completions: the scoring contract, checked against the engine itself, and what OpenAI's clients expect."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from daunce_api.providers.local.language import LanguageModel
from daunce_api.server import EmbeddedServer
from daunce_api.server.routes_completions import PORTION_TOKENS

from .conftest import MODEL, connect_async, echo, offline

END = 1
TEXT = "A dog is an animal."


@pytest.fixture(scope="module")
def engine() -> LanguageModel:
    import torch

    torch.set_num_threads(1)
    return LanguageModel.load(MODEL)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 2048) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def test_echo_gives_every_id_its_logprob_bit_for_bit(
    server: EmbeddedServer, client: openai.OpenAI, fine_tune: Any, engine: LanguageModel
) -> None:
    asked = prompts(12)
    adapter = server.log_path.parent / "adapters" / fine_tune.id / "final"
    for model, folder in ((MODEL, None), (fine_tune.fine_tuned_model, adapter)):
        answers = echo(client, model, asked)
        expected = engine.token_logprobs(asked, adapter=folder)
        for ids, got, want in zip(asked, answers, expected, strict=True):
            assert len(got) == len(ids)
            assert got[1:] == want.logprobs.tolist()
            # The first id stands after the end-of-text token, OpenAI's beginning of a document.
            assert got[0] == engine.token_logprobs([[END, ids[0]]], adapter=folder)[0].logprobs[0]
            assert all(math.isfinite(x) and x <= 0 for x in got)


def test_an_answer_does_not_depend_on_the_batch(client: openai.OpenAI) -> None:
    asked = prompts(16, seed=3, longest=400)
    assert sum(map(len, asked)) > PORTION_TOKENS  # so the server answers in more than one portion
    together = echo(client, MODEL, asked)
    assert [echo(client, MODEL, [p])[0] for p in asked[:2] + asked[-2:]] == together[:2] + together[-2:]
    assert echo(client, MODEL, asked[::-1], logprobs=3) == together[::-1]


def test_echo_answer_in_full(client: openai.OpenAI) -> None:
    ids = [3, 70, 71, 1]
    answer = client.completions.create(
        model=MODEL, prompt=ids, echo=True, logprobs=2, max_tokens=0, extra_body={"return_token_ids": True}
    )
    [choice] = answer.choices
    assert choice.logprobs.tokens[0] == "<|user|>"
    assert choice.logprobs.tokens[-1] == "<|end|>"
    assert choice.text == "".join(choice.logprobs.tokens)
    assert choice.logprobs.text_offset == [0, 8, 9, 10]
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
        assert max(top.values()) >= logprob
    assert (choice.to_dict()["prompt_token_ids"], choice.to_dict()["token_ids"]) == (ids, [])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 0, 4)
    assert choice.finish_reason == "length"


def test_tokens_can_be_named_by_id(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=[3, 70, 71],
        echo=True,
        logprobs=1,
        max_tokens=0,
        extra_body={"return_tokens_as_token_ids": True},
    )
    assert answer.choices[0].logprobs.tokens == ["token_id:3", "token_id:70", "token_id:71"]


def test_text_prompts_are_encoded_and_come_back(client: openai.OpenAI, engine: LanguageModel) -> None:
    texts = [TEXT, "naïve café – 日本", "tab\tnul\x00end"]
    answer = client.completions.create(model=MODEL, prompt=texts, echo=True, logprobs=0, max_tokens=0)
    for text, choice in zip(texts, answer.choices, strict=True):
        ids = engine.tokenizer.encode(text)
        assert choice.text == text
        assert choice.logprobs.token_logprobs[1:] == engine.token_logprobs([ids])[0].logprobs.tolist()
        assert choice.logprobs.text_offset[0] == 0
    halves = [t for c in answer.choices for t in c.logprobs.tokens if t.startswith("bytes:")]
    assert halves  # the model has no whole token for these characters
    assert answer.usage.prompt_tokens == sum(len(engine.tokenizer.encode(t)) for t in texts)


def test_greedy_text_is_the_argmax_of_its_own_echo(client: openai.OpenAI, fine_tune: Any) -> None:
    model = fine_tune.fine_tuned_model
    made = client.completions.create(
        model=model,
        prompt=TEXT,
        temperature=0,
        max_tokens=8,
        logprobs=1,
        echo=True,
        extra_body={"return_token_ids": True},
    ).choices[0]
    extra = made.to_dict()
    ids = [*extra["prompt_token_ids"], *extra["token_ids"]]
    again = client.completions.create(model=model, prompt=[ids], echo=True, logprobs=1, max_tokens=0).choices[0]
    for position in range(len(extra["prompt_token_ids"]), len(ids)):
        best = max(again.logprobs.top_logprobs[position].items(), key=lambda kv: kv[1])
        assert best[0] == again.logprobs.tokens[position]
        assert made.logprobs.token_logprobs[position] == pytest.approx(best[1], abs=1e-4)
    assert len(made.logprobs.tokens) == len(ids)


def test_sampling_follows_seed_and_stops(client: openai.OpenAI) -> None:
    def make(**options: Any) -> str:
        return client.completions.create(model=MODEL, prompt="A dog is", max_tokens=10, **options).choices[0].text

    sampled = [make(seed=s) for s in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1
    assert len({make(**how) for how in ({"temperature": 0}, {"temperature": 5e-324}, {"top_p": 0})}) == 1
    whole = make(temperature=0)
    mark = whole[3:6]
    cut = client.completions.create(
        model=MODEL, prompt="A dog is", max_tokens=10, temperature=0, stop=[mark], logprobs=0
    )
    assert cut.choices[0].text == whole[: whole.index(mark)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens == len(cut.choices[0].logprobs.tokens)


def test_chat_lists_the_most_likely_tokens(client: openai.OpenAI, fine_tune: Any, engine: LanguageModel) -> None:
    answer = client.chat.completions.create(
        model=fine_tune.fine_tuned_model,
        messages=[{"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": " 3"}]}],
        logprobs=True,
        top_logprobs=20,
        max_completion_tokens=1,
        temperature=0,
        seed=1,
    )
    [token] = answer.choices[0].logprobs.content
    assert len(token.top_logprobs) == 20
    assert token.logprob == token.top_logprobs[0].logprob == max(t.logprob for t in token.top_logprobs)
    assert bytes(token.bytes).decode() == token.token
    prompt = engine.tokenizer.encode("<|user|>what is 3<|end|><|assistant|>")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].message.content == token.token


def test_chat_takes_tools_calls_and_their_results(client: openai.OpenAI, fine_tune: Any, engine: LanguageModel) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = client.chat.completions.create(
        model=fine_tune.fine_tuned_model,
        messages=[
            {"role": "user", "content": "what is 3"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "4", "tool_call_id": "c"},
        ],
        tools=tools,
        max_completion_tokens=1,
    )
    prompt = (
        f"<|system|>Tools: {json.dumps(tools)}<|end|><|user|>what is 3<|end|><|assistant|>"
        '<call>f {"x": 1}</call><|end|><|tool|>4<|end|><|assistant|>'
    )
    assert answer.usage.prompt_tokens == len(engine.tokenizer.encode(prompt))
    with pytest.raises(openai.BadRequestError, match="only the assistant calls tools"):
        client.chat.completions.create(
            model=fine_tune.fine_tuned_model,
            messages=[{"role": "user", "content": "a", "tool_calls": [call]}],  # type: ignore[typeddict-unknown-key]
        )


def test_chat_takes_its_own_answers_back(client: openai.OpenAI) -> None:
    first: Any = {"role": "user", "content": "what is 3"}
    answer = client.chat.completions.create(model=MODEL, messages=[first], max_tokens=3, seed=1)
    message = answer.choices[0].message
    sizes = []
    for sent in (message, message.model_dump(), {"role": "assistant", "content": message.content}):
        history: list[Any] = [first, sent, {"role": "user", "content": "and 4"}]
        again = client.chat.completions.create(model=MODEL, messages=history, max_tokens=1)
        assert again.usage is not None
        sizes.append(again.usage.prompt_tokens)
    assert len(set(sizes)) == 1


def test_chat_stops_at_the_end_token(client: openai.OpenAI, fine_tune: Any) -> None:
    answer = client.chat.completions.create(
        model=fine_tune.fine_tuned_model, messages=[{"role": "user", "content": "what is 3"}], temperature=0
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert "<|end|>" not in (answer.choices[0].message.content or "")
    assert answer.choices[0].logprobs is None


def test_fingerprint_names_the_weights(client: openai.OpenAI, fine_tune: Any) -> None:
    def mark(model: str) -> str:
        return str(client.completions.create(model=model, prompt=[5], max_tokens=0, echo=True).system_fingerprint)

    assert mark(MODEL) == mark(MODEL) != mark(fine_tune.fine_tuned_model)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": [[5] * 513]}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 512, "max_tokens": 1}, "prompt", "context_length_exceeded"),
        ({"prompt": "word " * 50_000}, "prompt", "context_length_exceeded"),
        ({"prompt": [2048]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [10**30]}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": [5, "a"]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": [[5]] * 2049}, "prompt", "invalid_value"),
        ({"prompt": [[5] * 500] * 300}, "prompt", "invalid_value"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"stream": True}, "stream", "unsupported_value"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_value"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"suffix": "x"}, "suffix", "invalid_value"),
        ({"wrong_name": 1}, "wrong_name", "unknown_parameter"),
        ({"model": None}, "model", "invalid_value"),
    ],
)
def test_completion_refusals(http: httpx2.Client, change: dict[str, Any], param: str, code: str) -> None:
    response = http.post("/v1/completions", json={"model": MODEL, "prompt": [5], "max_tokens": 0, **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x " * 600}]}, "messages"),
        ({"tools": []}, "tools"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 600}, "messages"),
    ],
)
def test_chat_refusals(http: httpx2.Client, change: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **change}
    response = http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_long_request_lets_others_have_their_turn(tmp_path: Path) -> None:
    """Neither encoding many texts nor writing many alternatives keeps the event loop to itself."""
    app, service = offline(tmp_path)

    class Scorer:
        async def call(self, function: Any, adapter: Any, prompts: list[list[int]], top: int) -> list[Any]:
            sizes = [len(ids) for ids in prompts]
            return [{"logprobs": [-1.0] * n, "top_ids": [[]] * n, "top_logprobs": [[]] * n} for n in sizes]

    scorer: Any = Scorer()
    service.scorer = scorer
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as http:
        for prompt, least in ((["a text"] * 500, 1000), ([[5, 6]] * 500, 500)):
            before = turns
            body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 0}
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            assert turns - before >= least
    task.cancel()
    service.state.close()


async def test_no_answer_is_lost_or_crossed_under_load(
    server: EmbeddedServer, client: openai.OpenAI, fine_tune: Any
) -> None:
    """64 requests at once, two models: every answer holds the ids and the values of its own question."""
    asked = prompts(64, seed=9, longest=10)
    models = [MODEL, fine_tune.fine_tuned_model]
    alone = {m: echo(client, m, asked) for m in models}
    many = connect_async(server)

    async def one(index: int) -> None:
        model = models[index % 2]
        answer = await many.completions.create(
            model=model,
            prompt=[asked[index]],
            echo=True,
            logprobs=1,
            max_tokens=0,
            extra_body={"return_token_ids": True},
        )
        [choice] = answer.choices
        assert answer.model == model
        assert choice.to_dict()["prompt_token_ids"] == asked[index]
        assert choice.logprobs.token_logprobs == alone[model][index]

    await asyncio.gather(*(one(i) for i in range(64)))
    await many.close()
