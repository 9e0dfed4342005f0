"""Raw records of a data set: reading lines of JSON, and everything that can be wrong with one.

Nothing here knows examples or providers; :mod:`.dataset` builds on it.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
RECORD_FIELDS = frozenset({"id", "source", "messages", "prompt", "completion"})
MESSAGE_FIELDS = frozenset({"role", "content", "weight"})
MAX_LABEL = 1_000
"""Most characters of an id or a source: they are shown in tables and stored beside every score."""

_MAX_DEPTH = 6
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def parse_lines(raw: bytes) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    """Records and problems of a JSONL file in UTF-8, each with its 1-based line; blank lines count and are skipped.

    A key that is given twice in one object is a problem, because JSON readers drop one of the two in silence.
    """
    if raw.startswith(_UTF16_BOMS):
        return [], [(1, "the file is UTF-16, not UTF-8; save it as UTF-8")]
    records: list[tuple[int, Any]] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(raw.removeprefix(_UTF8_BOM).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append((number, json.loads(line.decode("utf-8"), object_pairs_hook=_no_repeats)))
        except UnicodeDecodeError as error:
            problems.append((number, f"not UTF-8 (byte {error.start + 1} of the line)"))
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON: {error.msg} (column {error.colno})"))
        except _RepeatedKeyError as error:
            problems.append((number, f"key {reprlib.repr(error.key)} is given twice in one object"))
        except RecursionError:
            problems.append((number, "JSON that is nested too deeply"))
        except ValueError:  # int() refuses thousands of digits
            problems.append((number, "JSON with a number that is too long"))
    return records, problems


class _RepeatedKeyError(Exception):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return record


def record_of_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The known columns of a table's row as a record. Missing cells are left out; an id that a table with missing
    ids turned into a float is a whole number again."""
    record = {str(k): plain_cell(v) for k, v in row.items() if k in RECORD_FIELDS}
    identity = record.get("id")
    if isinstance(identity, float) and identity.is_integer():
        record["id"] = int(identity)
    return {k: v for k, v in record.items() if v is not None}


def plain_cell(value: Any, depth: int = 0) -> Any:
    """A table cell as plain Python data: arrays become lists, missing values (NaN, NA, NaT) None, and a struct of
    equally long lists under ``role`` (how some tables store a list of messages) the list of its rows."""
    if depth > _MAX_DEPTH:  # no field is as deep; whatever it is will be reported
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        columns = {k: plain_cell(v, depth + 1) for k, v in value.items()}
        return _rows(columns) if isinstance(columns.get("role"), list) else columns
    if isinstance(value, list | tuple):
        return [plain_cell(v, depth + 1) for v in value]
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value)):
        return None
    return value


def _rows(columns: Mapping[Any, Any]) -> Any:
    lists = [v for v in columns.values() if isinstance(v, list)]
    if len(lists) < len(columns) or len({len(v) for v in lists}) != 1:
        return columns  # not a list of rows: reported as what it is
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def unknown_fields(record: Mapping[Any, Any]) -> Iterator[str]:
    """Names of fields with a value that nothing reads, in the record and in its messages."""
    yield from (str(key) for key in record if key not in RECORD_FIELDS)
    for message in record.get("messages") or ():
        yield from (f"messages[].{k}" for k, v in message.items() if k not in MESSAGE_FIELDS and v is not None)


def record_problems(record: Any) -> list[str]:
    """Everything that is wrong with one record, as phrases without the place."""
    if not isinstance(record, Mapping):
        return [f"a record must be a JSON object, not {type(record).__name__}"]
    problems = [*_id_problems(record.get("id")), *_source_problems(record.get("source"))]
    if "messages" in record:
        if "prompt" in record or "completion" in record:
            problems.append("has both messages and prompt/completion; keep one of them")
        return problems + _messages_problems(record["messages"])
    if "prompt" not in record and "completion" not in record:
        return [*problems, "needs either messages, or prompt and completion"]
    for key in ("prompt", "completion"):
        value = record.get(key)
        if not isinstance(value, str):
            problems.append(f"{key} is missing" if value is None else f"{key} must be a text")
        problems += _surrogate_problems(key, value)
    if record.get("completion") == "":
        problems.append("completion is empty: there is no token to learn or to measure")
    return problems


def _id_problems(value: Any) -> Iterable[str]:
    if value is None:
        return []
    if isinstance(value, str):
        if not value:
            return ["id is empty"]
        return [*_length_problems("id", value), *_surrogate_problems("id", value)]
    if isinstance(value, bool) or not isinstance(value, Integral):
        return ["id must be a text or a whole number"]
    return [] if abs(int(value)) < 10**18 else ["id is a number of more than 18 digits; write it as a text"]


def _source_problems(value: Any) -> Iterable[str]:
    if value is None:
        return []
    if not isinstance(value, str):
        return ["source must be a text"]
    return [*_length_problems("source", value), *_surrogate_problems("source", value)]


def _messages_problems(messages: Any) -> list[str]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        return ["messages must be a non-empty list"]
    problems: list[str] = []
    answers = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            problems.append(f"messages[{i}] must be an object with role and content")
            continue
        problems += [f"messages[{i}]{problem}" for problem in _message_problems(message)]
        answers += message.get("role") == "assistant" and message.get("weight") != 0
    last = messages[-1]
    if not answers:
        problems.append("no assistant turn carries the loss (none is there, or all have weight 0)")
    elif isinstance(last, Mapping) and last.get("role") != "assistant":
        problems.append("the last message must be the assistant's")
    return problems


def _message_problems(message: Mapping[Any, Any]) -> Iterator[str]:
    role, content, weight = message.get("role"), message.get("content"), message.get("weight")
    if role is None:
        yield ".role is missing"
    elif role not in ROLES:
        yield f".role is {reprlib.repr(role)}; it must be one of {', '.join(ROLES)}"
    if message.get("tool_calls") or message.get("function_call"):
        yield " calls a tool; only text turns can be attributed"
    elif not isinstance(content, str):
        yield ".content is missing" if content is None else ".content must be a text"
    elif role == "assistant" and content == "":
        yield ".content is empty: there is no token to learn or to measure"
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        yield ".weight must be 0 or 1"
    elif weight is not None and role != "assistant":
        yield ".weight belongs on assistant turns only"
    yield from _surrogate_problems(".content", content)


def _length_problems(place: str, text: str) -> list[str]:
    return [f"{place} has {len(text):,} characters; at most {MAX_LABEL:,} are kept"] if len(text) > MAX_LABEL else []


def _surrogate_problems(place: str, text: Any) -> list[str]:
    if not isinstance(text, str):
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return [f"{place} holds half of a surrogate pair at character {error.start + 1}, which UTF-8 cannot carry"]
    return []
