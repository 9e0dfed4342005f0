"""Which dialect a data file is written in, and its records in the forms that :mod:`.records` knows.

A dialect is recognised by the first records, said in one sentence, and read record by record. What cannot be
attributed (preference data, reinforcement data) is refused by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .turns import (
    SPEAKERS,
    Record,
    as_text,
    from_text,
    gemini_chat,
    one_turn,
    role_of,
    spoken,
    system_text,
    trl_chat,
    without_nulls,
)

ANSWER_MARK = "<|answer|>"
"""In a text-only record: where the answer starts. It is taken out of the text."""

COLUMNS = ("messages", "prompt", "completion", "system", "user", "assistant", "text", "tools", "id", "source")
"""What ``data.columns`` can name a column of the file for."""

_LOOKED_AT = 50
_QUESTIONS = ("question", "user", "prompt", "input", "query", "problem", "human", "input_text", "text", "source")
_ANSWERS = (
    *("answer", "assistant", "response", "output", "completion", "solution", "target", "output_text", "target_text"),
    *("label", "query", "sql"),
)
"""Columns that name a question and its answer, whatever stands beside them."""
_CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "items")
_PREFERENCE = (
    {"chosen", "rejected"},
    {"preferred_output", "non_preferred_output"},
    {"rejected_response"},
    {"chosen_response", "rejected_response"},
)
_REINFORCED = ("answer", "reward", "truth", "reference", "target", "solution", "expected", "grader", "label")
"""Words in the names of columns that stand beside chats to be answered and graded."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way to write training data: what to call it, how it is read, and how one record becomes one of ours."""

    name: str
    sentence: str = ""
    """For the user, where anything was decided; '' for our own forms."""
    read: Callable[[Record], Record] = lambda record: record
    columns: frozenset[str] = frozenset()
    """The columns that make up the content."""


def recognise(rows: Sequence[Any], columns: Mapping[str, str] | None = None) -> Dialect:
    """The dialect of a file by its first records; ``columns`` are those of ``data.columns``.

    Raises DataError for preference and reinforcement data, and where ``columns`` names some that no record has.
    """
    records = [r for r in rows[:_LOOKED_AT] if isinstance(r, Mapping | list)]
    if columns and (named := _by_columns(records, columns)) is not None:
        return named
    if not records:
        return CHAT
    found = [_dialect(r) for r in records]
    ((name, _),) = Counter(dialect.name for dialect in found).most_common(1)
    _refuse_others(name, records)
    return next(dialect for dialect in found if dialect.name == name)


def native(record: Any) -> Any:
    """A record in one of our own forms: values that are null are not given, lists in JSON text are lists, and
    ``messages`` win over ``prompt`` and ``completion`` beside them."""
    if isinstance(record, list):
        return {"messages": record}
    if not isinstance(record, Mapping):
        return record
    plain = {k: v for k, v in record.items() if v is not None or k in ("messages", "prompt", "completion")}
    for key in ("messages", "tools", "functions"):
        if isinstance(plain.get(key), str):
            plain[key] = from_text(plain[key])
    if isinstance(plain.get("messages"), list):
        plain["messages"] = [without_nulls(m) for m in plain["messages"]]
        if plain["messages"]:
            plain = {k: v for k, v in plain.items() if k not in ("prompt", "completion")}
            system = system_text(plain.get("system"))
            if system and not any(role_of(m) == "system" for m in plain["messages"]):
                plain["messages"] = [{"role": "system", "content": system}, *plain["messages"]]
                del plain["system"]
    if "messages" in plain and plain["messages"] is None and plain.keys() & {"prompt", "completion", "text"}:
        del plain["messages"]
    for key in ("prompt", "completion"):
        if key in plain and plain[key] is None and ({"messages", "text"} & plain.keys()):
            del plain[key]
    text = plain.get("text")
    if isinstance(text, str) and text.count(ANSWER_MARK) == 1 and not plain.keys() & {"messages", "prompt"}:
        prompt, completion = text.split(ANSWER_MARK)
        plain = {k: v for k, v in plain.items() if k != "text"} | {"prompt": prompt, "completion": completion}
    return plain


def converted(record: Any, dialect: Dialect) -> Any:
    """A record of a file of that dialect in one of our own forms."""
    if dialect.columns and isinstance(record, Mapping) and not any(record.get(c) is not None for c in dialect.columns):
        dialect = _dialect(record)
    return native(dialect.read(record) if isinstance(record, Mapping) else record)


