"""vLLM's prompt_logprobs on completions and chat: read by id, and every other shape refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from provider_support import BATCH, LONG, Server, body_of, run_config, sequence, toy, truth

from daunce_api.errors import ContractError, RejectedError, TransientError
from daunce_api.providers import vllm

Change = Callable[[list[Any]], list[Any]]


def tables(model: str, ids: list[int]) -> list[Any]:
    """As vLLM sends them: the token itself and the most likely one."""
    found: list[Any] = [None]
    for t in range(1, len(ids)):
        values = toy(model, tuple(ids[:t]))
        best = max(range(len(values)), key=values.__getitem__)
        listed = {best: values[best], ids[t]: values[ids[t]]}
        rank = {i: sorted(values, reverse=True).index(v) + 1 for i, v in listed.items()}
        found.append({str(i): {"logprob": v, "rank": rank[i], "decoded_token": f"<{i}>"} for i, v in listed.items()})
    return found


def completions(change: Change | None = None, **extra: Any) -> Callable[[httpx2.Request], Any]:
    def handler(request: httpx2.Request) -> Any:
        body = body_of(request)
        choices = []
        for i, ids in enumerate(body["prompt"]):
            found = tables(body["model"], ids)
            choices.append({"index": i, "text": "x", "prompt_logprobs": change(found) if change else found, **extra})
        return httpx2.Response(200, content=json.dumps({"model": body["model"], "choices": choices[::-1]}))

    return handler


def make(server: Server, **options: Any) -> Any:
    return vllm.open_scorer(server.context(run_config(scorer="prompt_logprobs", options=options)))


async def test_an_honest_server_is_read_exactly_by_id() -> None:
    server = Server(completions())
    scores = await make(server).score("ft", BATCH)
    assert [s.logprobs for s in scores] == [truth("ft", e) for e in BATCH]
    body = server.body()
    assert body["prompt_logprobs"] == 1
    assert body["max_tokens"] == 1
    assert body["prompt"] == [list(e.ids) for e in BATCH]


async def test_a_first_entry_that_is_not_null_is_accepted() -> None:
    server = Server(completions(lambda t: [{"1": {"logprob": -1.0}}, *t[1:]]))
    (scores,) = await make(server).score("ft", [LONG])
    assert scores.logprobs == truth("ft", LONG)


def at(position: int, entry: Any) -> Change:
    return lambda t: [*t[:position], entry, *t[position + 1 :]]


WRONG: dict[str, tuple[Change, str]] = {
    "ignored": (lambda _: [], "ignores prompt_logprobs"),
    "another token": (at(9, {"39": {"logprob": -1.0}}), "another token than was sent at position 9"),
    "null inside": (at(9, None), "position 9"),
    "no entry": (at(9, {"10": None}), "position 9"),
    "bare number": (at(9, {"10": -1.0}), "position 9"),
    "clamped": (at(9, {"10": {"logprob": -9999.0}}), "stand-in"),
    "not a number": (at(9, {"10": {"logprob": float("nan")}}), "nan"),
    "text": (at(9, {"10": {"logprob": "-1"}}), "'-1'|-1"),
    "positive": (at(9, {"10": {"logprob": 0.5}}), "never above 0"),
    "above rank 1": (
        at(9, {"39": {"logprob": -1.0, "rank": 1}, "10": {"logprob": -0.5, "rank": 2}}),
        "lists -1.0000 as the highest log-probability at token 9",
    ),
    "truncated": (lambda t: t[:-1], "adds, drops or truncates"),
    "truncated at the left": (lambda t: [None, *t[2:]], "another token"),
    "a template": (lambda t: [None, {"39": {"logprob": -1.0}}, *t[1:]], "another token"),
    "one token more": (lambda t: [*t, {"5": {"logprob": -1.0}}], "adds, drops or truncates"),
    "shifted by one": (lambda t: [t[1], *t[2:], None], "position 0|another token"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
async def test_wrong_answers_raise_in_plain_words(change: Change, words: str) -> None:
    server = Server(completions(change))
    with pytest.raises(ContractError, match=words):
        await make(server).score("ft", [LONG])


async def test_ids_that_the_server_says_it_read_are_compared() -> None:
    server = Server(completions(prompt_token_ids=[*LONG.ids[:-1], 39]))
    with pytest.raises(ContractError, match="position 14"):
        await make(server).score("ft", [LONG])
    assert await make(Server(completions(prompt_token_ids=list(LONG.ids)))).score("ft", [LONG])


async def test_an_absent_field_and_another_model_are_refused() -> None:
    missing = Server(lambda _: {"model": "ft", "choices": [{"index": 0, "text": "x"}]})
    with pytest.raises(ContractError, match="Use scorer kind echo"):
        await make(missing).score("ft", [LONG])
    base = Server(lambda r: {**json.loads(completions()(r).content), "model": "base"})
    with pytest.raises(ContractError, match="another model"):
        await make(base).score("ft", [LONG])


async def test_integer_error_codes_keep_their_meaning() -> None:
    error = {"object": "error", "message": "no such model", "type": "NotFoundError", "param": None, "code": 404}
    with pytest.raises(RejectedError, match="no such model"):
        await make(Server(lambda _: httpx2.Response(404, json=error))).score("ft", [LONG])
    busy = {"error": {"message": "busy", "type": "x", "code": 503}}
    with pytest.raises(TransientError) as info:
        await make(Server(lambda _: httpx2.Response(503, json=busy, headers={"retry-after": "2"}))).score("ft", [LONG])
    assert info.value.retry_after == 2.0


async def test_what_exceeds_the_context_is_not_sent() -> None:
    server = Server(completions())
    with pytest.raises(RejectedError, match="15 tokens and the model takes 15"):
        await make(server, max_context_tokens=15).score("ft", [LONG])
    assert server.requests == []


def test_the_toy_server_speaks_of_the_same_numbers() -> None:
    ids = list(LONG.ids)
    assert [t and t[str(i)]["logprob"] for t, i in zip(tables("m", ids), ids, strict=True)] == sequence("m", ids)


def test_capabilities() -> None:
    both = vllm.scorer_capabilities(run_config(scorer="prompt_logprobs"))
    assert (both.scope, both.max_prompts_per_request) == ("any", 32)
