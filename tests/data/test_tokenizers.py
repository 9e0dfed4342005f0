"""Tokenizer folders, chat templates and tiktoken's encodings: what is read, refused and estimated."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import CHATML, EMBEDDED, GetTokenizer, byte_level, write_folder

from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import (
    LocalTokenizer,
    SpellingTokenizer,
    TiktokenTokenizer,
    encode_example,
    openai_models,
    tiktoken_encoding_name,
)
from daunce_api.errors import ConfigurationError, DataError

CHAT = (Message("user", "u"), Message("assistant", "a"))


def folder_with(tmp_path: Path, template: str | None = None, **settings: Any) -> Path:
    return write_folder(tmp_path / "t", byte_level(["<s>", "</s>"]), template=template, **settings)


# Folders


def test_the_embedded_tokenizer() -> None:
    tokenizer = LocalTokenizer(EMBEDDED)
    assert (tokenizer.begin, tokenizer.end) == ("", "<|end|>")
    assert tokenizer.encode(tokenizer.end) == [1]
    assert tokenizer.render(CHAT) == "<|user|>u<|end|><|assistant|>a<|end|>"
    assert tokenizer.render(CHAT[:1], generation_prompt=True) == "<|user|>u<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, "", "holds no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "\0", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[" * 100_000, "is not JSON"),
        ("chat_template.jinja", "{% for %}", "chat template of t does not work"),
    ],
)
def test_an_unusable_folder_is_said_to_be_that(tmp_path: Path, name: str | None, content: str, words: str) -> None:
    folder = tmp_path / "t"
    if name is not None:
        (folder_with(tmp_path) / name).write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        LocalTokenizer(folder)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        LocalTokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({}, ""),
        ({"bos_token": "<s>"}, ""),
        ({"bos_token": "<s>", "add_bos_token": True}, "<s>"),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": False}, ""),
        ({"add_bos_token": True}, ""),
    ],
)
def test_where_a_bos_comes_from(tmp_path: Path, settings: dict[str, Any], begin: str) -> None:
    assert LocalTokenizer(folder_with(tmp_path, **settings)).begin == begin


def test_offsets_include_the_white_space_of_a_token(tmp_path: Path) -> None:
    """The tokenizer's file asks for it to be cut off, which would leave characters that no token covers."""
    _, offsets = LocalTokenizer(folder_with(tmp_path)).encode_with_offsets("the sum of  two")
    assert [a for a, _ in offsets[1:]] == [b for _, b in offsets[:-1]]


def test_special_tokens_may_stand_in_their_own_file(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert LocalTokenizer(folder).end == "</s>"


def test_the_fingerprint_changes_with_what_changes_ids(tmp_path: Path) -> None:
    prints = set()
    for i, (template, settings) in enumerate(
        [(None, {}), (CHATML, {}), (None, {"eos_token": "</s>"}), (None, {"bos_token": "<s>", "add_bos_token": True})]
    ):
        prints.add(LocalTokenizer(folder_with(tmp_path / str(i), template, **settings)).fingerprint)
    prints.add(LocalTokenizer(write_folder(tmp_path / "other", byte_level(["<s>"]))).fingerprint)
    assert len(prints) == 5
    assert LocalTokenizer(EMBEDDED).fingerprint == LocalTokenizer(EMBEDDED).fingerprint


# Chat templates


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[1]['content'] }}{{ eos_token }}", "a</s>"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "u!"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% if tools is not none %}tools{% else %}none{% endif %}", "none"),
        ("{% if strftime_now is defined %}clock{% else %}no clock{% endif %}", "no clock"),
        ("{% for m in messages %}\n    {{- m.content }}\n{% endfor %}", "u\na\n"),
    ],
)
def test_templates_see_what_they_expect(tmp_path: Path, template: str, text: str) -> None:
    assert LocalTokenizer(folder_with(tmp_path, template, eos_token="</s>")).render(CHAT) == text


def test_one_of_several_templates_is_the_default(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert LocalTokenizer(folder_with(tmp_path, chat_template=templates)).render(CHAT) == "d"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ 1 + 'a' }}"],
)
def test_a_template_that_fails_is_an_error_of_the_model(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigurationError, match="chat template of t does not work"):
        LocalTokenizer(folder_with(tmp_path, template)).render(CHAT)