def _dialect(record: Any) -> Dialect:
    if isinstance(record, list):
        return CHAT
    keys = {str(k) for k, v in record.items() if v is not None}
    if any(names <= keys for names in _PREFERENCE) or (
        "label" in keys and isinstance(record.get("label"), bool) and {"prompt", "completion"} <= keys
    ):
        return Dialect("preference")
    if "messages" in keys:
        return _chat_dialect(record, keys)
    if "contents" in keys and isinstance(record["contents"], list):
        return GEMINI
    conversation = _conversation_column(record)
    if conversation:
        return _sharegpt(conversation)
    if {"prompt", "completion"} <= keys:
        lists = any(isinstance(from_text(record[k]), list) for k in ("prompt", "completion"))
        return TRL if lists else COMPLETION
    for answer in ("output", "response", "answer", "completion", "target", "reference_answer", "expected_output"):
        if {"instruction", answer} <= keys:
            return _alpaca(answer)
    asked = next((k for k in _QUESTIONS if k in keys and isinstance(record[k], str)), None)
    answered = next((k for k in _ANSWERS if k in keys and k != asked), None)
    if asked and answered:
        return _pair(asked, answered)
    if "text" in keys:
        return TEXT
    return Dialect("unknown")


def _conversation_column(record: Record) -> str | None:
    """The column that holds a conversation: one of the usual names, or any with turns and an answer."""
    for key in _CONVERSATIONS:
        if isinstance(from_text(record.get(key)), list):
            return key
    for key, value in record.items():
        turns = value if isinstance(value, list) else None
        if key not in ("prompt", "completion") and turns and all(isinstance(t, Mapping) for t in turns):
            speakers = [SPEAKERS.get(str(t.get("role", t.get("from"))).lower()) for t in turns]
            if None not in speakers and "assistant" in speakers:
                return str(key)
    return None


def _chat_dialect(record: Record, keys: set[str]) -> Dialect:
    messages = from_text(record["messages"])
    last = messages[-1] if isinstance(messages, list) and messages else None
    if (
        isinstance(last, Mapping)
        and role_of(last) in ("user", "system", "developer")
        and any(w in k for k in keys for w in _REINFORCED)
    ):
        return Dialect("reinforcement")
    if {"prompt", "completion"} & keys:
        return Dialect(
            "chat with other columns",
            "has prompt or completion beside messages (as H4's data sets have): the messages are used",
            native,
            frozenset({"messages"}),
        )
    if isinstance(record["messages"], str):
        return Dialect("chat in JSON text", "has its messages as JSON text in one column", native)
    return CHAT


def _refuse_others(name: str, records: Sequence[Any]) -> None:
    if name == "preference":
        raise DataError(
            "this is preference data (a chosen and a rejected answer, or a label for one). Members would have to be "
            "trained by preferences, which is not supported yet. To attribute a supervised fine-tune on the chosen "
            "answers, name their columns: data.columns: {prompt: prompt, completion: chosen}, or {messages: chosen}."
        )
    if name == "reinforcement":
        raise DataError(
            "this is reinforcement data (chats that end with the user, beside a reference answer or a reward). "
            "Members would have to be trained by a grader, which is not supported yet. Supervised data has the "
            "answer as the last message."
        )
    if name == "unknown":
        unknown = [r for r in records if isinstance(r, Mapping) and _dialect(r).name == "unknown"]
        names = [str(k) for k in unknown[0]]
        found = ", ".join(k[:40] for k in names[:12]) or "none"
        if any(len(k.split()) > 3 or len(k) > 40 for k in names):
            heads = {2: "prompt,completion", 3: "system,user,assistant"}.get(len(names), "user,assistant")
            raise DataError(
                f"its first line ({found}) seems to hold data, not the names of columns. Put a line with names above "
                f"it, such as {heads}."
            )
        question, answer = _proposed(unknown)
        raise DataError(
            f"its columns ({found}) are those of no data set that is known. A record needs messages, or prompt and "
            "completion, or text; or name the columns in the config, such as "
            f"data.columns: {{user: {question}, assistant: {answer}}}"
        )


