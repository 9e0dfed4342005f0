"""A chat as text: where its answers stand in it, and what of it a template leaves out.

Most templates write a conversation so that what stands before an answer is the beginning of the whole, and the answer
is what comes next. Many of today's do not: they strip the reasoning of earlier turns, end only the last turn, move the
system prompt, or write something into the generation prompt. There, a mark is put where the answer stands and the chat
is rendered again; what stands before the mark and after it in both renderings is not the answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import ConfigurationError, DataError
from .example import Example, Message
from .literal import MARK as GUARD

Span = tuple[int, int]
"""A half-open range of character positions."""

_TOKEN = re.compile(r"[<\[][^<>\[\]\s]+[>\]]")
"""How templates spell special tokens."""
_MARK = "\ufdd1mark\ufdd1"
"""Stands for an answer; Unicode noncharacters, which no text should hold."""


class Renderer(Protocol):
    """The part of a tokenizer that is needed here."""

    name: str

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text. ``spans``: the characters of every turn that carries the loss; ``marked``: whether a mark was
    needed to find one; ``left_out``: what the template does not write of the context, such as ``the developer
    message``."""

    text: str
    spans: tuple[Span, ...]
    marked: bool
    left_out: tuple[str, ...]


def render(tokenizer: Renderer, example: Example, messages: Sequence[Message] | None = None, **how: Any) -> str:
    """The example's chat (or another one with its tools) as text."""
    tools = example.tools
    options = dict(example.fields.get("chat_template_kwargs") or {})
    options |= {k: example.fields[k] for k in ("documents", "reasoning_effort") if k in example.fields}
    if tools:
        how["tools"] = tools
    if options:
        how["options"] = options
    return tokenizer.render(example.messages if messages is None else messages, **how)


def _tried(tokenizer: Renderer, example: Example, messages: Sequence[Message] | None = None, **how: Any) -> str | None:
    """:func:`render`; None where the template refuses the messages."""
    try:
        return render(tokenizer, example, messages, **how)
    except (DataError, ConfigurationError):
        return None


def rendered_chat(example: Example, tokenizer: Renderer, turns: Sequence[int]) -> Rendered:
    """The rendered chat with the spans of ``turns``.

    Raises DataError where the template refuses the messages, where a turn cannot be found, or where the template
    leaves out a part of an answer.
    """
    try:
        if any(m.images for m in example.messages) and not getattr(tokenizer, "keeps_images", False):
            raise DataError(
                "holds an image, and its tokens are known to the model's own processor only. Score it through a "
                "one-token chat endpoint (OpenAI, Azure), or leave it out."
            )
        whole = render(tokenizer, example)
        left_out = _left_out(example, tokenizer, whole, turns)
        spans, marked = [], False
        for turn in turns:
            span = _by_prefix(example, tokenizer, whole, turn)
            if span is None:
                span, marked = _by_mark(example, tokenizer, whole, turn), True
            spans.append(span)
    except DataError as error:
        raise DataError(f"example {example.id!r}: {error}") from error
    return Rendered(whole, tuple(spans), marked, left_out)


def _by_prefix(example: Example, tokenizer: Renderer, whole: str, turn: int) -> Span | None:
    """The turn as what a conversation is longer by when it is added; None where earlier text changes with it."""
    messages = example.messages
    before = _tried(tokenizer, example, messages[:turn], generation_prompt=True)
    through = whole if turn + 1 == len(messages) else _tried(tokenizer, example, messages[: turn + 1])
    if before is None or through is None or not (whole.startswith(through) and through.startswith(before)):
        return None
    return len(before), len(through)


def _by_mark(example: Example, tokenizer: Renderer, whole: str, turn: int) -> Span:
    """The turn as what two renderings of the chat do not share, one with a mark in place of the answer."""
    if _MARK in whole:
        raise DataError("it holds a character that is reserved for marks (U+FDD1). Remove it.")
    start, stop = _start(example, tokenizer, whole, turn), _stop(example, tokenizer, whole, turn)
    pieces = [p.strip() for kind, p in example.messages[turn].pieces() if kind == "content" and p.strip()]
    if start is None or stop is None or start >= stop or not all(_stands(p, whole[start:stop]) for p in pieces):
        raise DataError(
            f"the answer of messages[{turn}] cannot be found in what the chat template of {tokenizer.name} writes: it "
            "writes the chat in another way when the answer changes. Use prompt/completion records."
        )
    return start, stop


def _start(example: Example, tokenizer: Renderer, whole: str, turn: int) -> int | None:
    messages = example.messages
    before = _tried(tokenizer, example, messages[:turn], generation_prompt=True)
    if before and whole.startswith(before):
        return len(before)
    plain = Message("assistant", _MARK)
    for later in (messages[turn + 1 :], ()):
        marked = _tried(tokenizer, example, [*messages[:turn], plain, *later]) or ""
        position = marked.find(_MARK)
        if position < 0:
            continue
        shared = _shared(whole, marked[:position])
        # What the two do not share before the answer may only be how it begins (white space, a token for calls).
        if not any(_stands(p, marked[shared:position]) for m in messages[:turn] for _, p in m.pieces() if p.strip()):
            return shared
    return None


