"""Examples and data sets: what is fine-tuned on and what is asked about.

A data set is read once, whole, and every problem in it is reported with its file and line in one pass. Nothing is
dropped: a record is either kept or named in the error. Chat records (``messages``) and prompt/completion records
are both accepted, from JSONL, pandas and Hugging Face ``datasets``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .errors import DataError

if TYPE_CHECKING:
    import pandas as pd

ROLES = ("system", "developer", "user", "assistant", "tool")
LossOn = Literal["last", "all"]

_KNOWN_FIELDS = frozenset({"id", "source", "messages", "prompt", "completion"})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. ``weight`` is OpenAI's: 0 takes an assistant turn out of the loss, None means not given."""

    role: str
    content: str
    weight: Literal[0, 1] | None = None

    def to_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.weight is not None:
            record["weight"] = self.weight
        return record


@dataclass(frozen=True, slots=True)
class Example:
    """One training or test example: a chat, or a prompt with its completion.

    ``id`` is the user's own or a hash of the content; ``source`` is an optional label for group scores; ``line`` is
    where it was read (1-based), if it came from a file.
    """

    id: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    source: str | None = None
    line: int | None = field(default=None, compare=False)

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    def trained_turns(self, loss_on: LossOn) -> tuple[int, ...]:
        """Indices of the messages whose tokens carry the loss; a given ``weight`` wins over ``loss_on``."""
        assistant = [i for i, m in enumerate(self.messages) if m.role == "assistant"]
        chosen = assistant if loss_on == "all" else assistant[-1:]
        return tuple(
            i for i in assistant if self.messages[i].weight == 1 or (self.messages[i].weight is None and i in chosen)
        )

    def training_record(self, loss_on: LossOn) -> dict[str, Any]:
        """The record of a provider's training file; turns without loss get ``weight: 0``, so that what is trained
        on is what is measured."""
        if not self.is_chat:
            return {"prompt": self.prompt, "completion": self.completion}
        trained = self.trained_turns(loss_on)
        records = []
        for i, message in enumerate(self.messages):
            record: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.role == "assistant" and i not in trained:
                record["weight"] = 0
            records.append(record)
        return {"messages": records}

    def to_record(self) -> dict[str, Any]:
        """The record that :meth:`Dataset.from_records` reads back as this example."""
        record: dict[str, Any] = {"id": self.id}
        if self.source is not None:
            record["source"] = self.source
        if self.is_chat:
            return record | {"messages": [m.to_record() for m in self.messages]}
        return record | {"prompt": self.prompt, "completion": self.completion}

    @property
    def content_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical content, without id and source."""
        body: Any = [m.to_record() for m in self.messages] if self.is_chat else {"p": self.prompt, "c": self.completion}
        canonical = json.dumps(body, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def prompt_text(self) -> str:
        """What stands before the last answer, as plain text for display and for text-only baselines."""
        if not self.is_chat:
            return self.prompt
        last = max(i for i, m in enumerate(self.messages) if m.role == "assistant")
        return "\n".join(m.content for m in self.messages[:last])

    def completion_text(self) -> str:
        """The (last) answer as plain text."""
        if not self.is_chat:
            return self.completion
        return next(m.content for m in reversed(self.messages) if m.role == "assistant")


class Dataset(Sequence[Example]):
    """An immutable sequence of examples with unique ids.

    ``name`` is used in messages, ``warnings`` lists what was noticed and kept (duplicates, unknown fields).
    """

    def __init__(self, examples: Iterable[Example], *, name: str = "data", warnings: Sequence[str] = ()) -> None:
        """Raises DataError where two examples share an id or there is none at all."""
        self._examples = tuple(examples)
        self.name = name
        self.warnings = tuple(warnings)
        self._index: dict[str, int] = {}
        problems = []
        for position, example in enumerate(self._examples):
            first = self._index.setdefault(example.id, position)
            if first != position:
                where = _where(name, example.line or position + 1)
                problems.append(f"{where}: id {example.id!r} is also used by {_where(name, self._line(first))}")
        if not self._examples:
            problems.append(f"{name}: there are no examples")
        if problems:
            raise DataError(f"{name} cannot be used; nothing was changed.", problems)

    def _line(self, position: int) -> int:
        return self._examples[position].line or position + 1

    def where(self, position: int) -> str:
        """``file:line`` of an example, for messages."""
        return _where(self.name, self._line(position))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self._examples[index]

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} examples)"

    @property
    def ids(self) -> list[str]:
        return [e.id for e in self._examples]

    @property
    def sources(self) -> list[str | None]:
        return [e.source for e in self._examples]

    def position(self, example_id: str) -> int:
        """Index of an id. Raises DataError that names close matches."""
        if example_id not in self._index:
            from difflib import get_close_matches

            close = get_close_matches(example_id, self._index, n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else f" The first one is {self._examples[0].id!r}."
            raise DataError(f"{self.name} has no example {example_id!r}.{hint}")
        return self._index[example_id]

    @property
    def digest(self) -> str:
        """SHA-256 over ids, contents and sources in order: two data sets with one digest give the same run."""
        h = hashlib.sha256()
        for e in self._examples:
            h.update(json.dumps([e.id, e.content_hash, e.source], ensure_ascii=True).encode())
        return h.hexdigest()

    def training_file(self, positions: Iterable[int], loss_on: LossOn) -> bytes:
        """The JSONL file of a subset, in data-set order: the same subset always gives the same bytes."""
        lines = [
            json.dumps(self._examples[i].training_record(loss_on), ensure_ascii=False, separators=(",", ":"))
            for i in positions
        ]
        return ("\n".join(lines) + "\n").encode()

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Dataset:
        """Read a JSONL file in UTF-8, one record a line; blank lines are skipped.

        Raises DataError that lists every problem of the file with its line.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. Check the path in the config.") from error
        records: list[tuple[int, Any]] = []
        problems: list[str] = []
        for number, line in enumerate(raw.split(b"\n"), start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                records.append((number, json.loads(text.decode("utf-8"))))
            except UnicodeDecodeError as error:
                problems.append(f"{_where(path.name, number)}: not UTF-8 (byte {error.start} of the line)")
            except json.JSONDecodeError as error:
                problems.append(f"{_where(path.name, number)}: not JSON: {error.msg} (column {error.colno})")
            except (RecursionError, ValueError):
                problems.append(f"{_where(path.name, number)}: JSON that is nested too deeply or has a number too long")
        return cls._from_records(records, name=path.name, problems=problems)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], *, name: str = "data") -> Dataset:
        """From dictionaries shaped like the lines of a JSONL file."""
        return cls._from_records(list(enumerate(records, start=1)), name=name, problems=[])

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame, *, name: str = "DataFrame") -> Dataset:
        """From a DataFrame with columns ``messages`` or ``prompt`` and ``completion``, and optional ``id``, ``source``.

        Missing values (None, NaN) in ``id`` and ``source`` count as not given.
        """
        known = [c for c in frame.columns if c in _KNOWN_FIELDS]
        rows: list[dict[str, Any]] = []
        for row in frame[known].to_dict("records"):
            clean = {str(k): v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()}
            rows.append({k: v for k, v in clean.items() if not (v is None or (isinstance(v, float) and math.isnan(v)))})
        return cls.from_records(rows, name=name)

    @classmethod
    def from_huggingface(cls, dataset: Iterable[Mapping[str, Any]], *, name: str = "dataset") -> Dataset:
        """From a Hugging Face ``datasets.Dataset`` (any iterable of rows) with the columns of :meth:`from_pandas`."""
        rows = ({k: v for k, v in row.items() if k in _KNOWN_FIELDS and v is not None} for row in dataset)
        return cls.from_records(rows, name=name)

    @classmethod
    def _from_records(cls, records: list[tuple[int, Any]], *, name: str, problems: list[str]) -> Dataset:
        examples: list[Example] = []
        warnings: list[str] = []
        seen: dict[str, int] = {}
        unknown: dict[str, int] = {}
        given = {r["id"] for _, r in records if isinstance(r, dict) and isinstance(r.get("id"), str)}
        for line, record in records:
            found = _problems_of(record)
            if found:
                problems += [f"{_where(name, line)}: {problem}" for problem in found]
                continue
            for key in record.keys() - _KNOWN_FIELDS:
                unknown.setdefault(key, line)
            example = _build(record, line)
            content = example.content_hash
            if content in seen:
                warnings.append(f"{_where(name, line)}: same content as {_where(name, seen[content])}; both are kept")
            seen.setdefault(content, line)
            if not example.id:
                identity, copy = content, 1
                while identity in given:
                    copy += 1
                    identity = f"{content}-{copy}"
                given.add(identity)
                example = _build({**record, "id": identity}, line)
            examples.append(example)
        warnings += [f"{_where(name, n)}: field {k!r} is not used" for k, n in sorted(unknown.items())]
        if problems:
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
            raise DataError(f"{name} has {count}; nothing was sent or changed. Mend these lines:", problems)
        return cls(examples, name=name, warnings=warnings)


