"""Which dialect a data file is written in, and its records in the forms that :mod:`.records` knows.

A dialect is recognised by the first records, said in one sentence, and read record by record. What cannot be
attributed (preference data, reinforcement data) is refused by its name.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

ANSWER_MARK = "<|answer|>"
"""In a text-only record: where the answer starts. It is taken out of the text."""

COLUMNS = ("messages", "prompt", "completion", "system", "user", "assistant", "text", "tools", "id", "source")
"""What ``data.columns`` can name a column of the file for."""

Record = Mapping[str, Any]

_LOOKED_AT = 50
_QUESTIONS = ("question", "user", "prompt", "input", "query", "problem", "human", "input_text", "text", "source")
_ANSWERS = (
    *("answer", "assistant", "response", "output", "completion", "solution", "target", "output_text", "target_text"),
    *("label", "query", "sql"),
)
"""Columns that name a question and its answer, whatever stands beside them."""
_CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "items")
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "chatbot"), "assistant"),
    **{role: role for role in ("system", "developer")},
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "function_call": "function_call",
}
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
    if columns:
        named = _by_columns(records, columns)
        if named is not None:
            return named
    found = Counter(_dialect(r).name for r in records)
    if not found:
        return CHAT
    name = found.most_common(1)[0][0]
    dialect = next(d for r in records if (d := _dialect(r)).name == name)
    _refuse_others(name, records)
    return dialect


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
            plain[key] = _from_text(plain[key])
    if isinstance(plain.get("messages"), list):
        plain["messages"] = [_turn(m) for m in plain["messages"]]
        if plain["messages"]:
            plain = {k: v for k, v in plain.items() if k not in ("prompt", "completion")}
            system = _system_text(plain.get("system"))
            if system and not any(_role(m) == "system" for m in plain["messages"]):
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
        lists = any(isinstance(_from_text(record[k]), list) for k in ("prompt", "completion"))
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
        if isinstance(_from_text(record.get(key)), list):
            return key
    for key, value in record.items():
        turns = value if isinstance(value, list) else None
        if key not in ("prompt", "completion") and turns and all(isinstance(t, Mapping) for t in turns):
            speakers = [_SPEAKERS.get(str(t.get("role", t.get("from"))).lower()) for t in turns]
            if None not in speakers and "assistant" in speakers:
                return str(key)
    return None


def _chat_dialect(record: Record, keys: set[str]) -> Dialect:
    messages = _from_text(record["messages"])
    last = messages[-1] if isinstance(messages, list) and messages else None
    if (
        isinstance(last, Mapping)
        and _role(last) in ("user", "system", "developer")
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
        key: sum(len(_as_text(r.get(key)) or "") for r in records)
        for key in records[0]
        if len({_as_text(r.get(key)) for r in records}) > len(records) / 2
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


def unfolded(rows: Sequence[tuple[int, Any]]) -> tuple[list[tuple[int, Any]], str]:
    """Rows with one chat each, and a sentence where some held several chats, or single messages.

    A list of messages is one chat; where the roles show several (system messages start them), it is as many.
    """
    lists = [record for _, record in rows if isinstance(record, list)]
    flat = [*lists[0]] if len(rows) == len(lists) == 1 else [record for _, record in rows]
    if len(flat) > 1 and all(_is_message(m) for m in flat):
        lines = [rows[0][0]] * len(flat) if lists else [line for line, _ in rows]
        starts = [i for i, m in enumerate(flat) if _role(_spoken(m)) == "system"]
        if len(starts) < 2 or starts[0] != 0:
            whole = "is one list of messages, and is read as one chat"
            return [(lines[0], flat)], f'{whole}; where it holds several, write {{"messages": [...]}} for each'
        chats = [(lines[a], flat[a:b]) for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
        said = f"is one list of messages, read as {len(chats):,} chats: each system message starts one"
        return [(line, {"messages": [_spoken(m) for m in chat]}) for line, chat in chats], said
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
            result.append((line, {**rest, **identity, "messages": [_spoken(m) for m in chat]}))
    return result, f"holds several chats in each record ({column}): each is an example of its own" * bool(column)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and str(value.get("role", value.get("from"))).lower() in _SPEAKERS


def _is_chats(value: Any) -> bool:
    """Whether a value is a list of lists of messages."""
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(chat, list) and chat and all(_is_message(m) for m in chat) for chat in value)
    )


def _by_columns(records: Sequence[Any], columns: Mapping[str, str]) -> Dialect | None:
    """The dialect that ``data.columns`` describes; None for a file that has none of its columns."""
    present = {str(k) for r in records if isinstance(r, Mapping) for k in r}
    content = {k: v for k, v in columns.items() if k not in ("id", "source")}
    missing = sorted(set(columns.values()) - present)
    if not set(content.values() or columns.values()) & present:
        if any(_dialect(r).name != "unknown" for r in records):
            return None  # the other file of the run
        raise DataError(f"data.columns names {', '.join(missing)}; the columns are {', '.join(sorted(present))}.")
    if missing:
        raise DataError(f"data.columns names {', '.join(missing)}; the columns are {', '.join(sorted(present))}.")

    def read(record: Record) -> Record:
        if not isinstance(record, Mapping):
            return record
        taken = {name: record.get(column) for name, column in columns.items()}
        kept = {k: record[k] for k in ("id", "source") if k in record and k not in columns.values()}
        plain: dict[str, Any] = kept | {k: v for k, v in taken.items() if v is not None}
        if {"user", "assistant"} & content.keys():
            return _one_turn(plain, plain.pop("user", None), plain.pop("assistant", None))
        if "messages" in content and "from" in str(plain.get("messages"))[:200]:
            return _sharegpt("messages").read(plain)
        if {"prompt", "completion"} <= content.keys():
            if any(isinstance(_from_text(plain.get(k)), list) for k in ("prompt", "completion")):
                return TRL.read(plain)
            return {**plain, **{k: plain.get(k) for k in ("prompt", "completion")}}
        return plain if content else {**record, **plain}

    said = ", ".join(f"{name}: {column}" for name, column in columns.items())
    return Dialect("data.columns", f"is read by data.columns ({said})", read, frozenset(content.values()))


def _one_turn(record: Record, user: Any, assistant: Any) -> Record:
    """A chat of one question and its answer, after the record's ``system`` where it has one."""
    rest = {k: v for k, v in record.items() if k not in ("system", "system_prompt", "history")}
    turns: list[dict[str, Any]] = []
    system = _system_text(record.get("system")) or _system_text(record.get("system_prompt"))
    if system:
        turns.append({"role": "system", "content": system})
    history = _from_text(record.get("history"))
    for pair in history if isinstance(history, list) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [{"role": "user", "content": _as_text(user)}, {"role": "assistant", "content": _as_text(assistant)}]
    return {**rest, "messages": turns}


