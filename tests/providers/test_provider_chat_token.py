"""One generated token of a chat endpoint: exact, censored with a bound, or refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from provider_support import Server, chat, run_config

from daunce_api.data.dataset import Dataset, Example, Message
from daunce_api.data.tokenizers import EncodedExample, encode_dataset, encode_example
from daunce_api.errors import CapabilityError, ContractError, DataError
from daunce_api.providers.base import within_scope
from daunce_api.providers.hidden_template import HiddenTemplateTokenizer
from daunce_api.providers.openai_wire import chat_token


class Words:
    """A tokenizer of whole words and single spaces, so that counts are known."""

    name, fingerprint, begin, end = "words", "words-1", "", ""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, start = [], [], 0
        for word in text.replace(" ", "\0 \0").split("\0"):
            if word:
                if word not in self.words:
                    self.words.append(word)
                ids.append(self.words.index(word))
                offsets.append((start, start + len(word)))
                start += len(word)
        return ids, offsets

    def pieces(self, ids: Any) -> list[str]:
        return [self.words[i] for i in ids]

    def render(self, messages: Any, *, generation_prompt: bool = False) -> str:
        raise NotImplementedError


TOKENIZER = HiddenTemplateTokenizer(Words())


def make(server: Server, **options: Any) -> chat_token.ChatTokenScorer:
    config = run_config(scorer="chat_token", options=options)
    parsed, capabilities = chat_token.ChatTokenOptions.of(config), chat_token.scorer_capabilities(config)
    scorer = chat_token.ChatTokenScorer(server.client(), config, capabilities, parsed)
    scorer.tokenizer = TOKENIZER
    return scorer


def example(*contents: str, name: str = "c") -> EncodedExample:
    return encode_example(chat(*contents, name=name), TOKENIZER)


def entry(token: str, logprob: Any, *, raw: bool = True) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if raw else None}


def answer(listed: list[dict[str, Any]], chosen: dict[str, Any] | None = None, **choice: Any) -> dict[str, Any]:
    first = {**(chosen or listed[0]), "top_logprobs": listed}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "ft:m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": first["token"]},
                "logprobs": {"content": [first], "refusal": None},
                **choice,
            }
        ],
    }


LISTED = [entry("no", -0.3), entry("yes", -1.5), entry("maybe", -4.0)]


@pytest.mark.parametrize("raw", [True, False])
async def test_a_listed_token_is_exact_in_any_order(raw: bool) -> None:
    listed = [entry(e["token"], e["logprob"], raw=raw) for e in LISTED]
    for order in (listed, listed[::-1]):
        server = Server(lambda _, order=order: answer(order, entry("no", -0.3, raw=raw)))
        (scores,) = await make(server).score("ft:m", [example("Is it?", "yes")])
        assert scores.logprobs == (-1.5,)
        assert scores.censored == (False,)


async def test_the_request_asks_for_one_greedy_token_after_the_prompt_only() -> None:
    server = Server(lambda _: answer(LISTED))
    await make(server).score("ft:m", [example("Is it?", "yes")])
    assert server.body() == {
        "model": "ft:m",
        "messages": [{"role": "user", "content": "Is it?"}],
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 0,
    }


async def test_a_token_outside_the_list_is_censored_at_the_lowest_listed_value() -> None:
    server = Server(lambda _: answer([*LISTED, entry("odd", -9999.0)]))
    (scores,) = await make(server).score("ft:m", [example("Is it?", "never")])
    assert scores.logprobs == (-4.0,)
    assert scores.censored == (True,)
    assert scores.any_censored


async def test_the_chosen_token_at_minus_9999_is_never_stored() -> None:
    server = Server(lambda _: answer(LISTED, entry("never", -9999.0)))
    (scores,) = await make(server).score("ft:m", [example("Is it?", "never")])
    assert scores.logprobs == (-4.0,)
    assert scores.any_censored


async def test_a_chosen_token_beside_the_list_is_exact() -> None:
    server = Server(lambda _: answer(LISTED, entry("never", -6.0)))
    (scores,) = await make(server).score("ft:m", [example("Is it?", "never")])
    assert (scores.logprobs, scores.censored) == ((-6.0,), (False,))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no logprobs": (answer(LISTED, logprobs=None), "Reasoning models"),
    "empty content": (answer(LISTED, logprobs={"content": []}), "no log-probabilities"),
    "no list": (answer(LISTED, logprobs={"content": [{"token": "a", "logprob": -1.0}]}), "no list of likely"),
    "two tokens": (answer(LISTED, logprobs={"content": [{"top_logprobs": LISTED}] * 2}), "2 tokens"),
    "refused": (
        answer(LISTED, logprobs=None, message={"role": "assistant", "content": None, "refusal": "No."}),
        "refused to answer",
    ),
    "all stand-ins": (answer([entry("yes", -9999.0), entry("no", -9999.0)]), "only stand-ins"),
    "masked": (answer([entry("yes", 0.0), entry("no", -9999.0), entry("x", -9999.0)]), "mask or a temperature"),
    "positive": (answer([entry("yes", 0.5), entry("no", -1.0)]), "0.5"),
    "not a number": (answer([entry("yes", float("nan")), entry("no", -1.0)]), "nan"),
    "text": (answer([entry("yes", "-1"), entry("no", -1.0)]), "-1"),
    "bool": (answer([entry("yes", True), entry("no", -1.0)]), "True"),
    "null": (answer([entry("yes", None), entry("no", -1.0)]), "None"),
    "twice": (answer([entry("yes", -1.0), entry("yes", -2.0)]), "2 different values"),
    "another model": ({**answer(LISTED), "model": "gpt-other"}, "another model"),
    "two choices": ({**answer(LISTED), "choices": answer(LISTED)["choices"] * 2}, "2 choices"),
    "no choices": ({**answer(LISTED), "choices": None}, "no list of choices"),
}


@pytest.mark.parametrize(("body", "words"), WRONG.values(), ids=WRONG)
async def test_wrong_answers_raise_in_plain_words(body: dict[str, Any], words: str) -> None:
    import httpx2

    server = Server(lambda _: httpx2.Response(200, content=json.dumps(body)))
    with pytest.raises(ContractError, match=words):
        await make(server).score("ft:m", [example("Is it?", "yes")])


async def test_a_dated_answer_of_the_same_model_is_accepted() -> None:
    server = Server(lambda _: {**answer(LISTED), "model": "ft:m-2026-01-31"})
    assert await make(server).score("ft:m", [example("Is it?", "yes")])


def test_longer_completions_are_refused_and_first_token_is_a_choice_that_is_named() -> None:
    config = run_config(scorer="chat_token")
    capabilities = chat_token.scorer_capabilities(config)
    long = example("Is it?", "yes it is")
    assert len(long.targets) == 5
    with pytest.raises(CapabilityError, match=r"5 tokens.*echo.*first_token: true"):
        within_scope(long, capabilities)
    assert capabilities.measured == "completion"
    chosen = chat_token.scorer_capabilities(run_config(scorer="chat_token", options={"first_token": True}))
    assert within_scope(long, chosen).targets == long.targets[:1]
    assert within_scope(long, chosen).key != long.key
    assert chosen.measured == "first completion token only"
    assert any("first completion token only" in note for note in chosen.notes)


async def test_the_first_token_of_a_longer_completion_is_what_is_measured() -> None:
    server = Server(lambda _: answer(LISTED))
    scorer = make(server, first_token=True)
    cut = within_scope(example("Is it?", "yes it is"), scorer.capabilities)
    (scores,) = await scorer.score("ft:m", [cut])
    assert scores.logprobs == (-1.5,)


async def test_examples_that_a_chat_endpoint_cannot_be_asked_about() -> None:
    scorer = make(Server(lambda _: answer(LISTED)))
    plain = EncodedExample(Example("p", prompt="a", completion="b"), (1, 2), (1,))
    with pytest.raises(CapabilityError, match="is no chat"):
        await scorer.score("ft:m", [plain])
    with pytest.raises(CapabilityError, match="3 target tokens"):
        await scorer.score("ft:m", [example("a", "b c")])
    both = Example("w", messages=(Message("user", "a"), Message("assistant", "b"), *chat("c", "d").messages))
    two = replace(encode_example(both, TOKENIZER, "all"), targets=(9,))
    with pytest.raises(CapabilityError, match="2 measured turns"):
        await scorer.score("ft:m", [two])
    fields = {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    for more, refusal in ((fields, "calls a tool"), ({"reasoning_content": "r"}, "begins with reasoning")):
        asked = Example("w", messages=(Message("user", "a"), Message("assistant", "b", None, more)))
        with pytest.raises(CapabilityError, match=refusal):
            await scorer.score("ft:m", [replace(encode_example(asked, TOKENIZER), targets=(5,))])


async def test_tools_names_and_images_are_sent_as_they_are() -> None:
    server = Server(lambda _: answer(LISTED))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = (
        Message("user", [{"type": "text", "text": "a"}, image], None, {"name": "ann"}),
        Message("assistant", None, None, {"content": None, "tool_calls": [call]}),
        Message("tool", "20", None, {"tool_call_id": "c"}),
        Message("assistant", "b"),
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = Example("w", messages=messages, fields={"tools": tools, "parallel_tool_calls": False})
    encoded = encode_example(asked, TOKENIZER)
    await make(server).score("ft:m", [encoded])
    sent = json.loads(server.requests[0].content)
    assert sent["messages"] == [m.to_record() for m in messages[:-1]]
    assert (sent["tools"], sent["parallel_tool_calls"]) == (tools, False)
    other = replace(asked, messages=(Message("user", [{"type": "text", "text": "a"}]), *messages[1:]))
    assert encode_example(other, TOKENIZER).key != encoded.key, "an image is a part of what is asked"


async def test_the_last_turn_is_asked_for_after_all_turns_before_it() -> None:
    server = Server(lambda _: answer(LISTED))
    await make(server).score("ft:m", [example("a", "b", "c", "yes")])
    assert [m["content"] for m in server.body()["messages"]] == ["a", "b", "c"]


async def test_a_token_that_is_part_of_a_character_is_refused() -> None:
    class Halves(Words):
        def pieces(self, ids: Any) -> list[str]:
            return ["\ufffd" for _ in ids]

    scorer = make(Server(lambda _: answer(LISTED)))
    scorer.tokenizer = HiddenTemplateTokenizer(Halves())
    with pytest.raises(CapabilityError, match="part of a character"):
        await scorer.score("ft:m", [example("a", "yes")])


class Bytes(Words):
    """Tokens are single bytes, and it says which."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        character = [i for i, c in enumerate(text) for _ in range(len(c.encode()))]
        return list(text.encode()), [(i, i + 1) for i in character]

    def pieces(self, ids: Any) -> list[str]:
        return [bytes([i]).decode(errors="replace") for i in ids]


