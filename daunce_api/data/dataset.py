"""Examples and data sets: what is fine-tuned on and what is asked about.

A data set is read once, whole, and every problem in it is reported with its file and line in one pass. Nothing is
dropped: a record is either kept or named in the error. Chat records (``messages``) and prompt/completion records
are both accepted, from JSONL, pandas and Hugging Face ``datasets``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .._util.files import replacing
from ..errors import DataError
from .records import RECORD_FIELDS, ROLES, parse_lines, record_of_row, record_problems, unknown_fields

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ROLES", "Dataset", "Example", "LossOn", "Message"]

LossOn = Literal["last", "all"]

# JSON leaves these as they are, but readers that split text into lines break at them.
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. ``weight`` is OpenAI's: 0 takes an assistant turn out of the loss, None means not given."""

    role: str
    content: str
    weight: Literal[0, 1] | None = None

    def to_record(self) -> dict[str, Any]:
        """The message as JSON data."""
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
        """Whether this is a chat; otherwise it is a prompt with its completion."""
        return bool(self.messages)

    def trained_turns(self, loss_on: LossOn) -> tuple[int, ...]:
        """Indices of the messages whose tokens carry the loss: assistant turns with ``weight`` 1, and of those
        without one all, or the last assistant turn that has no ``weight`` 0."""
        assistant = [i for i, m in enumerate(self.messages) if m.role == "assistant" and m.weight != 0]
        if loss_on == "all":
            return tuple(assistant)
        return tuple(i for i in assistant if i == assistant[-1] or self.messages[i].weight == 1)

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
        """The example as one line of a data set, from which the readers make an equal one."""
        record: dict[str, Any] = {"id": self.id}
        if self.source is not None:
            record["source"] = self.source
        if self.is_chat:
            record["messages"] = [m.to_record() for m in self.messages]
        if not self.is_chat or self.prompt or self.completion:
            record |= {"prompt": self.prompt, "completion": self.completion}
        return record

    def _content_digest(self) -> str:
        body: Any = [m.to_record() for m in self.messages] if self.is_chat else {"p": self.prompt, "c": self.completion}
        canonical = json.dumps(body, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical content, without id and source."""
        return self._content_digest()[:16]

    def prompt_text(self) -> str:
        """What stands before the last answer that carries the loss, as plain text for display and for text-only
        baselines."""
        if not self.is_chat:
            return self.prompt
        return "\n".join(m.content for m in self.messages[: self.trained_turns("last")[-1]])

    def completion_text(self) -> str:
        """The (last) answer that carries the loss, as plain text."""
        return self.messages[self.trained_turns("last")[-1]].content if self.is_chat else self.completion


class Dataset(Sequence[Example]):
    """An immutable sequence of examples with unique ids.

    ``name`` is used in messages, ``warnings`` lists what was noticed and kept (duplicates, unknown fields).
    """

    def __init__(self, examples: Iterable[Example], *, name: str = "data", warnings: Sequence[str] = ()) -> None:
        """Raises DataError that lists every problem: two examples with one id, content that cannot be trained on or
        measured, no examples at all."""
        self._examples = tuple(examples)
        self.name = name
        self.warnings = tuple(warnings)
        self._index: dict[str, int] = {}
        problems = []
        for position, example in enumerate(self._examples):
            found = record_problems(example.to_record())
            first = self._index.setdefault(example.id, position)
            if first != position:
                found.append(f"id {example.id!r} is also used by {self.where(first)}")
            problems += [f"{self.where(position)}: {problem}" for problem in found]
        if not self._examples:
            problems.append(f"{name}: there are no examples")
        if problems:
            raise _error(name, problems)

    def where(self, position: int) -> str:
        """``file:line`` of an example, for messages."""
        return f"{self.name}:{self._examples[position].line or position + 1}"

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
        """Ids in data-set order."""
        return [e.id for e in self._examples]

    @property
    def sources(self) -> list[str | None]:
        """Sources in data-set order."""
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
            h.update(json.dumps([e.id, e._content_digest(), e.source], ensure_ascii=True).encode())
        return h.hexdigest()

    def training_file(self, positions: Iterable[int], loss_on: LossOn) -> bytes:
        """The JSONL file (UTF-8) of a subset, in the order of ``positions``: the same ones always give the same
        bytes."""
        lines = [
            json.dumps(self._examples[i].training_record(loss_on), ensure_ascii=False, separators=(",", ":"))
            for i in positions
        ]
        return ("\n".join(lines) + "\n").translate(_LINE_BREAKS).encode()

    def to_jsonl(self, path: str | Path) -> None:
        """Write the examples, ids and sources included, so that :meth:`from_jsonl` gives a data set of the same
        digest. What is there is replaced once the new file is whole. Raises StoreError where that fails."""
        lines = (json.dumps(e.to_record(), ensure_ascii=False, separators=(",", ":")) + "\n" for e in self)
        with replacing(Path(path)) as part:
            part.write_text("".join(lines), encoding="utf-8")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Dataset:
        """Read a JSONL file in UTF-8, one record a line; blank lines are skipped.

        Raises DataError that lists every problem of the file with its line.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} cannot be read: {reason}. Check the path in the config.") from error
        records, problems = parse_lines(raw)
        return cls._from_records(records, name=path.name, problems=problems)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], *, name: str = "data") -> Dataset:
        """From dictionaries shaped like the lines of a JSONL file. Raises DataError as :meth:`from_jsonl` does."""
        return cls._from_records(list(enumerate(records, start=1)), name=name)

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame, *, name: str = "DataFrame") -> Dataset:
        """From a DataFrame with columns ``messages`` or ``prompt`` and ``completion``, and optional ``id``, ``source``.

        Missing values (None, NaN, NA) count as not given; whole numbers that pandas turned into floats because ids
        were missing are read as whole numbers. Problems are numbered by row, from 1. Raises DataError as
        :meth:`from_jsonl` does.
        """
        known = [c for c in frame.columns if c in RECORD_FIELDS]
        repeated = sorted({c for c in known if known.count(c) > 1})
        if repeated:
            raise DataError(f"{name} has more than one column {', '.join(repeated)}; rename all but one.")
        rows = [record_of_row(row) for row in frame[known].to_dict("records")]
        return cls._from_records(
            list(enumerate(rows, start=1)), name=name, warnings=_unused_columns(name, frame.columns)
        )

    @classmethod
    def from_huggingface(cls, dataset: Iterable[Mapping[str, Any]], *, name: str = "dataset") -> Dataset:
        """From a Hugging Face ``datasets.Dataset`` (any iterable of rows) with the columns of :meth:`from_pandas`.

        ``messages`` may be a list of structs or a struct of lists. Raises DataError as :meth:`from_jsonl` does, and
        for a ``DatasetDict``.
        """
        if isinstance(dataset, Mapping):
            splits = ", ".join(map(str, dataset))
            raise DataError(f"{name} is a dictionary of splits ({splits}); pass one of them.")
        columns = getattr(dataset, "column_names", None) or ()
        if columns and hasattr(dataset, "select_columns"):
            dataset = dataset.select_columns([c for c in columns if c in RECORD_FIELDS])
        rows = [record_of_row(row) if isinstance(row, Mapping) else row for row in dataset]
        return cls._from_records(list(enumerate(rows, start=1)), name=name, warnings=_unused_columns(name, columns))

    @classmethod
    def _from_records(
        cls,
        records: list[tuple[int, Any]],
        *,
        name: str,
        problems: Iterable[tuple[int, str]] = (),
        warnings: Iterable[str] = (),
    ) -> Dataset:
        found = list(problems)
        notes = list(warnings)
        contents: dict[str, int] = {}
        unknown: dict[str, int] = {}
        taken: dict[str, int] = {}
        kept: list[tuple[int, Mapping[str, Any]]] = []
        for line, record in records:
            problems_here = record_problems(record)
            found += [(line, problem) for problem in problems_here]
            if problems_here:
                continue
            kept.append((line, record))
            if record.get("id") is not None:
                first = taken.setdefault(str(record["id"]), line)
                if first != line:
                    found.append((line, f"id {str(record['id'])!r} is also used by {name}:{first}"))
        if found:
            raise _error(name, [f"{name}:{line}: {problem}" for line, problem in sorted(found, key=lambda p: p[0])])
        examples: list[Example] = []
        for line, record in kept:
            for key in unknown_fields(record):
                unknown.setdefault(key, line)
            example = _build(record, "" if record.get("id") is None else str(record["id"]), line)
            content = example.content_hash
            first = contents.setdefault(content, line)
            if first != line:
                notes.append(f"{name}:{line}: same content as {name}:{first}; both are kept")
            if not example.id:
                identity, copy = content, 1
                while identity in taken:
                    copy += 1
                    identity = f"{content}-{copy}"
                taken[identity] = line
                example = _build(record, identity, line)
            examples.append(example)
        notes += [f"{name}:{line}: field {key!r} is not used" for key, line in sorted(unknown.items())]
        return cls(examples, name=name, warnings=notes)


def _error(name: str, problems: Sequence[str]) -> DataError:
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return DataError(f"{name} has {count}; nothing was sent or changed. Mend these places:", problems)


def _build(record: Mapping[str, Any], identity: str, line: int) -> Example:
    messages = tuple(
        Message(m["role"], m["content"], None if m.get("weight") is None else (1 if m["weight"] else 0))
        for m in record.get("messages", ())
    )
    return Example(
        id=identity,
        messages=messages,
        prompt=record.get("prompt", ""),
        completion=record.get("completion", ""),
        source=record.get("source"),
        line=line,
    )


def _unused_columns(name: str, columns: Iterable[Any]) -> list[str]:
    return [f"{name}: column {str(c)!r} is not used" for c in columns if c not in RECORD_FIELDS]
