"""What is wrong with one record, and rows of tables as plain records.

Records here have one of three forms: ``messages``, ``prompt`` and ``completion``, or ``text``; :mod:`.dialects` makes
them from others. Nothing here knows examples or providers; :mod:`.dataset` builds on it.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from .example import REASONING_FIELDS, known_part

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CHAT_FIELDS = (
    "tools",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "tool_choice",
    "response_format",
    "reasoning_effort",
    "chat_template_kwargs",
    "documents",
    "weight",
)
"""Fields of a chat record, besides its messages, that a model or its template reads."""
RECORD_FIELDS = frozenset({"id", "source", "verdict", "messages", "prompt", "completion", "text", *CHAT_FIELDS})
MAX_LABEL = 1_000
"""Most characters of an id or a source: they are shown in tables and stored beside every score."""

_MAX_DEPTH = 32
_NOTHING = "there is no token to learn or to measure"


def record_of_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A table's row as a record. Missing cells are left out; an id that a table with missing ids turned into a float
    is a whole number again."""
    record = {str(k): plain_cell(v) for k, v in row.items()}
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
        lists = isinstance(columns.get("role", columns.get("from")), list)
        return _rows(columns) if lists else columns
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
    """Names of the record's fields that have a value and go neither to a trainer nor into a table."""
    for key, value in record.items():
        read = key in RECORD_FIELDS and (key != "text" or text_only(record))
        if value is not None and not read:
            yield str(key)


def record_problems(record: Any) -> list[str]:
    """Everything that is wrong with one record, as phrases without the place."""
    if not isinstance(record, Mapping):
        return [f"a record must be a JSON object, not {type(record).__name__}"]
    if _too_deep(record):
        return ["JSON that is nested too deeply"]
    problems = [*_id_problems(record.get("id")), *_source_problems(record.get("source"))]
    if record.get("verdict") not in (None, "wanted", "unwanted"):
        problems.append("verdict must be wanted or unwanted")
    if isinstance(record.get("weight"), int | float) and not record["weight"] > 0:
        problems.append("weight must be above 0; leave the record out where it is not to be trained on")
    given = {key for key in ("messages", "prompt", "completion") if record.get(key) is not None}
    if "messages" in record and ("messages" in given or not given):
        if len(given) > 1:
            problems.append("has both messages and prompt/completion; keep one of them")
        return [*problems, *_messages_problems(record["messages"]), *_tools_problems(record)]
    if text_only(record):
        return problems + _text_problems("text", record["text"])
    if not given and "prompt" not in record and "completion" not in record:
        return [*problems, "needs messages, or prompt and completion, or text"]
    for key in ("prompt", "completion"):
        value = record.get(key)
        if not isinstance(value, str):
            problems.append(f"{key} is missing" if value is None else f"{key} must be a text")
        problems += _surrogate_problems(key, value)
    if record.get("completion") == "":
        problems.append(f"completion is empty: {_NOTHING}")
    return problems


def text_only(record: Mapping[Any, Any]) -> bool:
    """Whether a record is a text that is all completion."""
    return record.get("text") is not None and all(record.get(k) is None for k in ("messages", "prompt", "completion"))


def _text_problems(place: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{place} must be a text"]
    return [f"{place} is empty: {_NOTHING}"] if not value else _surrogate_problems(place, value)


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
    if not isinstance(value, str):
        return []  # other single values become texts, lists and objects are noted and left out
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
    calls = message.get("tool_calls") or message.get("function_call")
    said = calls or any(message.get(name) for name in REASONING_FIELDS)
    if calls:
        yield from _call_problems(message, role)
    if content is None:
        if not said:
            yield ".content is missing"
    elif isinstance(content, str):
        if role == "assistant" and content == "" and not said and weight != 0:
            yield f".content is empty: {_NOTHING}"
    elif isinstance(content, list | tuple):
        yield from _part_problems(content, role, bool(said) or weight == 0)
    else:
        yield ".content must be a text or a list of parts"
    for name in REASONING_FIELDS:
        if message.get(name) is not None and not isinstance(message[name], str):
            yield f".{name} must be a text"
    if weight is not None and role != "assistant" and weight != 0:
        yield ".weight belongs on assistant turns only"
    elif weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        yield ".weight must be 0 or 1: other weights cannot be attributed yet"
    yield from _all_surrogates("", message)


def _part_problems(parts: Sequence[Any], role: Any, may_be_empty: bool) -> Iterator[str]:
    for i, part in enumerate(parts):
        if not known_part(part):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            yield (
                f".content[{i}] is {reprlib.repr(kind)}: a part must be a text "
                '({"type": "text", "text": ...}) or an image; nothing else can be attributed yet'
            )
    if role == "assistant" and not may_be_empty and not any(p for p in parts):
        yield f".content is empty: {_NOTHING}"


def _call_problems(message: Mapping[Any, Any], role: Any) -> Iterator[str]:
    if role != "assistant":
        yield " calls a tool, which only an assistant turn can"
    calls = message.get("tool_calls") or []
    legacy = message.get("function_call")
    functions: list[tuple[str, Any]] = [(".function_call", legacy)] if legacy else []
    if not isinstance(calls, list | tuple):
        yield ".tool_calls must be a list"
        calls = []
    for i, call in enumerate(calls):
        functions.append((f".tool_calls[{i}].function", call.get("function") if isinstance(call, Mapping) else None))
    for place, function in functions:
        if not isinstance(function, Mapping):
            yield f"{place} must be an object with name and arguments"
        elif not isinstance(function.get("name"), str) or not function["name"]:
            yield f"{place}.name is missing"


def _tools_problems(record: Mapping[Any, Any]) -> Iterator[str]:
    if not isinstance(record.get("chat_template_kwargs"), Mapping | None):
        yield "chat_template_kwargs must be an object"
    for key in ("tools", "functions"):
        value = record.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
            yield f"{key} must be a list of objects"
        else:
            yield from _all_surrogates(key, value)


def _too_deep(value: Any, depth: int = 0) -> bool:
    if depth > _MAX_DEPTH:
        return True
    if isinstance(value, Mapping):
        return any(_too_deep(v, depth + 1) for v in value.values())
    return isinstance(value, list | tuple) and any(_too_deep(v, depth + 1) for v in value)


def _all_surrogates(place: str, value: Any) -> Iterator[str]:
    """The problem of every text in JSON data that UTF-8 cannot carry."""
    if isinstance(value, str):
        yield from _surrogate_problems(place, value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _surrogate_problems(f"a key of {place or 'the message'}", key)
            yield from _all_surrogates(f"{place}.{reprlib.repr(key)[1:-1]}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _all_surrogates(f"{place}[{i}]", inner)


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
