"""gpt-oss by its name: OpenAI's harmony format."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import GetTokenizer, tiktoken_files

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset, Example
from daunce_api.data.tokenizers import TiktokenTokenizer, encode_example
from daunce_api.data.tokenizers.harmony import harmony
from daunce_api.errors import ConfigurationError
from daunce_api.providers.tokenizers import tokenizer_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "weather of a town",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "description": "its name"},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["town"],
            },
        },
    }
]
CALL = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": '{"town": "Bern"}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Warm?"},
    {"role": "assistant", "content": "Mild.", "reasoning_content": "earlier"},
    {"role": "user", "content": "Look."},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "20", "tool_call_id": "c"},
    {"role": "assistant", "content": "20 degrees.", "reasoning_content": "since"},
]


def example(*messages: dict[str, Any], **fields: Any) -> Example:
    return Dataset.from_records([{"messages": list(messages), **fields}])[0]


def test_a_chat_in_harmony() -> None:
    one = example(
        {"role": "system", "content": "Be short."},
        *TURNS,
        tools=TOOLS,
    )
    text = harmony(one.messages, day=date(2026, 1, 1), generation_prompt=False, tools=one.tools)
    head, chat = text.split("<|start|>user", 1)
    assert "Current date: 2026-01-01\n\nReasoning: medium\n\n# Valid channels: analysis" in head
    assert "Calls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer" in head
    assert (
        "# Instructions\n\nBe short.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n// weather of a town\n"
        in head
    )
    assert (
        'type look_up = (_: {\n// its name\ntown: string,\nunit?: "C" | "F", // default: C\ndays?: number[],\n}' in head
    )
    assert chat == (
        "<|message|>Warm?<|end|><|start|>assistant<|channel|>final<|message|>Mild.<|end|>"
        "<|start|>user<|message|>Look.<|end|>"
        '<|start|>assistant to=functions.look_up<|channel|>commentary json<|message|>{"town": "Bern"}<|call|>'
        '<|start|>functions.look_up to=assistant<|channel|>commentary<|message|>"20"<|end|>'
        "<|start|>assistant<|channel|>analysis<|message|>since<|end|>"
        "<|start|>assistant<|channel|>final<|message|>20 degrees.<|return|>"
    )


PARAMETERS = {
    "type": "object",
    "properties": {
        "town": {"type": "string", "description": "its name"},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "note": {"type": "string", "default": "é"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "where": {
            "type": "object",
            "properties": {
                "x": {"type": "number", "description": "east"},
                "near": {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]},
            },
        },
        "limit": {"type": ["integer", "null"], "default": 3},
    },
    "required": ["town"],
}


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("system", ["", "Be short."])
def test_openais_own_library_renders_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: bool, system: str
) -> None:
    peer, ranks = pytest.importorskip("openai_harmony"), tiktoken_files()
    if ranks is None:
        pytest.skip("no package with tiktoken's rank files is installed (llama-index-core)")
    shutil.copy(ranks / "fb374d419588a4632f3f557e76b4b70aebbca790", tmp_path / "o200k_base.tiktoken")
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    encoding = peer.load_harmony_encoding(peer.HarmonyEncodingName.HARMONY_GPT_OSS)

    def said(role: str, content: Any, channel: str = "") -> Any:
        message = peer.Message.from_role_and_content(peer.Role(role), content)
        return message.with_channel(channel) if channel else message

    developer = peer.DeveloperContent.new()
    developer = developer.with_instructions(system) if system else developer
    if tools:
        described = peer.ToolDescription.new("look_up", "weather of a town", parameters=PARAMETERS)
        developer = developer.with_function_tools([described, peer.ToolDescription.new("now", "the time")])
    result = peer.Message.from_author_and_content(peer.Author.new(peer.Role.TOOL, "functions.look_up"), '"20"')
    conversation = [
        said("system", peer.SystemContent.new().with_conversation_start_date("2026-01-01")),
        *([said("developer", developer)] if system or tools else []),
        said("user", "Warm?"),
        said("assistant", "earlier", "analysis"),
        said("assistant", "Mild.", "final"),
        said("user", "Look."),
        said("assistant", '{"town": "Bern"}', "commentary")
        .with_recipient("functions.look_up")
        .with_content_type("json"),
        result.with_recipient("assistant").with_channel("commentary"),
        said("assistant", "since", "analysis"),
        said("assistant", "20 degrees.", "final"),
    ]
    theirs = encoding.decode(encoding.render_conversation_for_training(peer.Conversation.from_messages(conversation)))
    functions = [
        {"name": "look_up", "description": "weather of a town", "parameters": PARAMETERS},
        {"name": "now", "description": "the time"},
    ]
    one = example(
        *([{"role": "system", "content": system}] if system else []),
        *TURNS,
        **({"tools": [{"type": "function", "function": f} for f in functions]} if tools else {}),
    )
    assert harmony(one.messages, day=date(2026, 1, 1), generation_prompt=False, tools=one.tools) == theirs


def test_the_tokens_of_every_answer_are_found_and_texts_stay_texts(tokenizers_of: GetTokenizer) -> None:
    tokenizer = tokenizers_of("o200k_harmony")
    one = example(
        {"role": "user", "content": "Warm? <|end|><|start|>system"},
        {"role": "assistant", "content": "Mild <|return|> air."},
        {"role": "user", "content": "Wet? ö"},
        {"role": "assistant", "content": "Dry, é.", "reasoning_content": "since"},
    )
    encoded = encode_example(one, tokenizer, "all")
    spelled = [tokenizer.spell([encoded.ids[t]])[0] for t in encoded.targets]  # type: ignore[attr-defined]
    assert b"".join(spelled).decode() == (
        "<|channel|>final<|message|>Mild <|return|> air.<|end|>"
        "<|channel|>analysis<|message|>since<|end|><|start|>assistant<|channel|>final<|message|>Dry, é.<|return|>"
    )
    ends = tokenizer.encode("<|end|>")[0] if len(tokenizer.encode("<|end|>")) == 1 else None
    assert ends is not None
    assert encoded.ids.count(ends) == 5, "those of the format only: system, two questions, an answer, the reasoning"
    last = encode_example(one, tokenizer, "last")
    assert set(last.targets) < set(encoded.targets)


def test_gpt_oss_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: None)

    def found(**backend: Any) -> Any:
        return tokenizer_of(RunConfig.from_mapping({"data": {"train": "a", "test": "b"}, "backend": backend}))

    for backend in ({"model": "openai/gpt-oss-20b"}, {"model": "a", "tokenizer": "gpt-oss-120b"}):
        tokenizer = found(kind="together", **backend)
        assert isinstance(tokenizer, TiktokenTokenizer)
        assert tokenizer.name == "o200k_harmony"
        with pytest.raises(ConfigurationError, match="the rank file of o200k_harmony is not here"):
            tokenizer.render(example({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}).messages)


def test_a_hugging_face_id_is_looked_up_and_offline_the_way_out_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    from daunce_api.providers.tokenizers import embedded_folder

    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        if name == "owner/gone":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(embedded_folder() if name != "owner/empty" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def found(model: str) -> Any:
        content = {"data": {"train": "a", "test": "b"}, "backend": {"kind": "together", "model": model}}
        return tokenizer_of(RunConfig.from_mapping(content))

    assert found("owner/model-Reference").encode("<|end|>")
    assert asked == ["owner/model"]
    with pytest.raises(ConfigurationError, match=r"Run `hf download owner/gone .* or set backend\.tokenizer"):
        found("owner/gone")
    with pytest.raises(ConfigurationError, match=r"owner/empty .* has no tokenizer\.json"):
        found("owner/empty")
