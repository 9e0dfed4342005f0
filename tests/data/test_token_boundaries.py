"""Which tokens carry the loss: exactly those of the completion, for any text and several tokenizer families."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import GetTokenizer

from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import EncodedExample, LocalTokenizer, TiktokenTokenizer, Tokenizer, encode_example
from daunce_api.errors import DataError

EMBEDDED = "model"  # the folder's name
FAMILIES = ["embedded", "chatml", "llama", "o200k_base", "cl100k_base"]

# Texts around the places where merges, normalisation and bytes make trouble.
PIECES = st.sampled_from(
    [
        "the",
        " the",
        "foo",
        "def f",
        "oo",
        " ",
        "  ",
        "\n",
        "\t",
        "e",
        "́",
        "é",
        "日",
        "本語",
        "😀",
        "👍🏽",
        "\u200d",
        "\x00",
        "\x1b[0m",
        "<",
        "|",
        ".",
        "12345",
        "\ufdd0",
        "\ufeff",
        "▁",
        "<|end|>",
        "<|im_end|>",
        "</s>",
        "<s>",
    ]
)
TEXT = st.lists(PIECES | st.text(st.characters(codec="utf-8"), max_size=4), max_size=6).map("".join)
SOME_TEXT = TEXT.filter(bool)


def decode(tokenizer: Tokenizer, ids: tuple[int, ...] | list[int]) -> str:
    if isinstance(tokenizer, TiktokenTokenizer):
        return str(tokenizer._encoding.decode_bytes(list(ids)).decode())
    assert isinstance(tokenizer, LocalTokenizer)
    return str(tokenizer._backend.decode(list(ids), skip_special_tokens=False))


def merged(encoded: EncodedExample, tokenizer: Tokenizer, before: str) -> bool:
    """Whether the first target covers the end of what stands before it, too."""
    return len(decode(tokenizer, encoded.ids[: encoded.targets[0]])) < len(before)


def check_tail(encoded: EncodedExample, tokenizer: Tokenizer, before: str, tail: str) -> None:
    """The targets are one run to the end, and their text is ``tail`` but for one token over the boundary."""
    first = encoded.targets[0]
    assert encoded.targets == tuple(range(first, len(encoded.ids)))
    assert decode(tokenizer, encoded.ids) == before + tail
    head = decode(tokenizer, encoded.ids[:first])
    if merged(encoded, tokenizer, before):
        assert before.startswith(head)
        assert len(head) < len(before)
    else:
        assert head == before
        assert decode(tokenizer, encoded.ids[first:]) == tail


@pytest.mark.parametrize("tokenizer", ["embedded", "o200k_base", "cl100k_base"], indirect=True)
@given(prompt=SOME_TEXT, completion=SOME_TEXT)
def test_the_targets_of_a_plain_example_spell_its_completion(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> None:
    prompt = f"Q:{prompt}"  # a token over the boundary is then never the first one
    encoded = encode_example(Example("x", prompt=prompt, completion=completion), tokenizer)
    check_tail(encoded, tokenizer, prompt, completion + tokenizer.end)
    if merged(encoded, tokenizer, prompt):
        offsets = tokenizer.encode_with_offsets(prompt + completion + tokenizer.end)[1]
        start, stop = offsets[encoded.targets[0]]
        assert start < len(prompt) < stop


def test_a_merged_token_at_the_very_start_is_not_measured(tokenizers_of: GetTokenizer) -> None:
    """Nothing stands before it that it could be predicted from; the rest of the completion is measured."""
    tokenizer = tokenizers_of("o200k_base")
    encoded = encode_example(Example("x", prompt="foo", completion="the"), tokenizer)
    assert tokenizer.pieces(encoded.ids) == ["foot", "he"]
    assert encoded.targets == (1,)
    with pytest.raises(DataError, match="'x' has no completion token"):
        encode_example(Example("x", prompt="f", completion="oo"), tokenizer)


@pytest.mark.parametrize("tokenizer", ["embedded", "chatml"], indirect=True)
@given(question=TEXT, first=SOME_TEXT, second=SOME_TEXT)
def test_the_targets_of_a_chat_spell_the_answer_and_its_end(
    tokenizer: Tokenizer, question: str, first: str, second: str
) -> None:
    question, first, second = (unicodedata.normalize("NFC", t) for t in (question, first, second))
    messages = (
        Message("user", question),
        Message("assistant", first),
        Message("user", question),
        Message("assistant", second),
    )
    start, end = ("<|{}|>", "<|end|>") if tokenizer.name == EMBEDDED else ("<|im_start|>{}\n", "<|im_end|>\n")
    parts = [start.format(m.role) + m.content + end for m in messages]
    example = Example("x", messages=messages)
    last = encode_example(example, tokenizer, "last")
    before = "".join(parts[:3]) + start.format("assistant")
    assert not merged(last, tokenizer, before) or tokenizer.name == "chatml"
    check_tail(last, tokenizer, before, second + end)
    every = encode_example(example, tokenizer, "all")
    assert every.ids == last.ids
    assert set(every.targets) > set(last.targets)
    if tokenizer.name == EMBEDDED:  # special tokens stand at every boundary, so no token covers two turns
        earlier = [t for t in every.targets if t < last.targets[0]]
        assert decode(tokenizer, [every.ids[t] for t in earlier]) == first + end


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
@given(text=TEXT)
def test_offsets_lie_in_order_and_cover_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(offsets)
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)
    covered = {i for a, b in offsets for i in range(a, b)}
    assert covered == set(range(len(text))) or tokenizer.name == "chatml"  # NFC drops nothing but composes


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "targets"),
    [
        ("the sum", " of two", ["<s>", "sum"], " of two</s>"),
        ("<s>the sum", " of two", ["<s>", "sum"], " of two</s>"),
        ("", "sum", ["<s>", "sum"], "sum</s>"),
    ],
)
def test_a_family_with_bos_gets_one_and_only_one(
    tokenizers_of: GetTokenizer, prompt: str, completion: str, ids: list[str], targets: str
) -> None:
    """Its length limit of eight tokens, left in the file, cuts nothing."""
    tokenizer = tokenizers_of("llama")
    encoded = encode_example(Example("x", prompt=prompt, completion=completion), tokenizer)
    assert encoded.ids.count(1) == 1
    assert encoded.ids[0] == 1
    assert encoded.ids[-1] == 2
    assert decode(tokenizer, encoded.ids[encoded.targets[0] :]) == targets


@pytest.mark.parametrize("tokenizer", ["o200k_base", "cl100k_base"], indirect=True)
@pytest.mark.parametrize(
    ("prompt", "completion", "target", "moved"),
    [("def f", "oo", " foo", True), ("Answer: ", "Paris", " Paris", True), ("Answer:", " Paris", " Paris", False)],
)
def test_the_known_merges_of_openai_models(
    tokenizer: Tokenizer, prompt: str, completion: str, target: str, moved: bool
) -> None:
    encoded = encode_example(Example("x", prompt=prompt, completion=completion), tokenizer)
    assert tokenizer.pieces([encoded.ids[t] for t in encoded.targets]) == [target]
    assert merged(encoded, tokenizer, prompt) == moved
    apart = [*tokenizer.encode(prompt), *tokenizer.encode(completion)]
    assert (apart == list(encoded.ids)) != moved


def test_a_prompt_token_that_the_completion_reshapes_is_no_target(tokenizers_of: GetTokenizer) -> None:
    """Where the encodings of prompt and whole part ways earlier than at the boundary, the tokens before the
    boundary still belong to the prompt."""
    tokenizer = tokenizers_of("embedded")
    reshaped = 0
    words = ["definition", "question", "assistant", "interesting", "understanding", "government", "something"]
    for word in words:
        for cut in range(1, len(word)):
            prompt, completion = f"What {word[:cut]}", word[cut:]
            encoded = encode_example(Example("x", prompt=prompt, completion=completion), tokenizer)
            first = encoded.targets[0]
            alone = tokenizer.encode(prompt)
            parting = next((i for i, (a, b) in enumerate(zip(alone, encoded.ids, strict=False)) if a != b), len(alone))
            reshaped += parting < first
            text = decode(tokenizer, encoded.ids[: first + 1])
            assert len(text) > len(prompt)
            assert len(decode(tokenizer, encoded.ids[:first])) <= len(prompt)
    assert reshaped > 0


def test_without_a_prompt_the_first_token_is_not_predicted(tokenizers_of: GetTokenizer) -> None:
    encoded = encode_example(Example("x", completion="a quiet word"), tokenizers_of("embedded"))
    assert encoded.targets == tuple(range(1, len(encoded.ids)))


def test_nothing_to_measure_is_an_error(tokenizers_of: GetTokenizer) -> None:
    with pytest.raises(DataError, match="'x' has no completion token"):
        encode_example(Example("x", prompt="", completion="A"), tokenizers_of("o200k_base"))


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode_example(Example("x", prompt="p", completion="a\ud800"), tokenizer)


@pytest.mark.parametrize("tokenizer", FAMILIES, indirect=True)
def test_long_texts_are_encoded_whole(tokenizer: Tokenizer) -> None:
    encoded = encode_example(Example("x", prompt="the sum " * 5_000, completion=" is 😀" * 5_000), tokenizer)
    assert decode(tokenizer, encoded.ids).endswith("😀" + tokenizer.end)
    assert len(encoded.targets) >= 5_000


def test_equal_ids_and_targets_have_one_key(tokenizers_of: GetTokenizer) -> None:
    tokenizer = tokenizers_of("embedded")
    a = encode_example(Example("a", prompt="p q", completion=" c"), tokenizer)
    b = encode_example(Example("b", prompt="p q", completion=" c"), tokenizer)
    c = encode_example(Example("c", prompt="p", completion=" q c"), tokenizer)
    assert a.key == b.key
    assert a.ids == c.ids
    assert a.key != c.key
