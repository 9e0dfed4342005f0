"""Data sets from JSONL and from records: what is kept, what is refused, and where each problem is said to be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daunce_api.data.dataset import Dataset, Example, Message
from daunce_api.errors import DataError


def chat(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {**fields, "messages": [{"role": r, "content": c} for r, c in turns]}


def write(path: Path, *lines: bytes | str | dict[str, Any]) -> Path:
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def problems_of(*records: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        Dataset.from_records(records)
    return caught.value.problems


GOOD = {"prompt": "2+2=", "completion": "4"}


def test_both_kinds_of_records_are_read_with_their_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        chat(("system", "s"), ("user", "u"), ("assistant", "a"), id="q-1", source="web"),
        "",
        {"prompt": "p", "completion": "c", "id": 7},
    )
    data = Dataset.from_jsonl(path)
    assert data[0] == Example(
        "q-1", messages=(Message("system", "s"), Message("user", "u"), Message("assistant", "a")), source="web"
    )
    assert data[1] == Example("7", prompt="p", completion="c")
    assert [e.line for e in data] == [1, 3]
    assert data.where(1) == "train.jsonl:3"
    assert (data.ids, data.sources, data.warnings) == (["q-1", "7"], ["web", None], ())


def test_every_problem_of_a_file_is_reported_in_one_pass_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        '{"prompt": "a", "completion": "b", "id": "x"}',
        '{"prompt": ',
        {"prompt": "p", "completion": ""},
        b'{"prompt": "\xff", "completion": "c"}',
        chat(("user", "u")),
        {"messages": [{"content": "no role"}, {"role": "assistant", "content": "a"}]},
        "[1]",
        '{"prompt": "a", "completion": "other", "id": "x"}',
        '{"prompt": "a", "prompt": "b", "completion": "c"}',
    )
    with pytest.raises(DataError) as caught:
        Dataset.from_jsonl(path)
    assert caught.value.problems == (
        "bad.jsonl:2: not JSON: Expecting value (column 12); the line ends too early (was it cut, or is a record "
        "spread over several lines?)",
        "bad.jsonl:3: completion is empty: there is no token to learn or to measure",
        "bad.jsonl:4: not UTF-8 (byte 13 of the line); it looks like Windows-1252 (or Latin-1): save the file as UTF-8",
        "bad.jsonl:5: no assistant turn carries the loss (none is there, or all have weight 0)",
        "bad.jsonl:6: messages[0].role is missing",
        "bad.jsonl:7: a record must be a JSON object, not list",
        "bad.jsonl:8: id 'x' is also used by bad.jsonl:1",
        "bad.jsonl:9: key 'prompt' is given twice in one object",
    )
    assert "bad.jsonl has 8 problems; nothing was sent or changed" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("text", "a record must be a JSON object, not str"),
        (None, "a record must be a JSON object, not NoneType"),
        ({}, "needs messages, or prompt and completion, or text"),
        ({"prompt": "p"}, "completion is missing"),
        ({"completion": "c"}, "prompt is missing"),
        ({"prompt": 1, "completion": "c"}, "prompt must be a text"),
        ({**GOOD, "id": ""}, "id is empty"),
        ({**GOOD, "id": True}, "id must be a text or a whole number"),
        ({**GOOD, "id": 1.5}, "id must be a text or a whole number"),
        ({**GOOD, "id": 10**5000}, "id is a number of more than 18 digits; write it as a text"),
        ({**GOOD, "id": "i" * 1001}, "id has 1,001 characters; at most 1,000 are kept"),
        ({**GOOD, "source": "s" * 1001}, "source has 1,001 characters; at most 1,000 are kept"),
        ({**GOOD, "messages": []}, "has both messages and prompt/completion; keep one of them"),
        ({"messages": None}, "messages must be a non-empty list"),
        ({"messages": "hello"}, "messages must be a non-empty list"),
        ({"messages": ["hello"]}, "messages[0] must be an object with role and content"),
        (chat(("user", "u"), ("assistant", "")), "messages[1].content is empty: there is no token to learn"),
        (chat(("wizard", "u"), ("assistant", "a")), "messages[0].role is 'wizard'; it must be one of system"),
        (chat(("assistant", "a"), ("user", "u")), "the last message must be the assistant's"),
        ({"prompt": "\ud800", "completion": "c"}, "prompt holds half of a surrogate pair at character 1"),
        ({**GOOD, "id": "a\udfff"}, "id holds half of a surrogate pair at character 2"),
        (chat(("user", "\udc80"), ("assistant", "a")), "messages[0].content holds half of a surrogate pair"),
        (
            {**chat(("user", "u"), ("assistant", "a")), "chat_template_kwargs": "x"},
            "chat_template_kwargs must be an object",
        ),
    ],
)
def test_what_is_refused_and_in_which_words(record: Any, problem: str) -> None:
    found = problems_of(GOOD, record)
    assert any(p.startswith(f"data:2: {problem}") for p in found), found


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"role": "assistant", "content": "a", "weight": 2},
            ".weight must be 0 or 1: other weights cannot be attributed yet",
        ),
        (
            {"role": "assistant", "content": "a", "weight": True},
            ".weight must be 0 or 1: other weights cannot be attributed yet",
        ),
        (
            {"role": "assistant", "content": "a", "weight": [1]},
            ".weight must be 0 or 1: other weights cannot be attributed yet",
        ),
        ({"role": "user", "content": "a", "weight": 1}, ".weight belongs on assistant turns only"),
        ({"role": "assistant", "content": None}, ".content is missing"),
        ({"role": "user", "content": 5}, ".content must be a text or a list of parts"),
        (
            {"role": "user", "content": [{"type": "input_audio"}]},
            ".content[0] is 'input_audio': a part must be a text "
            '({"type": "text", "text": ...}) or an image; nothing else can be attributed yet',
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            ".tool_calls[0].function must be an object with name and arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            ".tool_calls[0].function.name is missing",
        ),
        (
            {"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]},
            " calls a tool, which only an assistant turn can",
        ),
        ({"role": "assistant", "content": "a", "thinking": 3}, ".thinking must be a text"),
    ],
)
def test_problems_of_one_message(message: dict[str, Any], problem: str) -> None:
    assert problems_of({"messages": [message, {"role": "assistant", "content": "end"}]}) == (
        f"data:1: messages[0]{problem}",
    )


def test_all_problems_of_one_record_are_named() -> None:
    assert len(problems_of({"id": "", "source": "\ud800", "prompt": 2, "completion": ""})) == 4


def test_a_long_wrong_value_does_not_fill_the_message() -> None:
    (problem,) = problems_of(chat(("x" * 1_000_000, "u"), ("assistant", "a")))
    assert len(problem) < 200


def test_no_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: there are no examples"):
        Dataset.from_jsonl(write(tmp_path / "empty.jsonl", "", "  ", "\r"))


def test_an_unreadable_path_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, Path("a\0b")):
        with pytest.raises(DataError, match="cannot be read"):
            Dataset.from_jsonl(path)


# Ids and duplicates


def test_ids_are_hashes_of_the_content_where_none_is_given() -> None:
    data = Dataset.from_records([GOOD, chat(("user", "u"), ("assistant", "a"))])
    canonical = '{"c":"4","p":"2+2="}'
    assert data.ids[0] == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    again = Dataset.from_records([chat(("user", "u"), ("assistant", "a"), source="s"), GOOD])
    assert again.ids == data.ids[::-1]


def test_duplicates_are_warned_of_and_stay_distinct() -> None:
    data = Dataset.from_records([GOOD, {**GOOD, "id": "mine"}, GOOD, GOOD])
    h = data[0].content_hash
    assert data.ids == [h, "mine", f"{h}-2", f"{h}-3"]
    assert data.warnings == (
        "data: 3 of 4 records repeat the content of an earlier one (line 2 as 1, 3 as 1, 4 as 1); all are kept",
    )


def test_a_made_up_id_evades_ids_that_were_given() -> None:
    h = Dataset.from_records([GOOD])[0].id
    data = Dataset.from_records([GOOD, {"prompt": "x", "completion": "y", "id": h}])
    assert data.ids == [f"{h}-2", h]


def test_one_id_twice_is_refused_also_as_number_and_text() -> None:
    assert problems_of({**GOOD, "id": 7}, {**GOOD, "id": "7"}) == ("data:2: id '7' is also used by data:1",)


def test_weight_is_part_of_the_content() -> None:
    plain = Example("a", messages=(Message("user", "u"), Message("assistant", "a")))
    weighted = Example("a", messages=(Message("user", "u"), Message("assistant", "a", 1)))
    assert plain.content_hash != weighted.content_hash


def test_position_finds_ids_and_suggests() -> None:
    data = Dataset.from_records([{**GOOD, "id": "query-17"}])
    assert data.position("query-17") == 0
    with pytest.raises(DataError, match="Did you mean query-17"):
        data.position("query-71")
    with pytest.raises(DataError, match="The first one is 'query-17'"):
        data.position("zzz")


def test_unused_fields_are_named_once_with_a_count() -> None:
    records = [
        {**GOOD, "note": 1},
        {"prompt": "x", "completion": "y", "note": 2, 3: "odd key"},
        {"prompt": "z", "completion": "y", "note": 2, "source": {"file": "a"}},
    ]
    data = Dataset.from_records(records)
    assert data.warnings == (
        "data: field '3' of 1 record (line 2 first) is not used",
        "data: field 'note' of all 3 records is not used",
        "data: field 'source' of 1 record (line 3 first) is not used (it is no single value)",
    )
    assert data.sources == [None, None, None]


def test_a_source_may_be_any_single_value() -> None:
    records = [{"prompt": str(i), "completion": "y", "source": s} for i, s in enumerate([3, True, 0.5, "web", None])]
    assert Dataset.from_records(records).sources == ["3", "True", "0.5", "web", None]


def test_the_digest_changes_with_anything_that_changes_a_run() -> None:
    base = [{**GOOD, "id": "a", "source": "s"}, {"prompt": "x", "completion": "y", "id": "b"}]
    variants = [
        base,
        base[::-1],
        base[:1],
        [{**base[0], "id": "c"}, base[1]],
        [{**base[0], "source": "t"}, base[1]],
        [{**base[0], "completion": "5"}, base[1]],
    ]
    digests = [Dataset.from_records(v).digest for v in variants]
    assert len(set(digests)) == len(variants)
    assert Dataset.from_records(base).digest == digests[0]


# Turns that carry the loss


def turns(*weights: int | None) -> Example:
    messages = [m for w in weights for m in (Message("user", "u"), Message("assistant", "a", w))]  # type: ignore[arg-type]
    return Example("x", messages=tuple(messages))


@pytest.mark.parametrize(
    ("weights", "last", "every"),
    [
        ((None,), (1,), (1,)),
        ((None, None, None), (5,), (1, 3, 5)),
        ((None, 0, None), (5,), (1, 5)),
        ((1, None, None), (1, 5), (1, 3, 5)),
        ((None, None, 0), (3,), (1, 3)),
        ((0, None), (3,), (3,)),
    ],
)
def test_loss_on_last_and_all_with_weights(
    weights: tuple[int | None, ...], last: tuple[int, ...], every: tuple[int, ...]
) -> None:
    example = turns(*weights)
    assert example.trained_turns("last") == last
    assert example.trained_turns("all") == every


def test_what_is_trained_on_is_what_is_measured() -> None:
    """A provider trains on every assistant turn that has no weight 0, so the file spells the choice out."""
    example = turns(None, None, 0)
    assert [m.get("weight") for m in example.training_record("last")["messages"]] == [None, 0, None, None, None, 0]
    for loss_on in ("last", "all"):
        (sent,) = Dataset.from_records([example.training_record(loss_on)])
        assert sent.trained_turns("all") == example.trained_turns(loss_on)


def test_the_shown_answer_is_the_measured_one() -> None:
    example = Example(
        "x",
        messages=(
            Message("user", "q"),
            Message("assistant", "measured"),
            Message("user", "r"),
            Message("assistant", "not", 0),
        ),
    )
    assert (example.prompt_text(), example.completion_text()) == ("q", "measured")


# Hand-made examples


def test_hand_made_examples_are_checked_like_read_ones() -> None:
    with pytest.raises(DataError) as caught:
        Dataset(
            [
                Example("a", prompt="p", completion=""),
                Example("a", prompt="p", completion="c"),
                Example("b", messages=(Message("user", "u"),)),
                Example("", prompt="p", completion="c"),
                Example("c", prompt="p", completion="c", messages=(Message("assistant", "a"),)),
            ]
        )
    assert [p.split(": ")[0] for p in caught.value.problems] == [f"data:{n}" for n in (1, 2, 3, 4, 5)]


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
SOME_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
RECORDS = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "completion": SOME_TEXT}, optional={"id": SOME_TEXT, "source": TEXT}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries(
                    {"role": st.just("assistant"), "content": SOME_TEXT}, optional={"weight": st.just(1)}
                ),
                min_size=1,
                max_size=3,
            )
        },
        optional={"source": TEXT},
    ),
)


@given(st.lists(RECORDS, min_size=1, max_size=5, unique_by=lambda r: r.get("id") or object()))
def test_records_survive_the_way_through_a_file(tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    data = Dataset.from_records(records)
    assert len(data) == len(records) == len(set(data.ids))
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    data.to_jsonl(path)
    again = Dataset.from_jsonl(path)
    assert list(again) == list(data)
    assert again.digest == data.digest


@given(st.lists(RECORDS, min_size=1, max_size=4))
def test_a_training_file_has_one_line_a_record_for_every_reader(records: list[Any]) -> None:
    data = Dataset.from_records([{k: v for k, v in r.items() if k != "id"} for r in records])
    raw = data.training_file(range(len(data)), "last")
    assert raw == data.training_file(range(len(data)), "last")
    lines = raw.decode().splitlines()  # also breaks at U+2028, U+0085 and the like
    assert [json.loads(line) for line in lines] == [e.training_record("last") for e in data]