def _stop(example: Example, tokenizer: Renderer, whole: str, turn: int) -> int | None:
    messages = example.messages
    if turn + 1 == len(messages):
        return len(whole)
    answer = _with_mark(messages[turn])
    after = (_tried(tokenizer, example, [*messages[:turn], answer, *messages[turn + 1 :]]) or "").rpartition(_MARK)
    if not after[1]:
        return None
    last = (_tried(tokenizer, example, [*messages[:turn], answer]) or "").rpartition(_MARK)[2]
    ended = _shared(after[2], last)
    for token in _TOKEN.finditer(after[2]):
        if token.start() < ended < token.end():  # two tokens share their first characters
            # At once: another token ends the last turn than earlier ones. Later: the next message begins with it.
            ended = token.start() if after[2][: token.start()].strip() else token.end()
    following = after[2][ended:]  # without what ends the turn
    return len(whole) - len(following) if whole.endswith(following) else None


def _with_mark(message: Message) -> Message:
    """The turn with a mark in place of its last text; calls keep their names and ids, which templates look up."""
    if not message.calls:
        return replace(message, content=_MARK)
    fields = dict(message.fields)
    arguments = {_MARK: _MARK}
    if "tool_calls" in fields:
        fields["tool_calls"] = [
            {**c, "function": {**c["function"], "arguments": arguments}} for c in fields["tool_calls"]
        ]
    if "function_call" in fields:
        fields["function_call"] = {**fields["function_call"], "arguments": arguments}
    return replace(message, fields=fields)


def _shared(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# -- what a template leaves out ------------------------------------------------------------------------------------


def _left_out(example: Example, tokenizer: Renderer, whole: str, turns: Sequence[int]) -> tuple[str, ...]:
    text = whole.replace(GUARD, "")
    missing = {*_missing(example, text), *_never_written(example, tokenizer)}
    last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=-1)
    said: dict[str, None] = {}
    for i, kind in sorted(missing):
        role = example.messages[i].role
        what = {"reasoning": "the reasoning", "call": "the tool call"}.get(kind, "the text")
        if i in turns and not (kind == "reasoning" and i != last):
            raise DataError(
                f"the chat template of {tokenizer.name} leaves out {what} of messages[{i}], an answer that is measured."
                " Use a template that writes it, or leave the example out."
            )
        said[f"{what} of earlier answers" if role == "assistant" else f"the {role} message"] = None
    if example.tools and not _writes_tools(example, tokenizer, text):
        said["the tools"] = None
    return tuple(said)


def _missing(example: Example, text: str) -> set[tuple[int, str]]:
    """Message and kind of what does not stand in the text, as often as it is said."""
    places: dict[str, list[tuple[int, str]]] = {}
    for i, message in enumerate(example.messages):
        for kind, piece in message.pieces():
            if plain := piece.replace(GUARD, "").strip():
                places.setdefault(plain, []).append((i, kind))
    missing: set[tuple[int, str]] = set()
    for piece, said in places.items():
        # A template may write it more often, and another text may hold it: too many say nothing.
        found = max(text.count(spelling) for spelling in _spellings(piece)) if piece else len(said)
        missing.update(said[: max(len(said) - found, 0)])
    return missing


def _stands(piece: str, text: str) -> bool:
    plain, text = piece.replace(GUARD, "").strip(), text.replace(GUARD, "")
    return any(spelling in text for spelling in _spellings(plain))


def _spellings(piece: str) -> tuple[str, ...]:
    """A text as it is, and inside a JSON text."""
    return (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])


def _writes_tools(example: Example, tokenizer: Renderer, text: str) -> bool:
    """Whether the template writes the tools that a record defines. Their names alone may stand in calls."""
    names = [str((t.get("function") or t).get("name")) for t in example.tools if isinstance(t, dict)]
    cache: dict[Any, Any] | None = getattr(tokenizer, "shapes", None)
    if cache is None or any(name not in text for name in names):
        return all(name in text for name in names)
    if "tools" not in cache:
        marked = {"type": "function", "function": {"name": _MARK, "description": _MARK, "parameters": {}}}
        chat = Example("", messages=(Message("user", "a"), Message("assistant", "b")), fields={"tools": [marked]})
        shown = _tried(tokenizer, chat)
        cache["tools"] = shown is None or _MARK in shown
    return bool(cache["tools"])


def _never_written(example: Example, tokenizer: Renderer) -> set[tuple[int, str]]:
    """Messages whose content the template never writes, whatever it is: short contents may stand in the text by
    chance. Found once for chats of the same shape."""
    cache: dict[Any, set[tuple[int, str]]] | None = getattr(tokenizer, "shapes", None)
    if cache is None:
        return set()
    shape = (
        tuple((m.role, bool(m.texts), bool(m.reasoning), len(m.calls)) for m in example.messages),
        not example.tools,
    )
    if shape not in cache:
        marks = [
            replace(m, content=f"{_MARK}{i};") if m.texts and not m.images else m
            for i, m in enumerate(example.messages)
        ]
        text = _tried(tokenizer, example, marks) or ""
        gone = Counter(i for i, m in enumerate(marks) if m.content == f"{_MARK}{i};" and f"{_MARK}{i};" not in text)
        cache[shape] = {(i, "content") for i in gone} if text else set()
    return cache[shape]
