"""A chat template that only the server knows: the span is found in its rendering, verified, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from provider_support import chat, run_config

from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import encode_example
from daunce_api.errors import ConfigurationError, DataError, StopError, TransientError
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.server_tokenizer import ServerTokenizer, _byte_alphabet, _pieces
from daunce_api.providers.tokenizers import tokenizer_of

TINY: Any = tokenizer_of(run_config(model="daunce-tiny"))
KEY = "sk-marked-0123456789abcdef"


def vllm(change: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None) -> Callable[[httpx2.Request], Any]:
    """/tokenize and /detokenize over the embedded model's tokenizer."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        path = request.url.path
        if path == "/tokenize":
            if "messages" in body:
                messages = [Message(m["role"], m["content"]) for m in body["messages"]]
                text = TINY.render(messages, generation_prompt=body["add_generation_prompt"])
            else:
                text = body["prompt"]
            ids = TINY.encode(text)
            spelled = [TINY._backend.id_to_token(i) for i in ids]
            answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": 256}
            if body.get("return_token_strs"):
                answer["token_strs"] = spelled
        else:
            assert path == "/detokenize"
            answer = {"prompt": TINY._backend.decode(body["tokens"], skip_special_tokens=False)}
        return httpx2.Response(200, json=change(path, answer) if change else answer)

    return handler


def make(handler: Any = None) -> ServerTokenizer:
    http = httpx2.Client(transport=httpx2.MockTransport(handler or vllm()))
    return ServerTokenizer(Endpoint("http://vllm.test/v1", KEY, "the server"), "tiny", http_client=http)


CHATS = [chat("hello", "there"), chat("Was heißt das? ✓", "漢字 🙂!", "and", " more\n\nlines ")]


@pytest.mark.parametrize("example", CHATS)
@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_the_span_is_that_of_the_clients_own_rendering(example: Example, loss_on: Any) -> None:
    ours, theirs = encode_example(example, TINY, loss_on), encode_example(example, make(), loss_on)
    assert (theirs.ids, theirs.targets) == (ours.ids, ours.targets)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_offsets_cover_any_text(text: str) -> None:
    ids, offsets = make().encode_with_offsets(text)
    assert ids == TINY.encode(text)
    assert len(offsets) == len(ids)
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    covered = {i for a, b in offsets for i in range(a, b)}
    assert covered == set(range(len(text)))


def test_a_rendering_that_is_no_text_is_refused() -> None:
    def other(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": answer["prompt"] + "x"} if path == "/detokenize" else answer

    with pytest.raises(DataError, match="gives other tokens"):
        encode_example(CHATS[0], make(vllm(other)))


def test_tokens_that_do_not_spell_the_text_are_refused() -> None:
    def unspelled(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "token_strs": ["?" for _ in answer["tokens"]]} if "token_strs" in answer else answer

    with pytest.raises(DataError, match="do not spell"):
        encode_example(CHATS[0], make(vllm(unspelled)))

    def silent(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in answer.items() if k != "token_strs"}

    with pytest.raises(ConfigurationError, match="token_strs"):
        encode_example(CHATS[0], make(vllm(silent)))


def test_servers_that_cannot_be_asked() -> None:
    with pytest.raises(ConfigurationError, match="has no /tokenize"):
        make(lambda _: httpx2.Response(404)).encode("x")
    with pytest.raises(StopError) as info:
        make(lambda _: httpx2.Response(401, json={"error": f"bad key {KEY}"})).encode("x")
    assert KEY not in str(info.value)
    with pytest.raises(TransientError):
        make(lambda _: httpx2.Response(200, text="<html>")).encode("x")
    with pytest.raises(TransientError, match="without token ids"):
        make(lambda _: httpx2.Response(200, json={"tokens": ["a"]})).encode("x")


def test_both_spellings_of_bytes() -> None:
    assert _pieces(["Ġa", "Ã", "¤"], " aä".encode()) == [b" a", b"\xc3", b"\xa4"]
    assert _pieces(["▁a", "<0xC3>", "<0xA4>"], " aä".encode()) == [b" a", b"\xc3", b"\xa4"]
    assert _pieces(["▁a"], b"a") is None
    assert sorted(_byte_alphabet().values()) == list(range(256))


def test_each_text_is_asked_for_once_and_the_fingerprint_is_of_the_ids() -> None:
    asked: list[str] = []

    def count(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        response: httpx2.Response = vllm()(request)
        return response

    tokenizer = make(count)
    tokenizer.encode("a")
    tokenizer.encode("a")
    assert asked == ["/tokenize"]
    assert tokenizer.fingerprint == make().fingerprint
    assert tokenizer.pieces(TINY.encode("a")) == ["a"]


def test_it_is_chosen_by_the_config() -> None:
    chosen = tokenizer_of(run_config(model="m", tokenizer="server"))
    assert isinstance(chosen, ServerTokenizer)
    with pytest.raises(ConfigurationError, match="address"):
        tokenizer_of(run_config("openai", model="m", tokenizer="server", base_url=None))
