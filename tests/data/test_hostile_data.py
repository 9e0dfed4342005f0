"""Hostile input for the readers: whatever is in a file, the answer is a data set or a DataError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daunce_api.data.dataset import Dataset
from daunce_api.errors import DataError

GOOD = b'{"prompt": "p", "completion": "c"}'


def read(tmp_path: Path, raw: bytes) -> Dataset:
    path = tmp_path / "d.jsonl"
    path.write_bytes(raw)
    return Dataset.from_jsonl(path)


def problem(tmp_path: Path, raw: bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, raw)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"x"], ids=["ended", "unended"])
def test_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path, start: bytes, ending: bytes, last: bytes) -> None:
    raw = start + GOOD + ending + GOOD.replace(b'"c"', b'"d"') + (b"" if last else ending)
    assert [(e.prompt, e.completion, e.line) for e in read(tmp_path, raw)] == [("p", "c", 1), ("p", "d", 2)]


def test_a_byte_order_mark_inside_the_file_is_not_skipped(tmp_path: Path) -> None:
    assert problem(tmp_path, GOOD + b"\n\xef\xbb\xbf" + GOOD).startswith("d.jsonl:2: not JSON")


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf_16_is_said_to_be_that(tmp_path: Path, codec: str) -> None:
    raw = ("\ufeff" if codec != "utf-16" else "").encode(codec) + GOOD.decode().encode(codec)
    assert problem(tmp_path, raw) == "d.jsonl:1: the file is UTF-16, not UTF-8; save it as UTF-8"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "number that is too long"),
        (b'{"prompt": "a\x00", "completion": "c"}', "not JSON: Invalid control character"),
        (b'{"prompt": "\\ud800", "completion": "c"}', "half of a surrogate pair"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "c"}', "not UTF-8"),
        (b'{"id": 0.5, "prompt": "p", "completion": "c"}', "id must be a text or a whole number"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "weight must be 0 or 1"),
        (b"{} {}", "not JSON: Extra data"),
        (b"\x00", "not JSON"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_unusable_lines_are_refused_with_their_place(tmp_path: Path, line: bytes, words: str) -> None:
    found = problem(tmp_path, GOOD + b"\n" + line)
    assert found.startswith("d.jsonl:2: ")
    assert words in found
    assert len(found) < 300


def test_control_characters_escape_sequences_and_long_lines_are_kept_as_they_are(tmp_path: Path) -> None:
    text = "\x00\x1b[31m\u202e<|end|></script>=1+1\u2028" + "x" * 1_000_000
    data = read(tmp_path, json.dumps({"prompt": text, "completion": text}).encode())
    assert (data[0].prompt, data[0].completion) == (text, text)
    assert b"\x1b" not in data.training_file([0], "last")


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["id", "source", "messages", "prompt", "completion", "x"])
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "weight", "tool_calls"]), JSONISH | st.just("assistant")),
    max_size=3,
)
RECORDS = st.dictionaries(KEYS, JSONISH | MESSAGES, max_size=5) | JSONISH


def accepts_or_refuses(make: Any) -> None:
    refusal, data = None, None
    try:
        data = make()
    except DataError as error:
        refusal = error
    if data is None:
        assert refusal is not None
        assert refusal.problems
        assert all(p.split(": ")[0].startswith("d") for p in refusal.problems)
        return
    assert len(data) >= 1
    for e in data:
        assert e.trained_turns("last") or not e.is_chat
        assert e.completion_text()
    assert len(data.training_file(range(len(data)), "all").splitlines()) == len(data)


@given(st.lists(RECORDS, max_size=4))
def test_any_records_are_read_or_refused(records: list[Any]) -> None:
    accepts_or_refuses(lambda: Dataset.from_records(records, name="d"))


@given(st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b"\xef\xbb\xbf\xef\xbb\xbf{}")
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "d.jsonl"
    path.write_bytes(raw)
    accepts_or_refuses(lambda: Dataset.from_jsonl(path))


@given(st.lists(RECORDS, min_size=1, max_size=3), st.data())
def test_any_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], data: st.DataObject
) -> None:
    raw = "\n".join(json.dumps(r) for r in records).encode()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 3)))
    path = tmp_path_factory.mktemp("fuzz") / "d.jsonl"
    path.write_bytes(raw[:start] + data.draw(st.binary(max_size=3)) + raw[stop:])
    accepts_or_refuses(lambda: Dataset.from_jsonl(path))