def _as_text(value: Any) -> Any:
    """A number or an object in a column of texts, as JSON."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return value


def _alpaca(answer: str) -> Dialect:
    def read(record: Record) -> Record:
        given = [record.get(k) for k in ("instruction", "input")]
        texts = [t for t in given if t not in (None, "")]
        asked = "\n\n".join(texts) if all(isinstance(t, str) for t in texts) else given[0]
        rest = {k: v for k, v in record.items() if k not in ("instruction", "input", answer, "text")}
        return _one_turn(rest, asked, record.get(answer))

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
        return _one_turn(rest, record.get(question), record.get(answer))

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
            rest["tools"] = _from_text(rest["tools"]) or None
        turns = _from_text(record.get(key))
        messages = [_spoken(t) for t in turns] if isinstance(turns, list) else turns
        system = _system_text(record.get("system"))
        if system and isinstance(messages, list) and not any(_role(m) == "system" for m in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return {**rest, "messages": messages}

    return Dialect(
        "ShareGPT",
        f"is a ShareGPT file ({key}): each record is read as a chat",
        read,
        frozenset({key}),
    )


def _spoken(turn: Any) -> Any:
    """A turn of ShareGPT (``from``, ``value``) as a message."""
    if not isinstance(turn, Mapping):
        return turn
    turn = _turn(turn)
    if "from" not in turn:
        return {**turn, "role": _SPEAKERS.get(str(turn.get("role")).lower(), turn.get("role"))}
    speaker = str(turn["from"])
    role = _SPEAKERS.get(speaker.lower(), speaker)
    content = turn.get("value", turn.get("content"))
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "content")}
    if role == "function_call":
        call = _from_text(content)
        calls = call if isinstance(call, list) else [call]
        if all(isinstance(c, Mapping) and "name" in c for c in calls):
            named = [{"type": "function", "function": {"arguments": {}, **c}} for c in calls]
            return {"role": "assistant", "content": "", "tool_calls": named, **rest}
        role = "assistant"
    return {"role": role, "content": content, **rest}


def _trl(record: Record) -> Record:
    if not isinstance(record, Mapping):
        return record
    prompt, completion = (_from_text(record.get(k)) for k in ("prompt", "completion"))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(asked, list) or not isinstance(said, list):
        return record
    # A completion carries the loss, a prompt does not.
    context = [{**_turn(m), "weight": 0} if _role(m) == "assistant" else m for m in asked]
    rest = {k: v for k, v in record.items() if k not in ("prompt", "completion")}
    return {**rest, "messages": [*context, *said]}


def _gemini(record: Record) -> Record:
    """Google's ``contents`` with ``parts``."""

    def turn(content: Any) -> Any:
        if not isinstance(content, Mapping) or not isinstance(content.get("parts"), list):
            return content
        texts = [p.get("text") for p in content["parts"] if isinstance(p, Mapping)]
        role = {"model": "assistant"}.get(content.get("role", ""), content.get("role", "user"))
        plain = [t for t in texts if isinstance(t, str)]
        if len(plain) == len(content["parts"]):
            return {"role": role, "content": "".join(plain)}
        return {"role": role, "content": content["parts"]}

    names = ("systemInstruction", "system_instruction")
    system = next((turn(record[k]) for k in names if isinstance(record.get(k), Mapping)), None)
    messages = [turn(c) for c in record["contents"]]
    if isinstance(system, Mapping):
        messages = [{**system, "role": "system"}, *messages]
    return {**{k: v for k, v in record.items() if k not in ("contents", *names)}, "messages": messages}


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _turn(message: Any) -> Any:
    """A message without its null fields; its content stays where it is null on purpose, beside a call."""
    if not isinstance(message, Mapping):
        return message
    called = message.get("tool_calls") or message.get("function_call")
    return {k: v for k, v in message.items() if v is not None or (k == "content" and called)}


def _system_text(value: Any) -> str:
    if isinstance(value, list):  # Bedrock: [{"text": ...}]
        value = "".join(str(p.get("text", "")) for p in value if isinstance(p, Mapping))
    return value if isinstance(value, str) else ""


def _from_text(value: Any) -> Any:
    """A list or object that stands as text in a table's cell, in JSON or as Python prints it; others as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return read if isinstance(read, list | dict) else value


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
    _trl,
    frozenset({"prompt", "completion"}),
)
GEMINI = Dialect(
    "Gemini", "is a Gemini file (contents, parts): each record is read as a chat", _gemini, frozenset({"contents"})
)