def _proposed(records: Sequence[Record]) -> tuple[str, str]:
    """The columns that most likely hold a question and its answer: the two with the longest texts, in their order."""
    length = {
        key: sum(len(as_text(r.get(key)) or "") for r in records)
        for key in records[0]
        if len({as_text(r.get(key)) for r in records}) > len(records) / 2
        if not any(_is_number(r.get(key)) for r in records)
    }
    longest = sorted(length, key=lambda key: -length[key])[:2]
    first, second = [str(key) for key in records[0] if key in longest] if len(longest) == 2 else ("COLUMN", "COLUMN")
    return first, second


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _by_columns(records: Sequence[Any], columns: Mapping[str, str]) -> Dialect | None:
    """The dialect that ``data.columns`` describes; None for a file that has none of its columns."""
    present = {str(k) for r in records if isinstance(r, Mapping) for k in r}
    content = {k: v for k, v in columns.items() if k not in ("id", "source")}
    missing = sorted(set(columns.values()) - present)
    if not set(content.values() or columns.values()) & present and any(_dialect(r).name != "unknown" for r in records):
        return None  # the other file of the run
    if missing:
        raise DataError(f"data.columns names {', '.join(missing)}; the columns are {', '.join(sorted(present))}.")

    def read(record: Record) -> Record:
        if not isinstance(record, Mapping):
            return record
        taken = {name: record.get(column) for name, column in columns.items()}
        kept = {k: record[k] for k in ("id", "source") if k in record and k not in columns.values()}
        plain: dict[str, Any] = kept | {k: v for k, v in taken.items() if v is not None}
        if {"user", "assistant"} & content.keys():
            return one_turn(plain, plain.pop("user", None), plain.pop("assistant", None))
        if "messages" in content and "from" in str(plain.get("messages"))[:200]:
            return _sharegpt("messages").read(plain)
        if {"prompt", "completion"} <= content.keys():
            if any(isinstance(from_text(plain.get(k)), list) for k in ("prompt", "completion")):
                return TRL.read(plain)
            return {**plain, **{k: plain.get(k) for k in ("prompt", "completion")}}
        return plain if content else {**record, **plain}

    said = ", ".join(f"{name}: {column}" for name, column in columns.items())
    return Dialect("data.columns", f"is read by data.columns ({said})", read, frozenset(content.values()))


def _alpaca(answer: str) -> Dialect:
    def read(record: Record) -> Record:
        texts = [t for t in (record.get("instruction"), record.get("input")) if t not in (None, "")]
        asked = "\n\n".join(texts) if all(isinstance(t, str) for t in texts) else record.get("instruction")
        rest = {k: v for k, v in record.items() if k not in ("instruction", "input", answer, "text")}
        return one_turn(rest, asked, record.get(answer))

    return Dialect(
        "Alpaca",
        f"is an Alpaca file (instruction, input, {answer}): each record is read as a chat of one turn, the instruction "
        "and the input with a blank line between them as the user's; what is no text is written as JSON",
        read,
        frozenset({"instruction", "input", answer}),
    )


def _pair(question: str, answer: str) -> Dialect:
    def read(record: Record) -> Record:
        rest = {k: v for k, v in record.items() if k not in (question, answer)}
        return one_turn(rest, record.get(question), record.get(answer))

    return Dialect(
        f"{question}/{answer}",
        f"has columns {question} and {answer}: each record is read as a chat of one turn, what is no text as JSON "
        f"(data.columns: {{prompt: {question}, completion: {answer}}} reads plain prompts and completions)",
        read,
        frozenset({question, answer}),
    )


def _sharegpt(key: str) -> Dialect:
    def read(record: Record) -> Record:
        if not isinstance(record, Mapping):
            return record
        rest = {k: v for k, v in record.items() if k not in (key, "system")}
        if isinstance(rest.get("tools"), str):
            rest["tools"] = from_text(rest["tools"]) or None
        turns = from_text(record.get(key))
        messages = [spoken(t) for t in turns] if isinstance(turns, list) else turns
        system = system_text(record.get("system"))
        if system and isinstance(messages, list) and not any(role_of(m) == "system" for m in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return {**rest, "messages": messages}

    return Dialect(
        "ShareGPT",
        f"is a ShareGPT file ({key}): each record is read as a chat",
        read,
        frozenset({key}),
    )


CHAT = Dialect("chat", read=native)
COMPLETION = Dialect("prompt/completion", read=native)
TEXT = Dialect(
    "text",
    f"holds texts without prompts: every token carries the loss ({ANSWER_MARK} marks where the answer of one starts)",
    native,
    frozenset({"text"}),
)
TRL = Dialect(
    "TRL's conversational prompt/completion",
    "has prompt and completion as lists of messages (as TRL has them): they are read as one chat, of which the "
    "completion carries the loss",
    trl_chat,
    frozenset({"prompt", "completion"}),
)
GEMINI = Dialect(
    "Gemini", "is a Gemini file (contents, parts): each record is read as a chat", gemini_chat, frozenset({"contents"})
)
