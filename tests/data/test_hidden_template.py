"""Chats for endpoints whose template nobody knows: ids of the contents alone, over real tokenizers and any text."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_token_boundaries import SOME_TEXT, TEXT

from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import Tokenizer, encode_example
from daunce_api.errors import DataError
from daunce_api.providers.hidden_template import HiddenTemplateTokenizer

FAMILIES = ["o200k_base", "cl100k_base", "embedded"]
CHATS = st.lists(st.tuples(TEXT, SOME_TEXT), min_size=1, max_size=3)
MARKS = {-1, -2}


def chat(turns: list[tuple[str, str]]) -> Example:
    """User and assistant in turn."""
    pairs = [(Message("user", question), Message("assistant", answer)) for question, answer in turns]
    return Example("x", messages=tuple(message for pair in pairs for message in pair))


def assume_encodable(hidden: HiddenTemplateTokenizer, *chats: list[tuple[str, str]]) -> None:
    """An answer whose first token is a part of a character is refused where the tokenizer does not tell its bytes."""
    for turns in chats:
        assume(hidden.bytes_of(hidden.encode(turns[-1][1])[0]) is not None)


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
@given(turns=CHATS)
def test_the_targets_are_the_answers_own_tokens_whatever_stands_before(
    tokenizer: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    """So an answer of one token has one target; nothing merges over a turn, and nothing ends one."""
    hidden = HiddenTemplateTokenizer(tokenizer)
    assume_encodable(hidden, turns)
    example = chat(turns)
    encoded = encode_example(example, hidden)
    own = tokenizer.encode(turns[-1][1])
    assert list(encoded.ids[-len(own) :]) == own
    assert encoded.targets == tuple(range(len(encoded.ids) - len(own), len(encoded.ids)))
    every = encode_example(example, hidden, "all")
    answers = [i for _, answer in turns for i in tokenizer.encode(answer)]
    assert [every.ids[t] for t in every.targets] == answers
    assert not MARKS & set(answers), "ids that no vocabulary has are never measured"


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
@given(turns=CHATS)
def test_ids_offsets_and_contents_belong_together(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> None:
    hidden = HiddenTemplateTokenizer(tokenizer)
    assume_encodable(hidden, turns)
    messages = chat(turns).messages
    text = hidden.render(messages)
    ids, offsets = hidden.encode_with_offsets(text)
    assert ids == hidden.encode(text)
    assert len(ids) == len(offsets)
    assert {i for a, b in offsets for i in range(a, b)} == set(range(len(text)))
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)
    parts: list[list[int]] = []
    for i in ids:
        if i in MARKS:
            parts.append([i])
        else:
            parts[-1].append(i)
    said = [part for message in messages for part in (message.role, message.content)]
    assert [[p[0], *p[1:]] for p in parts] == [
        [(-1, -2)[n % 2], *tokenizer.encode(content)] for n, content in enumerate(said)
    ]
    assert hidden.render(messages[:-1], generation_prompt=True) == text[: len(text) - len(messages[-1].content)]


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
@given(one=CHATS, other=CHATS)
def test_chats_that_differ_have_keys_that_differ(
    tokenizer: Tokenizer, one: list[tuple[str, str]], other: list[tuple[str, str]]
) -> None:
    hidden = HiddenTemplateTokenizer(tokenizer)
    assume_encodable(hidden, one, other)
    keys = [encode_example(chat(turns), hidden).key for turns in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
@given(question=SOME_TEXT, cut=st.integers(0, 20))
def test_where_a_turn_ends_is_part_of_the_key(tokenizer: Tokenizer, question: str, cut: int) -> None:
    hidden = HiddenTemplateTokenizer(tokenizer)
    text = f"{question}tail"
    cuts = {min(cut, len(text) - 1), len(text) - 1}
    assume_encodable(hidden, *([(text[:c], text[c:])] for c in cuts))
    keys = {encode_example(chat([(text[:c], text[c:])]), hidden).key for c in cuts}
    assert len(keys) == len(cuts)


@pytest.mark.parametrize("tokenizer", ["o200k_base"], indirect=True)
@pytest.mark.parametrize("content", ["\ud8f0", "a\ud8f1b", "x\udfff"])
def test_half_a_surrogate_pair_cannot_pass_for_a_mark(tokenizer: Tokenizer, content: str) -> None:
    hidden = HiddenTemplateTokenizer(tokenizer)
    for turns in ([(content, "yes")], [("a", content)]):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            encode_example(chat(turns), hidden)
