"""Batches of questions: added, taken out, brought back, and never lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daunce_api.data.dataset import Dataset
from daunce_api.data.questions import Questions
from daunce_api.errors import DataError, StoreCorruptError


def questions(*names: str, answer: str = "y") -> Dataset:
    return Dataset.from_records([{"id": n, "prompt": n, "completion": answer} for n in names], name="test.jsonl")


def names(asked: Questions) -> list[str]:
    return [batch.name for batch in asked]


def test_lines_that_are_added_to_the_file_are_a_batch_of_their_own() -> None:
    first = Questions.of(questions("a", "b"))
    assert first.from_file(questions("a", "b")) == first
    assert first.shown is first.batches[0].examples
    more = first.from_file(questions("b", "c", "a"))
    assert (names(more), more.shown.ids) == (["test", "test-2"], ["a", "b", "c"])
    assert names(more.from_file(questions("a", "b", "c", "d"))) == ["test", "test-2", "test-3"]


def test_lines_that_are_gone_leave_the_tables_and_come_back() -> None:
    first = Questions.of(questions("a", "b"))
    less = first.from_file(questions("b"))
    assert less.shown.ids == ["b"]
    assert less.from_file(questions("a", "b")).shown.ids == ["a", "b"]
    assert names(less.from_file(questions("a", "b"))) == ["test"]


def test_a_line_that_was_edited_is_another_question() -> None:
    edited = Questions.of(questions("a", "b")).from_file(questions("a", "b", answer="z"))
    assert names(edited) == ["test", "test-2"]
    assert [e.completion for e in edited.shown] == ["z", "z"]
    assert edited.from_file(questions("a", "b")).shown[0].completion == "y"


def test_asked_questions_stay_whatever_the_file_says() -> None:
    asked = Questions.of(questions("a")).asked(questions("q"))
    assert (names(asked), asked.shown.ids) == (["test", "ask-1"], ["a", "q"])
    assert asked.from_file(questions("b")).shown.ids == ["q", "b"]
    assert asked.asked(questions("q", "a")) == asked
    assert names(asked.asked(questions("r"))) == ["test", "ask-1", "ask-2"]
    assert [batch.name for batch in asked] == ["test", "ask-1"]


def test_what_was_removed_is_shown_when_it_is_asked_again() -> None:
    asked = Questions.of(questions("a")).asked(questions("q", "r"))
    less = asked.without(["a", "q"])
    assert less.shown.ids == ["r"]
    assert less.from_file(questions("a")).shown.ids == ["r"]  # the file does not bring it back
    assert less.asked(questions("q")).shown.ids == ["q", "r"]
    with pytest.raises(DataError, match="has no example 'q'"):
        less.without(["q"])


def test_an_id_of_another_question_is_refused() -> None:
    with pytest.raises(DataError, match="other questions of these ids: a"):
        Questions.of(questions("a")).asked(questions("a", answer="z"))


def test_verdicts_are_kept_and_taken_back() -> None:
    marked = Questions.of(questions("a", "b")).marked(["a"], "unwanted").marked(["b"], "wanted")
    assert marked.verdicts == {"a": "unwanted", "b": "wanted"}
    assert marked.asked(questions("q")).from_file(questions("a")).verdicts == marked.verdicts
    assert marked.marked(["a"], None).verdicts == {"b": "wanted"}
    with pytest.raises(DataError):
        marked.marked(["z"], "wanted")


def test_a_run_folder_gives_back_what_was_asked(tmp_path: Path) -> None:
    asked = Questions.of(questions("a", "b")).asked(questions("q")).without(["a"]).marked(["q"], "unwanted")
    asked.write(tmp_path)
    value = json.loads(json.dumps(asked.to_value()))
    first = asked.batches[0].examples.digest
    assert Questions.read(tmp_path, value, first).to_value() == asked.to_value()
    (tmp_path / "ask-1.jsonl").write_text('{"id": "q", "prompt": "q", "completion": "other"}\n')
    with pytest.raises(StoreCorruptError, match=r"ask-1\.jsonl does not hold"):
        Questions.read(tmp_path, value, first)
    asked.write(tmp_path)
    assert Questions.read(tmp_path, value, first).to_value() == asked.to_value()


def test_a_folder_of_an_earlier_version_has_one_batch(tmp_path: Path) -> None:
    old = questions("a", "b")
    old.to_jsonl(tmp_path / "test.jsonl")
    assert Questions.read(tmp_path, None, old.digest).to_value() == Questions.of(old).to_value()


def test_verdicts_of_a_file_are_taken_where_nobody_said_otherwise() -> None:
    records = [
        {"id": "a", "prompt": "x", "completion": "y", "verdict": "unwanted"},
        {"id": "b", "prompt": "z", "completion": "y", "verdict": "wanted"},
        {"id": "c", "prompt": "w", "completion": "y", "verdict": None},
    ]
    data = Dataset.from_records(records)
    assert not data.warnings
    questions = Questions.of(data)
    assert questions.verdicts == {"a": "unwanted", "b": "wanted"}
    changed = questions.marked(["a"], "wanted").from_file(data)
    assert changed.verdicts == {"a": "wanted", "b": "wanted"}
    asked = questions.asked(Dataset.from_records([{**records[0], "id": "d", "prompt": "new"}]))
    assert asked.verdicts["d"] == "unwanted"
    with pytest.raises(DataError, match="verdict must be wanted or unwanted"):
        Dataset.from_records([{**records[0], "verdict": "bad"}])


def test_a_question_that_was_asked_before_may_be_in_the_file() -> None:
    asked = Questions.of(questions("a")).asked(questions("b"))
    both = asked.from_file(questions("a", "b", "c"))
    assert (names(both), both.shown.ids) == (["test", "ask-1", "test-2"], ["a", "b", "c"])
    with pytest.raises(DataError, match="other questions of these ids: b"):
        asked.from_file(Dataset.from_records([{"id": "b", "prompt": "b", "completion": "another"}]))
