"""Examples and data sets: what is fine-tuned on and what is asked about.

A data set is read once, whole, and every problem in it is reported with its file and line in one pass. Nothing is
dropped: a record is either kept or named in the error. Chat records (``messages``) and prompt/completion records
are both accepted, from JSONL, pandas and Hugging Face ``datasets``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.files import write
from .._util.lazy import LazySequence
from ..errors import DataError
from .dialects import CHAT, Dialect, converted, recognise
from .example import Example, LossOn, Message, Verdict
from .files import Rows, numbered, parse_lines, read_bytes, read_rows
from .records import CHAT_FIELDS, ROLES, record_problems, text_only, unknown_fields
from .turns import unfolded

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ROLES", "Dataset", "Example", "LossOn", "Message", "message_of"]

# JSON leaves these as they are, but readers that split text into lines break at them.
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}

_COLUMN = re.compile(r" \((?:column|byte) [^)]*\)| at character \d+")
_NAMED = 5
"""Places that a problem or note names before it only counts."""


class Dataset(LazySequence[Example]):
    """An immutable sequence of examples with unique ids.

    ``name`` is used in messages, ``warnings`` lists what was noticed and kept (duplicates, unknown fields), and
    ``dialect`` names how the file was written. ``verdicts`` says of ids whether their answers are wanted or unwanted,
    where the file does (field ``verdict``).

        >>> data = Dataset.from_records([{"prompt": "2+2=", "completion": "4"}])
        >>> len(data), data[0].completion
        (1, '4')
    """

    def __init__(
        self,
        examples: Iterable[Example],
        *,
        name: str = "data",
        warnings: Sequence[str] = (),
        dialect: str = "chat",
        verdicts: Mapping[str, Verdict] | None = None,
    ) -> None:
        """Raises DataError that lists every problem: two examples with one id, content that cannot be trained on or
        measured, no examples at all."""
        self._examples = tuple(examples)
        self.name = name
        self.warnings = tuple(warnings)
        self.dialect = dialect
        self.verdicts = dict(verdicts or {})
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

    def item(self, position: int) -> Example:
        """One example."""
        return self._examples[position]

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

    @property
    def content_hashes(self) -> list[str]:
        """:attr:`Example.content_hash` of each example."""
        return [e.content_hash for e in self._examples]

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
        write(Path(path), "".join(lines))

    @classmethod
    def from_file(cls, path: str | Path, columns: Mapping[str, str] | None = None) -> Dataset:
        """Read a data file in whatever dialect it is written: JSONL, JSON, CSV, TSV or Parquet, also in gzip, or the
        folder of a Hugging Face data set; chats, prompts with completions, texts, TRL's lists, ShareGPT, Alpaca,
        Gemini, or the columns that ``columns`` names (``{"user": "question", "assistant": "answer"}``).

        How it was read is said in ``warnings`` where anything was decided. Raises DataError that lists every problem
        of the file with its line, and names data that cannot be attributed; MissingExtraError for Parquet without
        pyarrow.
        """
        path = Path(path)
        rows, problems = read_rows(path)
        return cls._from_rows(rows, name=path.name, problems=problems, columns=columns)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Dataset:
        """Read a JSONL file in UTF-8 whose records have ``messages``, or ``prompt`` and ``completion``, or ``text``;
        blank lines are skipped. :meth:`from_file` reads other dialects.

        Raises DataError that lists every problem of the file with its line.
        """
        path = Path(path)
        records, problems = parse_lines(read_bytes(path))
        return cls._from_records(records, name=path.name, problems=problems)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], *, name: str = "data") -> Dataset:
        """From dictionaries shaped like the records of a file. Raises DataError as :meth:`from_file` does."""
        return cls._from_rows(list(enumerate(records, start=1)), name=name)

    @classmethod
    def from_pandas(
        cls, frame: pd.DataFrame, *, name: str = "DataFrame", columns: Mapping[str, str] | None = None
    ) -> Dataset:
        """From a DataFrame, in any dialect of :meth:`from_file`, with optional columns ``id`` and ``source``.

        Missing values (None, NaN, NA) count as not given; whole numbers that pandas turned into floats because ids
        were missing are read as whole numbers. Problems are numbered by row, from 1. Raises DataError as
        :meth:`from_file` does.
        """
        repeated = sorted({str(c) for c, n in Counter(frame.columns).items() if n > 1})
        if repeated:
            raise DataError(f"{name} has more than one column {', '.join(repeated)}; rename all but one.")
        return cls._from_rows(numbered(frame.to_dict("records")), name=name, columns=columns)

    @classmethod
    def from_huggingface(
        cls, dataset: Iterable[Mapping[str, Any]], *, name: str = "dataset", columns: Mapping[str, str] | None = None
    ) -> Dataset:
        """From a Hugging Face ``datasets.Dataset`` (any iterable of rows), as :meth:`from_pandas`.

        ``messages`` may be a list of structs or a struct of lists. Raises DataError as :meth:`from_file` does, and
        for a ``DatasetDict``.
        """
        if isinstance(dataset, Mapping):
            splits = ", ".join(map(str, dataset))
            raise DataError(f"{name} is a dictionary of splits ({splits}); pass one of them.")
        return cls._from_rows(numbered(dataset), name=name, columns=columns)

    @classmethod
    def _from_rows(
        cls,
        rows: Rows,
        *,
        name: str,
        problems: Sequence[tuple[int, str]] = (),
        columns: Mapping[str, str] | None = None,
    ) -> Dataset:
        """From rows in any dialect."""
        if problems and not rows:
            raise _error(name, _places(name, problems, len(problems)))
        rows, several = unfolded(rows)
        try:
            dialect = recognise([record for _, record in rows], columns)
        except DataError as error:
            raise DataError(f"{name} cannot be used; nothing was sent or changed:", [f"{name}: {error}"]) from error
        said = [f"{name} {sentence}" for sentence in (several, dialect.sentence) if sentence]
        records = [(line, converted(record, dialect)) for line, record in rows]
        return cls._from_records(records, name=name, problems=problems, warnings=said, dialect=dialect)

    @classmethod
    def _from_records(
        cls,
        records: Rows,
        *,
        name: str,
        problems: Sequence[tuple[int, str]] = (),
        warnings: Iterable[str] = (),
        dialect: Dialect = CHAT,
    ) -> Dataset:
        found, notes = list(problems), list(warnings)
        contents: dict[str, int] = {}
        copies: Counter[str] = Counter()
        duplicates: list[tuple[int, int]] = []
        unknown: dict[str, list[int]] = {}
        taken: dict[str, int] = {}
        kept: list[tuple[int, Mapping[str, Any]]] = []
        for line, record in records:
            if problems_here := record_problems(record):
                found += [(line, problem) for problem in problems_here]
                continue
            kept.append((line, record))
            if record.get("id") is not None and (first := taken.setdefault(str(record["id"]), line)) != line:
                found.append((line, f"id {str(record['id'])!r} is also used by {name}:{first}"))
        if found:
            raise _error(name, _places(name, found, len(records) + len(problems)))
        examples: list[Example] = []
        verdicts: dict[str, Verdict] = {}
        for line, record in kept:
            no_value = ["source"] if isinstance(record.get("source"), Mapping | list | tuple) else []
            for key in (*unknown_fields(record), *no_value):
                unknown.setdefault(key, []).append(line)
            example = example_of(record, "" if record.get("id") is None else str(record["id"]), line)
            content = example.content_hash
            first = contents.setdefault(content, line)
            if first != line:
                duplicates.append((line, first))
            if not example.id:
                identity = content
                while identity in taken:
                    copies[content] += 1
                    identity = f"{content}-{copies[content] + 1}"
                taken[identity] = line
                example = replace(example, id=identity)
            examples.append(example)
            if record.get("verdict") is not None:
                verdicts[example.id] = record["verdict"]
        if duplicates:
            shown = ", ".join(f"{line} as {first}" for line, first in duplicates[:_NAMED])
            more = ", ..." * (len(duplicates) > _NAMED)
            notes.append(
                f"{name}: {len(duplicates):,} of {len(examples):,} records repeat the content of an earlier one (line "
                f"{shown}{more}); all are kept"
            )
        for key, lines in sorted(unknown.items()):
            why = " (it is no single value)" if key == "source" else ""
            where = f" (line {lines[0]} first)" if len(lines) < len(examples) else ""
            plural = "s" * (len(lines) > 1)
            of_all = f"{'all ' * (1 < len(lines) == len(examples))}{len(lines):,} record{plural}"
            notes.append(f"{name}: field {key!r} of {of_all}{where} is not used{why}")
        return cls(examples, name=name, warnings=notes, dialect=dialect.name, verdicts=verdicts)


def _error(name: str, problems: Sequence[str]) -> DataError:
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return DataError(f"{name} has {count}; nothing was sent or changed. Fix these lines:", problems)


def _places(name: str, problems: Sequence[tuple[int, str]], records: int) -> list[str]:
    """Problems with file and line; one that many records share is one line with their number."""
    lines_of: dict[str, list[tuple[int, str]]] = {}
    for line, problem in sorted(problems, key=lambda p: p[0]):
        lines_of.setdefault(_COLUMN.sub("", problem), []).append((line, problem))
    said = []
    for places in lines_of.values():
        if len(places) <= _NAMED:
            said += [(line, f"{name}:{line}: {problem}") for line, problem in places]
            continue
        lines, problem = [line for line, _ in places], places[0][1]
        shown = ", ".join(map(str, lines[:_NAMED]))
        whole = f"all {len(lines):,} records" if len(set(lines)) == records else f"{len(lines):,} records"
        said.append((lines[0], f"{name}:{lines[0]}: {problem} ({whole}: lines {shown}, ...)"))
    return [text for _, text in sorted(said, key=lambda p: p[0])]


def example_of(record: Mapping[str, Any], identity: str, line: int) -> Example:
    """The example of a record that was checked."""
    messages = tuple(message_of(m) for m in record.get("messages") or ())
    source = record.get("source")
    fields = {k: record[k] for k in CHAT_FIELDS if messages and record.get(k) is not None}
    whole = text_only(record)
    return Example(
        id=identity,
        messages=messages,
        prompt="" if whole else record.get("prompt") or "",
        completion=record["text"] if whole else record.get("completion") or "",
        source=None if source is None or isinstance(source, Mapping | list | tuple) else str(source),
        line=line,
        fields=fields,
        text_only=whole,
    )


def message_of(record: Mapping[str, Any]) -> Message:
    """A message of a record that was checked."""
    weight = record.get("weight")
    fields = {k: v for k, v in record.items() if k not in ("role", "content", "weight") and v is not None}
    if "content" in record and record["content"] is None:
        fields["content"] = None  # beside a call: trainers are sent what the file says
    return Message(record["role"], record.get("content"), None if weight is None else (1 if weight else 0), fields)
