"""Chats for endpoints whose chat template nobody outside knows: ids that name the content, not the model's input.

A chat-only endpoint is sent the messages themselves. Token ids are still needed to tell examples apart, to count,
and to know how many tokens a completion has; they are those of the contents, with a reserved id between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..data.dataset import Message
from ..data.example import canonical, part_text
from ..data.tokenizers import SpellingTokenizer, Tokenizer
from ..errors import DataError

_TURN, _CONTENT = "\ud8f0", "\ud8f1"
"""Halves of surrogate pairs: no text that UTF-8 can carry holds them."""
_UNREADABLE = "\ufffd"
_CALLS = ("tool_calls", "function_call")
_IDS = {_TURN: -1, _CONTENT: -2}


class HiddenTemplateTokenizer:
    """Encodes contents with ``inner`` and marks turns with ids that no vocabulary has.

    Nothing ends an assistant turn, so that a completion of one token has one target. The ids must never be sent.
    """

    keeps_images = True
    begin = end = ""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.name = f"{inner.name} (contents only)"

    @property
    def fingerprint(self) -> str:
        return f"contents:{self._inner.fingerprint}"

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets; raises DataError where the answer begins with a token whose bytes cannot be known, which no
        list of likely tokens could be compared with."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        answer: int | None = None
        role = mark = ""
        for start, stop in _parts(text):
            if mark == _TURN:
                role = text[start:stop]
            elif mark == _CONTENT and role.startswith("assistant"):
                answer = len(ids)
            mark = text[start]
            if mark in _IDS:
                ids.append(_IDS[mark])
                offsets.append((start, stop))
                continue
            inner_ids, inner_offsets = self._inner.encode_with_offsets(text[start:stop])
            ids += inner_ids
            offsets += [(start + a, start + b) for a, b in inner_offsets]
        if answer is not None and self.bytes_of(ids[answer]) is None:
            raise DataError(
                "the first token of the answer is a part of a character (of an emoji?), and this tokenizer does not "
                "tell its bytes, so it could not be found in a list of likely tokens. Set backend.tokenizer to the "
                "OpenAI model's own encoding (o200k_base, ...), use an endpoint with echo, or leave the example out."
            )
        return ids, offsets

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return ["" if i < 0 else self._inner.pieces([i])[0] for i in ids]

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a token; None where it is a part of a character and the inner tokenizer does not tell them."""
        if token < 0:
            return b""
        if isinstance(self._inner, SpellingTokenizer):
            return self._inner.spell([token])[0]
        piece = self._inner.pieces([token])[0]
        return None if _UNREADABLE in piece else piece.encode()

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Roles and contents between marks; what is no text (tools, calls, names) as JSON, an image as its digest.
        Raises DataError where a content holds half of a surrogate pair."""
        said = [(m.role + _fields(m), _content(m)) for m in messages]
        if tools or options:
            said.insert(0, ("tools", canonical([list(tools), dict(options or {})])))
        if any(mark in content for _, content in said for mark in _IDS):
            raise DataError("a text holds half of a surrogate pair, which UTF-8 cannot carry. Remove it.")
        text = "".join(f"{_TURN}{role}{_CONTENT}{content}" for role, content in said)
        return f"{text}{_TURN}assistant{_CONTENT}" if generation_prompt else text


def _content(message: Message) -> str:
    """What is measured of an answer: its text, then its calls."""
    parts = [message.content] if isinstance(message.content, str) else list(message.content or ())
    texts = [t if (t := part_text(p)) is not None else f"[image {_digest(p)}]" for p in parts]
    calls = {k: message.fields[k] for k in _CALLS if message.fields.get(k)}
    return "".join(texts) + (canonical(calls) if calls else "")


def _fields(message: Message) -> str:
    fields = {k: v for k, v in message.fields.items() if k != "content" and k not in _CALLS}
    return canonical(fields) if fields else ""


def _digest(part: Any) -> str:
    return hashlib.sha256(canonical(part).encode()).hexdigest()


def _parts(text: str) -> Iterator[tuple[int, int]]:
    marks = [i for i, character in enumerate(text) if character in _IDS]
    edges = sorted({0, len(text), *marks, *(i + 1 for i in marks)})
    return ((a, b) for a, b in pairwise(edges) if a < b)
