"""OpenAI's harmony format (gpt-oss), which is public: <https://github.com/openai/harmony>.

A conversation begins with a system message of fixed wording. The user's system prompt and the tools' definitions go
into a developer message; an answer has a channel (reasoning: analysis, calls: commentary, text: final).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from ...errors import DataError
from ..example import Message, decoded_arguments

Protect = Callable[[str], str]

_TYPES = {"integer": "number"}


def harmony(
    messages: Sequence[Message],
    *,
    day: date,
    generation_prompt: bool,
    tools: Sequence[Any] = (),
    effort: str = "medium",
    protect: Protect = str,
) -> str:
    """A chat as text. Reasoning of turns before the last final answer is left out, as gpt-oss was trained.

    Raises DataError for contents that are no text and for a tool result that answers no call.
    """
    head = [
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06",
        f"Current date: {day.isoformat()}\n\nReasoning: {protect(effort)}\n",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    ]
    if tools:
        head.append("Calls to these tools must go to the commentary channel: 'functions'.")
    written = [_message("system", "\n".join(head))]
    opening = messages[:1] if messages and messages[0].role in ("system", "developer") else ()
    instructions = [f"# Instructions\n\n{protect(_text(m))}" for m in opening]
    if tools:
        instructions.append(f"# Tools\n\n{_namespace(tools, protect)}")
    if instructions:
        written.append(_message("developer", "\n\n".join(instructions)))
    last_final = max((i for i, m in enumerate(messages) if m.role == "assistant" and not m.calls), default=-1)
    called = ""
    for i, message in enumerate(messages):
        if i < len(opening):
            continue
        if message.role == "assistant":
            keeps_reasoning = i >= last_final
            final = i + 1 == len(messages)
            written += _answer(message, keeps_reasoning=keeps_reasoning, final=final, protect=protect)
            called = str(message.calls[-1].get("name")) if message.calls else called
        elif message.role in ("tool", "function"):
            name = str(message.fields.get("name") or called)
            if not name:
                raise DataError("a tool result stands before any call, and harmony names the tool. Add its name.")
            result = json.dumps(protect(_text(message)), ensure_ascii=False)
            written.append(
                f"<|start|>functions.{protect(name)} to=assistant<|channel|>commentary<|message|>{result}<|end|>"
            )
        else:
            role = "developer" if message.role == "system" else message.role
            written.append(_message(role, protect(_text(message))))
    return "".join(written) + ("<|start|>assistant" if generation_prompt else "")


def _message(role: str, content: str) -> str:
    return f"<|start|>{role}<|message|>{content}<|end|>"


def _answer(message: Message, *, keeps_reasoning: bool, final: bool, protect: Protect) -> Iterator[str]:
    start = "<|start|>assistant"
    if message.reasoning and keeps_reasoning:
        yield f"{start}<|channel|>analysis<|message|>{protect(message.reasoning)}<|end|>"
    text = _text(message)
    if message.calls:
        if text:
            yield f"{start}<|channel|>commentary<|message|>{protect(text)}<|end|>"
        for call in message.calls:
            arguments = decoded_arguments(call.get("arguments"))
            given = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            name = protect(str(call.get("name")))
            yield (f"{start} to=functions.{name}<|channel|>commentary json<|message|>{protect(given)}<|call|>")
    elif text:
        yield f"{start}<|channel|>final<|message|>{protect(text)}{'<|return|>' if final else '<|end|>'}"


def _text(message: Message) -> str:
    if message.images:
        raise DataError("holds an image, which gpt-oss does not read. Leave the example out.")
    return "".join(message.texts)


def _namespace(tools: Sequence[Any], protect: Protect) -> str:
    lines = ["## functions", "", "namespace functions {", ""]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        lines += [f"// {protect(line)}" for line in str(function.get("description") or "").splitlines()]
        parameters = function.get("parameters") or {}
        name = protect(str(function.get("name")))
        if parameters.get("properties"):
            lines += [f"type {name} = (_: {{", *_properties(parameters, protect), "}) => any;", ""]
        else:
            lines += [f"type {name} = () => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _properties(schema: Mapping[str, Any], protect: Protect, indent: str = "") -> Iterator[str]:
    required = schema.get("required") or ()
    for name, value in schema["properties"].items():
        described = value if isinstance(value, Mapping) else {}
        if described.get("description"):
            yield from (f"{indent}// {protect(line)}" for line in str(described["description"]).splitlines())
        default = ""
        if "default" in described:
            plain = described.get("enum") and isinstance(described["default"], str)
            default = protect(described["default"] if plain else json.dumps(described["default"], ensure_ascii=False))
            default = f" // default: {default}"
        key = f"{protect(str(name))}{'' if name in required else '?'}"
        yield f"{indent}{key}: {_type(described, protect, indent)},{default}"


def _type(schema: Mapping[str, Any], protect: Protect, indent: str) -> str:
    if schema.get("enum"):
        return " | ".join(protect(json.dumps(v, ensure_ascii=False)) for v in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return " | ".join(_type(s, protect, indent) for s in schema[key])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " | ".join(_TYPES.get(k, protect(str(k))) for k in kind)
    if kind == "array":
        return f"{_type(schema.get('items') or {}, protect, indent)}[]"
    if kind == "object" and schema.get("properties"):
        inner = indent + "    "
        return "{\n" + "\n".join(_properties(schema, protect, inner)) + f"\n{inner}}}"
    return _TYPES.get(kind, protect(str(kind)))
