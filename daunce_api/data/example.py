"""One example: a chat, a prompt with its completion, or a text; kept as the file gave it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LossOn = Literal["last", "all"]
Verdict = Literal["wanted", "unwanted"]
"""Whether an answer is one that the model should give."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where providers and open models keep the reasoning of an assistant turn."""

_IMAGE_TYPES = ("image_url", "image", "input_image")
_TAGS = re.compile(r"</?think(?:ing)?>")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat, as the file gave it.

    ``content`` is a text, a list of parts, or None. ``weight`` is OpenAI's and Together's: 0 takes an assistant turn
    out of the loss, None means not given. ``fields`` holds everything else (``name``, ``tool_calls``,
    ``tool_call_id``, ``reasoning_content``, ...) unchanged.

        >>> Message("assistant", "4").text
        '4'
    """

    role: str
    content: Any = None
    weight: Literal[0, 1] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.role, self.weight, canonical([self.content, dict(self.fields)])))

    def to_record(self) -> dict[str, Any]:
        """The message as JSON data."""
        record: dict[str, Any] = {"role": self.role}
        if self.content is not None:
            record["content"] = self.content
        record |= self.fields
        if self.weight is not None:
            record["weight"] = self.weight
        return record

    @property
    def texts(self) -> list[str]:
        """The texts of the content: one, or one a text part."""
        if isinstance(self.content, str):
            return [self.content]
        return [text for part in self.content or () if (text := part_text(part)) is not None]

    @property
    def images(self) -> list[Mapping[str, Any]]:
        """The image parts of the content."""
        return [] if isinstance(self.content, str) else [p for p in self.content or () if is_image(p)]

    @property
    def reasoning(self) -> str:
        """The reasoning of an assistant turn that is kept apart from its content; '' where there is none."""
        given = [self.fields.get(name) for name in REASONING_FIELDS]
        kept = [text for text in given if isinstance(text, str) and text]
        if not isinstance(self.content, str):
            kept += [p["thinking"] for p in self.content or () if isinstance(p, Mapping) and _is_thinking(p)]
        return kept[0] if kept else ""

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """The functions that the turn calls: ``{"name": ..., "arguments": ...}``, the legacy ``function_call`` too."""
        calls = [c["function"] for c in self.fields.get("tool_calls") or () if isinstance(c.get("function"), Mapping)]
        legacy = self.fields.get("function_call")
        return [*calls, legacy] if isinstance(legacy, Mapping) else calls

    @property
    def text(self) -> str:
        """The turn for a reader: reasoning, content and calls, each on a line of its own."""
        parts = [self.reasoning, "".join(self.texts), *("[image]" for _ in self.images)]
        parts += [f"{call.get('name')}({_shown(call.get('arguments'))})" for call in self.calls]
        return "\n".join(part for part in parts if part)

    def pieces(self) -> Iterator[tuple[str, str]]:
        """What has to stand in a rendering of the turn: kind (``content``, ``reasoning``, ``call``) and text.

        Content is split at ``<think>`` tags, which templates write in their own way.
        """
        if self.reasoning:
            yield "reasoning", self.reasoning
        for text in self.texts:
            parts = _TAGS.split(text) if self.role == "assistant" else [text]
            for part in parts[:-1]:
                yield "reasoning", part
            yield "content", parts[-1]
        for call in self.calls:
            yield "call", str(call.get("name"))
            yield from (("call", leaf) for leaf in _leaves(decoded_arguments(call.get("arguments"))))


@dataclass(frozen=True, slots=True)
class Example:
    """One training example or question: a chat, a prompt with its completion, or a text that is all completion.

    ``id`` is the user's own or a hash of the content; ``source`` is an optional label for group scores; ``line`` is
    where it was read (1-based), if it came from a file. ``fields`` holds what else a record of a chat says to a model
    (``tools``, ``parallel_tool_calls``, ...); ``text_only`` marks a record with a ``text`` (its ``completion`` here).

        >>> Example("q", messages=(Message("user", "2+2?"), Message("assistant", "4"))).completion_text()
        '4'
    """

    id: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    source: str | None = None
    line: int | None = field(default=None, compare=False)
    fields: Mapping[str, Any] = field(default_factory=dict)
    text_only: bool = False

    def __hash__(self) -> int:
        return hash((self.id, self.source, self._content_digest()))

    @property
    def is_chat(self) -> bool:
        """Whether this is a chat; otherwise it is a prompt with its completion, or a text."""
        return bool(self.messages)

    @property
    def tools(self) -> list[Any]:
        """The tools that the record defines, as chat templates take them (legacy ``functions`` too)."""
        if self.fields.get("tools"):
            return list(self.fields["tools"])
        return [{"type": "function", "function": f} for f in self.fields.get("functions") or ()]

    def trained_turns(self, loss_on: LossOn) -> tuple[int, ...]:
        """Indices of the messages whose tokens carry the loss: assistant turns with ``weight`` 1, and of those
        without one all, or the last assistant turn that has no ``weight`` 0."""
        assistant = [i for i, m in enumerate(self.messages) if m.role == "assistant" and m.weight != 0]
        if loss_on == "all":
            return tuple(assistant)
        return tuple(i for i in assistant if i == assistant[-1] or self.messages[i].weight == 1)

    def training_record(self, loss_on: LossOn) -> dict[str, Any]:
        """The record of a provider's training file: as it was given, with ``weight: 0`` on assistant turns that
        ``loss_on`` takes out of the loss."""
        if not self.is_chat:
            return self._plain_record()
        trained = self.trained_turns(loss_on)
        records = []
        for i, message in enumerate(self.messages):
            record = message.to_record()
            if loss_on == "last":
                record.pop("weight", None)
                if message.role == "assistant" and i not in trained:
                    record["weight"] = 0
            records.append(record)
        return {"messages": records, **self.fields}

    def to_record(self) -> dict[str, Any]:
        """The example as one line of a data set, from which the readers make an equal one."""
        record: dict[str, Any] = {"id": self.id}
        if self.source is not None:
            record["source"] = self.source
        if self.is_chat:
            record |= {"messages": [m.to_record() for m in self.messages], **self.fields}
        if not self.is_chat or self.prompt or self.completion:
            record |= self._plain_record()
        return record

    def _plain_record(self) -> dict[str, Any]:
        return {"text": self.completion} if self.text_only else {"prompt": self.prompt, "completion": self.completion}

    def _content_digest(self) -> str:
        body: Any
        if self.is_chat:
            body = [m.to_record() for m in self.messages]
            if self.fields:
                body = {"m": body, **self.fields}
        else:
            body = {"t": self.completion} if self.text_only else {"p": self.prompt, "c": self.completion}
        return hashlib.sha256(canonical(body).encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical content, without id and source."""
        return self._content_digest()[:16]

    def prompt_text(self) -> str:
        """What stands before the last answer that carries the loss, as plain text for display and for text-only
        baselines."""
        if not self.is_chat:
            return self.prompt
        return "\n".join(m.text for m in self.messages[: self.trained_turns("last")[-1]])

    def completion_text(self) -> str:
        """The (last) answer that carries the loss, as plain text; a tool call as ``name(arguments)``."""
        return self.messages[self.trained_turns("last")[-1]].text if self.is_chat else self.completion


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: equal data gives equal text."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def part_text(part: Any) -> str | None:
    """The text of a content part, or None where it is something else (an image, reasoning)."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) and part.get("type", "text").endswith("text") else None


def is_image(part: Any) -> bool:
    """Whether a content part is an image."""
    return isinstance(part, Mapping) and part.get("type") in _IMAGE_TYPES


def _is_thinking(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "thinking" and isinstance(part.get("thinking"), str)


def known_part(part: Any) -> bool:
    """Whether a content part is one that this package can keep: a text, an image, or reasoning."""
    return part_text(part) is not None or is_image(part) or (isinstance(part, Mapping) and _is_thinking(part))


def decoded_arguments(arguments: Any) -> Any:
    """The arguments of a call as an object, also where they are JSON text (some files encode them twice); what is no
    JSON object stays as it is."""
    value = arguments
    for _ in range(2):
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return arguments
    return value if isinstance(value, dict) else arguments


def _shown(arguments: Any) -> str:
    value = decoded_arguments(arguments)
    if isinstance(value, dict):
        return ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
    return "" if value is None else str(value)


def _leaves(value: Any) -> Iterator[str]:
    """Texts and numbers in JSON data, each as it would be written."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
