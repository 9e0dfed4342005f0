"""Files whose records hold several chats, or single messages, as rows with one chat each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .turns import SPEAKERS, role_of, spoken


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
