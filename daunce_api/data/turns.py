"""Turns of chats in the spellings of other dialects, as messages of ours; files whose records hold several chats, or
single messages; and what stands as text in a table's cell."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "chatbot"), "assistant"),
    **{role: role for role in ("system", "developer")},
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "function_call": "function_call",
}


def role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def without_nulls(message: Any) -> Any:
    """A message without its null fields; its content stays where it is null on purpose, beside a call."""
    if not isinstance(message, Mapping):
        return message
    called = message.get("tool_calls") or message.get("function_call")
    return {k: v for k, v in message.items() if v is not None or (k == "content" and called)}


def spoken(turn: Any) -> Any:
    """A turn of ShareGPT (``from``, ``value``) as a message."""
    if not isinstance(turn, Mapping):
        return turn
    turn = without_nulls(turn)
    if "from" not in turn:
        return {**turn, "role": SPEAKERS.get(str(turn.get("role")).lower(), turn.get("role"))}
    speaker = str(turn["from"])
    role = SPEAKERS.get(speaker.lower(), speaker)
    content = turn.get("value", turn.get("content"))
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "content")}
    if role == "function_call":
        call = from_text(content)
        calls = call if isinstance(call, list) else [call]
        if all(isinstance(c, Mapping) and "name" in c for c in calls):
            named = [{"type": "function", "function": {"arguments": {}, **c}} for c in calls]
            return {"role": "assistant", "content": "", "tool_calls": named, **rest}
        role = "assistant"
    return {"role": role, "content": content, **rest}


def one_turn(record: Record, user: Any, assistant: Any) -> Record:
    """A chat of one question and its answer, after the record's ``system`` where it has one."""
    rest = {k: v for k, v in record.items() if k not in ("system", "system_prompt", "history")}
    turns: list[dict[str, Any]] = []
    system = system_text(record.get("system")) or system_text(record.get("system_prompt"))
    if system:
        turns.append({"role": "system", "content": system})
    history = from_text(record.get("history"))
    for pair in history if isinstance(history, list) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [{"role": "user", "content": as_text(user)}, {"role": "assistant", "content": as_text(assistant)}]
    return {**rest, "messages": turns}


def trl_chat(record: Record) -> Record:
    if not isinstance(record, Mapping):
        return record
    prompt, completion = (from_text(record.get(k)) for k in ("prompt", "completion"))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(asked, list) or not isinstance(said, list):
        return record
    # A completion carries the loss, a prompt does not.
    context = [{**without_nulls(m), "weight": 0} if role_of(m) == "assistant" else m for m in asked]
    rest = {k: v for k, v in record.items() if k not in ("prompt", "completion")}
    return {**rest, "messages": [*context, *said]}


def gemini_chat(record: Record) -> Record:
    """Google's ``contents`` with ``parts``."""

    def turn(content: Any) -> Any:
        if not isinstance(content, Mapping) or not isinstance(content.get("parts"), list):
            return content
        texts = [p.get("text") for p in content["parts"] if isinstance(p, Mapping)]
        role = {"model": "assistant"}.get(content.get("role", ""), content.get("role", "user"))
        plain = [t for t in texts if isinstance(t, str)]
        if len(plain) == len(content["parts"]):
            return {"role": role, "content": "".join(plain)}
        return {"role": role, "content": content["parts"]}

    names = ("systemInstruction", "system_instruction")
    system = next((turn(record[k]) for k in names if isinstance(record.get(k), Mapping)), None)
    messages = [turn(c) for c in record["contents"]]
    if isinstance(system, Mapping):
        messages = [{**system, "role": "system"}, *messages]
    return {**{k: v for k, v in record.items() if k not in ("contents", *names)}, "messages": messages}


def system_text(value: Any) -> str:
    if isinstance(value, list):  # Bedrock: [{"text": ...}]
        value = "".join(str(p.get("text", "")) for p in value if isinstance(p, Mapping))
    return value if isinstance(value, str) else ""


def as_text(value: Any) -> Any:
    """A number or an object in a column of texts, as JSON."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return value


def from_text(value: Any) -> Any:
    """A list or object that stands as text in a table's cell, in JSON or as Python prints it; others as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return read if isinstance(read, list | dict) else value


def unfolded(rows: Sequence[tuple[int, Any]]) -> tuple[list[tuple[int, Any]], str]:
    """Rows with one chat each, and a sentence where some held several chats, or single messages.

    A list of messages is one chat; where the roles show several (system messages start them), it is as many.
    """
    lists = [record for _, record in rows if isinstance(record, list)]
    flat = [*lists[0]] if len(rows) == len(lists) == 1 else [record for _, record in rows]
    if len(flat) > 1 and all(_is_message(m) for m in flat):
        lines = [rows[0][0]] * len(flat) if lists else [line for line, _ in rows]
        starts = [i for i, m in enumerate(flat) if role_of(spoken(m)) == "system"]
        if len(starts) < 2 or starts[0] != 0:
            whole = "is one list of messages, and is read as one chat"
            return [(lines[0], flat)], f'{whole}; where it holds several, write {{"messages": [...]}} for each'
        chats = [(lines[a], flat[a:b]) for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
        said = f"is one list of messages, read as {len(chats):,} chats: each system message starts one"
        return [(line, {"messages": [spoken(m) for m in chat]}) for line, chat in chats], said
    result: list[tuple[int, Any]] = []
    column = ""
    for line, record in rows:
        key = next((k for k, v in record.items() if _is_chats(v)), None) if isinstance(record, Mapping) else None
        if key is None:
            result.append((line, record))
            continue
        column = str(key)
        rest = {k: v for k, v in record.items() if k != key}
        for number, chat in enumerate(record[key], start=1):
            identity = {"id": f"{record['id']}-{number}"} if record.get("id") is not None else {}
            result.append((line, {**rest, **identity, "messages": [spoken(m) for m in chat]}))
    return result, f"holds several chats in each record ({column}): each is an example of its own" * bool(column)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and str(value.get("role", value.get("from"))).lower() in SPEAKERS


def _is_chats(value: Any) -> bool:
    """Whether a value is a list of lists of messages."""
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(chat, list) and chat and all(_is_message(m) for m in chat) for chat in value)
    )
