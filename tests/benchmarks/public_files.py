"""Do training files that people have load, and as what they say? Compared with a reader of a few lines.

``python -m tests.benchmarks.public_files FOLDER``: a folder of training files (JSONL, JSON, CSV; from anywhere).
Prints a row a file: how it was read, examples, turns, and whether count and answers are those of the independent
reader, or why the file is refused.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from daunce_api import Dataset
from daunce_api.errors import DaunceError

CHATS = ("messages", "conversations", "conversation", "train_messages")
ANSWERS = ("completion", "output", "response", "answer", "assistant", "target", "query", "sql", "text")


def independent(path: Path) -> list[Any]:
    """The last answer of each record, as plainly as it can be read."""
    raw = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        records: list[Any] = list(csv.DictReader(io.StringIO(raw, newline="")))
    else:
        try:
            value = json.loads(raw)
            records = value if isinstance(value, list) else [value]
        except ValueError:
            records = [json.loads(line) for line in raw.split("\n") if line.strip()]
    if records and all(isinstance(r, dict) and "role" in r for r in records):  # one list of messages
        borders = [i for i, r in enumerate(records) if r["role"] == "system"] or [0]
        records = [records[a:b] for a, b in zip(borders, [*borders[1:], len(records)], strict=True)]
    answers: list[Any] = []
    for record in records:
        chat = record if isinstance(record, list) else next((record[k] for k in CHATS if record.get(k)), None)
        chat = json.loads(chat) if isinstance(chat, str) else chat
        if chat and isinstance(chat[0], list):
            answers += [turns[-1].get("content") for turns in chat]
        elif chat:
            answers.append(chat[-1].get("content") or chat[-1].get("value"))
        else:
            answers.append(next((record[k] for k in ANSWERS if record.get(k) is not None), None))
    return answers


def row(path: Path) -> tuple[str, str]:
    """What came of a file: a word to count, and the words of its row."""
    try:
        data = Dataset.from_file(path)
    except DaunceError as error:
        problems = getattr(error, "problems", ()) or (str(error),)
        return "refused", f"refused | | | {problems[0].replace(path.name, 'FILE')[:200]}"
    turns = Counter(len(e.messages) or 1 for e in data)
    shape = f"{data.dialect} | {len(data):,} | {min(turns)} to {max(turns)}"
    try:
        expected = independent(path)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        return "not compared", f"{shape} | the independent reader fails: {type(error).__name__}"
    given = [(e.messages[-1].content if e.is_chat else e.completion) for e in data]
    if len(given) != len(expected):
        return "differs", f"{shape} | {len(expected):,} by the independent reader"
    wrong = sum(isinstance(a, str) and isinstance(b, str) and a != b for a, b in zip(given, expected, strict=True))
    return ("same" if not wrong else "differs"), f"{shape} | {'the same answers' if not wrong else f'{wrong} differ'}"


def main() -> None:
    """Print the table, and the counts."""
    counts: Counter[str] = Counter()
    print("| file | read as | examples | turns | compared |\n|---|---|---|---|---|")
    for path in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_file()):
        kind, words = row(path)
        counts[kind] += 1
        print(f"| {path.name} | {words} |")
    print(f"\n{sum(counts.values())} files: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))


if __name__ == "__main__":
    main()
