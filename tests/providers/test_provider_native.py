"""SGLang's own route: ids compared one by one, and every other shape refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import BATCH, LONG, Server, body_of, encoded, run_config, sequence, truth

from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import encode_example
from daunce_api.errors import ContractError, RejectedError
from daunce_api.providers import sglang
from daunce_api.providers.contract import BEFORE_TARGETS
from daunce_api.providers.together.scorer import text_of
from daunce_api.providers.tokenizers import tokenizer_of

Change = Callable[[dict[str, Any]], dict[str, Any]]


def sglang_handler(change: Change | None = None, first_null: bool = True) -> Callable[[httpx2.Request], Any]:
    def handler(request: httpx2.Request) -> Any:
        body = body_of(request)
        ids, start = body["input_ids"], body["logprob_start_len"]
        values = sequence(body.get("lora_path", "base"), ids)
        triples = [[v, i, None] for v, i in zip(values[start:], ids[start:], strict=True)]
        if first_null:
            triples[0][0] = None
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": triples, "output_token_logprobs": [[-1.0, 3, None]]}
        answer = {"text": "x", "meta_info": meta}
        return httpx2.Response(200, content=json.dumps(change(answer) if change else answer))

    return handler


def make_sglang(server: Server, base_url: str = "http://s.test/v1", **options: Any) -> sglang.SGLangScorer:
    config = run_config(scorer="sglang", model="base", options=options)
    return sglang.open_scorer(server.context(config, base_url))


@pytest.mark.parametrize("first_null", [True, False])
@pytest.mark.parametrize("base_url", ["http://s.test", "http://s.test/v1"])
async def test_sglang_is_read_exactly(first_null: bool, base_url: str) -> None:
    server = Server(sglang_handler(first_null=first_null))
    scores = await make_sglang(server, base_url).score("ft", BATCH)
    assert [s.logprobs for s in scores] == [truth("ft", e) for e in BATCH]
    assert server.paths == ["POST /generate"] * 3
    body = server.body(0)
    assert body["logprob_start_len"] == 0  # some of the prompt with it, to tell a server's zeros from certainty
    assert body["return_logprob"] is True
    assert body["lora_path"] == "ft"


async def test_sglang_is_asked_for_the_base_model_without_an_adapter() -> None:
    server = Server(sglang_handler())
    (scores,) = await make_sglang(server).score("base", [LONG])
    assert scores.logprobs == truth("base", LONG)
    assert "lora_path" not in server.body()
    await make_sglang(server, adapters=False).score("ft", [LONG])
    assert "lora_path" not in server.body()


def meta(**changes: Any) -> Change:
    return lambda a: {**a, "meta_info": {**a["meta_info"], **changes}}


def triples(change: Callable[[list[Any]], list[Any]]) -> Change:
    return lambda a: meta(input_token_logprobs=change(a["meta_info"]["input_token_logprobs"]))(a)


SGLANG_WRONG: dict[str, tuple[Change, str]] = {
    "absent": (meta(input_token_logprobs=None), "does not answer as SGLang"),
    "no meta": (lambda a: {"text": "x"}, "does not answer as SGLang"),
    "generated only": (meta(input_token_logprobs=[[-1.0, 3, None]]), "other tokens"),
    "another id": (triples(lambda t: [*t[:3], [-1.0, 39, None], *t[4:]]), "position 3"),
    "off by one": (triples(lambda t: [[t[i - 1][0], *t[i][1:]] for i in range(len(t))]), "None"),
    "one short": (triples(lambda t: t[:-1]), "other tokens"),
    "template": (meta(prompt_tokens=19), "19 tokens"),
    "malformed": (triples(lambda t: [[1.0] for _ in t]), "malformed"),
    "off by one, two nulls": (triples(lambda t: [t[0], [None, *t[1][1:]], *t[2:]]), "None"),
    "null inside": (triples(lambda t: [*t[:11], [None, t[11][1], None], *t[12:]]), "None"),
    "stand-in": (triples(lambda t: [*t[:11], [-9999.0, t[11][1], None], *t[12:]]), "stand-in"),
    "positive": (triples(lambda t: [[0.5, i, None] for _, i, _ in t]), "never above 0"),
    "zeros": (triples(lambda t: [[0.0, i, None] for _, i, _ in t]), "not measurements"),
    "zeros after a null": (triples(lambda t: [t[0], *([0.0, i, None] for _, i, _ in t[1:])]), "not measurements"),
}


@pytest.mark.parametrize(("change", "words"), SGLANG_WRONG.values(), ids=SGLANG_WRONG)
async def test_wrong_answers_of_sglang_raise(change: Change, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        await make_sglang(Server(sglang_handler(change))).score("ft", [LONG])


async def test_sglang_is_asked_for_a_part_of_a_long_prompt_only() -> None:
    long = encoded(range(1, 39), range(35, 38), "longer")
    server = Server(sglang_handler())
    (scores,) = await make_sglang(server).score("ft", [long])
    assert scores.logprobs == truth("ft", long)
    assert server.body()["logprob_start_len"] == 34 - BEFORE_TARGETS
    zeros = sglang_handler(triples(lambda t: [t[0], *([0.0, i, None] for _, i, _ in t[1:])]))
    with pytest.raises(ContractError, match="not measurements"):
        await make_sglang(Server(zeros)).score("ft", [long])


async def test_an_answer_that_is_certain_is_a_measurement() -> None:
    """A label and the token that ends it, after a prompt that is not certain."""
    label = encoded(range(1, 12), [9, 10], "label")
    certain = sglang_handler(triples(lambda t: [*t[:9], *([0.0, i, None] for _, i, _ in t[9:])]))
    (scores,) = await make_sglang(Server(certain)).score("ft", [label])
    assert scores.logprobs == (0.0, 0.0)


def test_fingerprints_name_what_changes_the_answer() -> None:
    server = Server(lambda _: {})
    assert make_sglang(server).fingerprint == "sglang-generate"
    assert make_sglang(server, adapters=False).fingerprint != "sglang-generate"


async def test_sglang_is_not_sent_what_exceeds_the_context() -> None:
    server = Server(sglang_handler())
    with pytest.raises(RejectedError, match="takes 10"):
        await make_sglang(server, max_context_tokens=10).score("ft", [LONG])
    assert server.requests == []


TINY = tokenizer_of(run_config(model="daunce-tiny"))
EXAMPLES = [
    encode_example(Example("p", prompt="Q: What is naïve ✓?\nA:", completion=" a word."), TINY),
    encode_example(Example("c", messages=(Message("user", "hi <|x|>"), Message("assistant", "you 🙂"))), TINY),
]


def test_text_is_what_the_ids_came_from() -> None:
    for example in EXAMPLES:
        assert TINY.encode(text_of(example.example, TINY)) == list(example.ids)


def test_a_content_that_spells_a_special_token_is_caught_by_its_ids(tmp_path: Path) -> None:
    example = encode_example(Example("s", messages=(Message("user", "<|end|>"), Message("assistant", "x"))), TINY)
    as_the_server_reads = TINY.encode(text_of(example.example, TINY))
    specials = [p for p in ("<|end|>", "<|endoftext|>", "<|im_end|>") if len(TINY.encode(p)) == 1]
    if "<|end|>" in specials:
        assert as_the_server_reads != list(example.ids)