class Spelled(Bytes):
    def spell(self, ids: Any) -> list[bytes]:
        return [bytes([i]) for i in ids]


def part(number: int, logprob: float, raw: Any) -> dict[str, Any]:
    """A part of a character, as OpenAI lists it."""
    return {"token": f"\\x{number:x}", "logprob": logprob, "bytes": raw}


async def emoji(listed: list[dict[str, Any]], chosen: dict[str, Any] | None = None) -> Any:
    scorer = make(Server(lambda _: answer(listed, chosen)), first_token=True)
    scorer.tokenizer = tokenizer = HiddenTemplateTokenizer(Spelled())
    question = encode_example(chat("Well?", "🙂 yes"), tokenizer)
    assert tokenizer.bytes_of(question.ids[question.targets[0]]) == b"\xf0"
    (scores,) = await scorer.score("ft:m", [within_scope(question, scorer.capabilities)])
    return scores


async def test_the_first_part_of_a_character_is_measured_by_its_bytes() -> None:
    scores = await emoji([entry("no", -0.5), part(0xE2, -1.0, [0xE2]), part(0xF0, -1.5, [0xF0])])
    assert (scores.logprobs, scores.censored) == ((-1.5,), (False,))
    scores = await emoji([entry("no", -0.5), part(0xE2, -1.0, [0xE2])], entry("no", -0.5))
    assert (scores.logprobs, scores.censored) == ((-1.0,), (True,))