def _where(name: str, line: int) -> str:
    return f"{name}:{line}"


def _build(record: Mapping[str, Any], line: int) -> Example:
    messages = tuple(Message(m["role"], m.get("content", ""), m.get("weight")) for m in record.get("messages", ()))
    return Example(
        id=str(record.get("id", "")),
        messages=messages,
        prompt=record.get("prompt", ""),
        completion=record.get("completion", ""),
        source=record.get("source"),
        line=line,
    )


def _problems_of(record: Any) -> list[str]:
    """Everything that is wrong with one record, as phrases without the place."""
    if not isinstance(record, Mapping):
        return [f"a record must be a JSON object, not {type(record).__name__}"]
    problems = []
    identity = record.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int) or identity == ""):
        problems.append("id must be a non-empty text or a whole number")
    problems += _text_problems("id", identity if isinstance(identity, str) else "")
    source = record.get("source")
    if source is not None and not isinstance(source, str):
        problems.append("source must be a text")
    problems += _text_problems("source", source)
    if "messages" in record:
        if "prompt" in record or "completion" in record:
            problems.append("has both messages and prompt/completion; keep one of them")
        return problems + _message_problems(record["messages"])
    if "prompt" not in record and "completion" not in record:
        return [*problems, "needs either messages, or prompt and completion"]
    for key in ("prompt", "completion"):
        value = record.get(key)
        if not isinstance(value, str):
            problems.append(f"{key} is missing" if value is None else f"{key} must be a text")
        problems += _text_problems(key, value)
    if record.get("completion") == "":
        problems.append("completion is empty: there is no token to learn or to measure")
    return problems