def test_a_template_cannot_reach_the_program(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(ConfigurationError, match="unsafe"):
        LocalTokenizer(folder_with(tmp_path, template)).render(CHAT)


def test_a_template_that_refuses_the_messages_is_an_error_of_the_example(tmp_path: Path) -> None:
    tokenizer = LocalTokenizer(folder_with(tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(DataError, match="example 'x': the chat template refuses the messages: roles must alternate"):
        encode_example(Example("x", messages=CHAT), tokenizer)


def test_a_template_that_leaves_out_an_answer_is_refused_where_it_is_measured(tmp_path: Path) -> None:
    """Like the templates that write only the last answer."""
    template = (
        "{% for m in messages %}<s>{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    tokenizer = LocalTokenizer(folder_with(tmp_path, template))
    example = Example("x", messages=CHAT + CHAT)
    with pytest.raises(DataError, match=r"'x': the chat template of t leaves out the text of messages\[1\]"):
        encode_example(example, tokenizer, "all")
    assert encode_example(example, tokenizer, "last").left_out == ("the text of earlier answers",)


def test_without_a_template_chats_are_refused_and_plain_records_are_not(tmp_path: Path) -> None:
    tokenizer = LocalTokenizer(folder_with(tmp_path))
    with pytest.raises(ConfigurationError, match="t has no chat template"):
        encode_example(Example("x", messages=CHAT), tokenizer)
    assert encode_example(Example("x", prompt="p", completion="c"), tokenizer).targets


# tiktoken


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4.1-mini", "o200k_base"),
        ("ft:gpt-4.1-mini-2025-04-14:org:suffix:id", "o200k_base"),
        ("ft:gpt-4o-mini:org::id:ckpt-step-88", "o200k_base"),
        ("ft:gpt-3.5-turbo-0125:org::id", "cl100k_base"),
        ("ft:babbage-002:org::id", "cl100k_base"),
        ("gpt-4-turbo", "cl100k_base"),
        ("gpt-4", "cl100k_base"),
        ("o3-mini", "o200k_base"),
        ("gpt-oss-20b", "o200k_harmony"),
        ("o200k_base", "o200k_base"),
        ("llama-3", None),
        ("", None),
    ],
)
def test_the_encoding_of_a_model(model: str, encoding: str | None) -> None:
    assert tiktoken_encoding_name(model) == encoding


def test_an_unknown_model_has_no_tokenizer() -> None:
    with pytest.raises(ConfigurationError, match=r"'llama-3' is not known. Set backend\.tokenizer"):
        TiktokenTokenizer("llama-3")


def test_counts_of_openai_models(tokenizers_of: GetTokenizer) -> None:
    tokenizer = tokenizers_of("o200k_base")
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert tokenizer.exact
    assert tokenizer.fingerprint == "o200k_base"
    assert tokenizer.encode("hello world") == [24912, 2375]
    # Three a message and three for the reply; user, assistant and the words are one token each.
    assert tokenizer.count(Example("x", messages=(Message("user", "hello"), Message("assistant", " world")))) == 13
    assert tokenizer.count(Example("x", prompt="hello", completion=" world")) == 2


def test_tiktoken_tells_the_bytes_of_parts_of_characters(tokenizers_of: GetTokenizer) -> None:
    tokenizer = tokenizers_of("o200k_base")
    assert isinstance(tokenizer, SpellingTokenizer)
    text = "🦩 über 𝔘"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.spell(ids)) == text.encode()
    assert any("\ufffd" in piece for piece in tokenizer.pieces(ids))
    assert not isinstance(tokenizers_of("embedded"), SpellingTokenizer)


def test_texts_that_tiktoken_cannot_split_are_counted_and_otherwise_refused(tokenizers_of: GetTokenizer) -> None:
    tokenizer = tokenizers_of("o200k_base")
    assert isinstance(tokenizer, TiktokenTokenizer)
    spaces = " " * 1_000_000
    with pytest.raises(DataError, match="1,000,000 characters"):
        tokenizer.encode(spaces)
    assert tokenizer.count_text(spaces) == 10 * tokenizer.count_text(spaces[:100_000])


def test_openai_chats_cannot_be_rendered(tokenizers_of: GetTokenizer) -> None:
    with pytest.raises(ConfigurationError, match="does not publish the chat template"):
        encode_example(Example("x", messages=CHAT), tokenizers_of("o200k_base"))


@pytest.fixture
def no_rank_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    openai_models._load.cache_clear()


@pytest.mark.usefixtures("no_rank_files")
def test_offline_counts_are_estimates_and_ids_are_refused() -> None:
    try:
        tokenizer = TiktokenTokenizer("gpt-4.1")
    finally:
        openai_models._load.cache_clear()
    assert not tokenizer.exact
    assert tokenizer.fingerprint == "estimate:o200k_base"
    assert [tokenizer.count_text(t) for t in ("", "a", "four", "fives", "é" * 4)] == [0, 1, 1, 2, 2]
    assert tokenizer.count(Example("x", messages=(Message("user", "12345678"), Message("assistant", "1234")))) == 16
    with pytest.raises(ConfigurationError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer.encode("made-up ids would pass for real ones")
    with pytest.raises(ConfigurationError, match="TIKTOKEN_CACHE_DIR"):
        encode_example(Example("x", prompt="p", completion="c"), tokenizer)


def test_a_download_that_hangs_ends_as_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: release.wait())
    monkeypatch.setattr(openai_models, "LOAD_SECONDS", 0.02)
    openai_models._load.cache_clear()
    try:
        assert not TiktokenTokenizer("gpt-4.1").exact
    finally:
        release.set()
        openai_models._load.cache_clear()