@pytest.mark.parametrize("hidden", [part(0xF0, -1.5, None), entry("\ufffd", -1.5), entry("\ufffd", -1.5, raw=False)])
async def test_parts_of_characters_without_their_bytes_are_not_taken_for_others(hidden: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=r"parts of characters without their bytes.*echo"):
        await emoji([entry("no", -0.5), hidden])


def test_an_answer_whose_first_bytes_nobody_knows_is_refused_before_anything_is_sent() -> None:
    """The data set is encoded for the plan."""
    tokenizer = HiddenTemplateTokenizer(Bytes())
    data = Dataset.from_records(
        [
            {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), texts, strict=True)]}
            for texts in (("🙂?", "yes"), ("Well?", "🙂"))
        ],
        name="train.jsonl",
    )
    with pytest.raises(DataError, match=r"part of a character.*backend\.tokenizer.*echo") as caught:
        encode_dataset(data, tokenizer)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("train.jsonl:2")
    assert encode_dataset(data, HiddenTemplateTokenizer(Spelled()))


def test_hidden_templates_tell_examples_apart_without_ids_of_a_template() -> None:
    one, two = example("a b", "c"), example("a", "b c")
    assert one.key != two.key
    assert example("a b", "c").key == one.key
    assert min(one.ids) < 0
    assert len(one.targets) == 1
    assert TOKENIZER.pieces(one.ids)[-1] == "c"
    with pytest.raises(DataError, match="surrogate"):
        TOKENIZER.render(chat("\ud8f0", "x").messages)


def test_every_kind_of_content_keeps_its_own_offsets() -> None:
    text = TOKENIZER.render(chat("a b", "c d").messages)
    ids, offsets = TOKENIZER.encode_with_offsets(text)
    assert len(ids) == len(offsets)
    assert offsets[0] == (0, 1)
    assert all(a < b for a, b in offsets)
    assert [b for _, b in offsets][:-1] == [a for a, _ in offsets][1:]
    assert math.isclose(offsets[-1][1], len(text))