def _message_problems(messages: Any) -> list[str]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return ["messages must be a non-empty list"]
    problems = []
    answers = 0
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, Mapping):
            problems.append(f"{place} must be an object with role and content")
            continue
        role, content, weight = message.get("role"), message.get("content"), message.get("weight")
        if role is None:
            problems.append(f"{place}.role is missing")
        elif role not in ROLES:
            problems.append(f"{place}.role is {role!r}; it must be one of {', '.join(ROLES)}")
        if message.get("tool_calls") or message.get("function_call"):
            problems.append(f"{place} calls a tool; only text turns can be attributed")
        elif not isinstance(content, str):
            problems.append(f"{place}.content {'is missing' if content is None else 'must be a text'}")
        elif role == "assistant" and content == "":
            problems.append(f"{place}.content is empty: there is no token to learn or to measure")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            problems.append(f"{place}.weight must be 0 or 1")
        if weight is not None and role != "assistant":
            problems.append(f"{place}.weight belongs on assistant turns only")
        problems += _text_problems(f"{place}.content", content)
        answers += role == "assistant" and weight != 0
    if not answers:
        problems.append("no assistant turn carries the loss (none is there, or all have weight 0)")
    elif isinstance(messages[-1], Mapping) and messages[-1].get("role") != "assistant":
        problems.append("the last message must be the assistant's")
    return problems


def _text_problems(place: str, text: Any) -> list[str]:
    if not isinstance(text, str):
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return [f"{place} holds half of a surrogate pair at character {error.start}, which UTF-8 cannot carry"]
    return []
