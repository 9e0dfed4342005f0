"""Data files in the dialects and formats that people have."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from daunce_api.data.dataset import Dataset
from daunce_api.errors import DataError

TOWNS = ["Bern", "Oslo", "Lima"]


def chat(town: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Is it warm in {town}?"},
            {"role": "assistant", "content": f"In {town} it is mild."},
        ]
    }


CHATS = [chat(town) for town in TOWNS]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def turns(data: Dataset) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.text) for m in e.messages] for e in data]


EXPECTED = turns(Dataset.from_records(CHATS))

DIALECTS: dict[str, tuple[list[Any], str]] = {
    "question and answer": (
        [{"question": f"Is it warm in {t}?", "answer": f"In {t} it is mild."} for t in TOWNS],
        "has columns question and answer",
    ),
    "Alpaca": (
        [{"instruction": f"Is it warm in {t}?", "input": "", "output": f"In {t} it is mild."} for t in TOWNS],
        "is an Alpaca file",
    ),
    "ShareGPT": (
        [
            {
                "conversations": [
                    {"from": "human", "value": f"Is it warm in {t}?"},
                    {"from": "gpt", "value": f"In {t} it is mild."},
                ]
            }
            for t in TOWNS
        ],
        "is a ShareGPT file",
    ),
    "TRL": (
        [{"prompt": c["messages"][:1], "completion": c["messages"][1:]} for c in CHATS],
        "has prompt and completion as lists of messages",
    ),
    "H4": (
        [{"prompt": c["messages"][0]["content"], "prompt_id": str(i), **c} for i, c in enumerate(CHATS)],
        "has prompt or completion beside messages",
    ),
    "JSON text in a column": ([{"messages": json.dumps(c["messages"])} for c in CHATS], "as JSON text in one column"),
    "Python text in a column": ([{"messages": str(c["messages"])} for c in CHATS], "as JSON text in one column"),
    "null columns": ([{**c, "prompt": None, "completion": None, "text": None, "id": None} for c in CHATS], ""),
    "null fields": (
        [{"messages": [{**m, "tool_calls": None, "name": None} for m in c["messages"]]} for c in CHATS],
        "",
    ),
    "Gemini": (
        [
            {
                "contents": [
                    {"role": "user", "parts": [{"text": f"Is it warm in {t}?"}]},
                    {"role": "model", "parts": [{"text": f"In {t} it is mild."}]},
                ]
            }
            for t in TOWNS
        ],
        "is a Gemini file",
    ),
    "a column of another name": (
        [{"query": "q", "train_messages": c["messages"]} for c in CHATS],
        "is a ShareGPT file (train_messages)",
    ),
    "text beside an answer": (
        [{"text": f"Is it warm in {t}?", "answer": f"In {t} it is mild."} for t in TOWNS],
        "has columns text and answer",
    ),
    "lists of messages": ([c["messages"] for c in CHATS], ""),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_read_and_said_in_one_sentence(tmp_path: Path, name: str) -> None:
    records, sentence = DIALECTS[name]
    data = Dataset.from_file(jsonl(tmp_path / "d.jsonl", records))
    assert turns(data) == EXPECTED
    assert [w for w in data.warnings if sentence and sentence in w] == list(data.warnings[:1] if sentence else ())
    assert all(e.trained_turns("all") == (1,) for e in data)
    again = tmp_path / "again.jsonl"
    data.to_jsonl(again)
    assert Dataset.from_jsonl(again).digest == data.digest


def test_a_system_prompt_an_input_and_a_history_are_kept() -> None:
    (alpaca,) = Dataset.from_records(
        [{"system": "S", "instruction": "I", "input": "N", "output": "O", "history": [["q", "a"]], "id": 3}]
    )
    assert [(m.role, m.text) for m in alpaca.messages] == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "I\n\nN"),
        ("assistant", "O"),
    ]
    assert alpaca.id == "3"
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (shared,) = Dataset.from_records([{"system": "S", "conversations": talk}])
    assert [(m.role, m.text) for m in shared.messages] == [("system", "S"), ("user", "q"), ("assistant", "a")]
    bedrock = [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}]
    (nova,) = Dataset.from_records([{"system": [{"text": "S"}], "messages": bedrock}])
    assert [(m.role, m.text) for m in nova.messages] == [("system", "S"), ("user", "q"), ("assistant", "a")]


def test_answers_that_are_no_texts_are_written_as_json() -> None:
    records = [{"question": "a?", "answer": 4}, {"question": "b?", "answer": {"town": "Zürich"}}]
    data = Dataset.from_records(records)
    assert [e.completion_text() for e in data] == ["4", '{"town": "Zürich"}']
    assert "what is no text as JSON" in data.warnings[0]


def test_calls_of_sharegpt_are_calls() -> None:
    talk = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "20"},
        {"from": "gpt", "value": "a"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (example,) = Dataset.from_records([{"conversations": talk, "tools": json.dumps(tools)}])
    assert [m.role for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1].calls == [{"name": "f", "arguments": {"x": 1}}]
    assert example.tools == tools


def test_of_trls_lists_the_completion_carries_the_loss() -> None:
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (example,) = Dataset.from_records([{"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}])
    assert example.trained_turns("all") == (3,)
    assert example.training_record("all")["messages"][1] == {"role": "assistant", "content": "b", "weight": 0}


def test_texts_are_all_completion_and_a_mark_says_where_an_answer_starts() -> None:
    data = Dataset.from_records([{"text": "All of it."}, {"text": "Q: warm?\nA:<|answer|> mild"}])
    assert [(e.prompt, e.completion, e.text_only) for e in data] == [
        ("", "All of it.", True),
        ("Q: warm?\nA:", " mild", False),
    ]
    assert data[0].training_record("all") == {"text": "All of it."}
    assert "every token carries the loss" in data.warnings[0]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"user": "q", "assistant": "a"}, ([("user", "ask"), ("assistant", "say")], "", "")),
        (
            {"user": "q", "assistant": "a", "system": "s"},
            ([("system", "sys"), ("user", "ask"), ("assistant", "say")], "", ""),
        ),
        ({"prompt": "q", "completion": "a"}, ([], "ask", "say")),
        ({"text": "a"}, ([], "", "say")),
    ],
)
def test_columns_can_be_named(tmp_path: Path, columns: dict[str, str], expected: Any) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"q": "ask", "a": "say", "s": "sys", "n": 7, "w": "web"}])
    data = Dataset.from_file(path, {**columns, "id": "n", "source": "w"})
    example = data[0]
    assert ([(m.role, m.text) for m in example.messages], example.prompt, example.completion) == expected
    assert (example.id, example.source) == ("7", "web")
    assert f"is read by data.columns ({', '.join(f'{k}: {v}' for k, v in columns.items())}" in data.warnings[0]


def test_columns_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"q": "ask", "a": "say"}])
    with pytest.raises(DataError, match=r"data\.columns names answer; the columns are a, q"):
        Dataset.from_file(path, {"user": "q", "assistant": "answer"})
    own = jsonl(tmp_path / "own.jsonl", CHATS)
    assert turns(Dataset.from_file(own, {"user": "q", "assistant": "a"})) == EXPECTED, "the run's other file"


def flat(chats: int, *, system: bool) -> list[dict[str, str]]:
    said = [(r, f"{r} {n}") for n in range(chats) for r in ("system", "user", "assistant") if system or r != "system"]
    return [{"role": role, "content": content} for role, content in said]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("lines", [False, True])
def test_a_list_of_messages_is_split_where_system_messages_start_chats(
    tmp_path: Path, indent: int | None, lines: bool
) -> None:
    path = tmp_path / "d.json"
    path.write_text(
        "\n".join(map(json.dumps, flat(5, system=True))) if lines else json.dumps(flat(5, system=True), indent=indent)
    )
    data = Dataset.from_file(path)
    assert [[m.role for m in e.messages] for e in data] == [["system", "user", "assistant"]] * 5
    assert [e.completion_text() for e in data] == [f"assistant {n}" for n in range(5)]
    assert data.warnings[0] == "d.json is one list of messages, read as 5 chats: each system message starts one"


def test_a_list_of_messages_without_a_border_is_one_chat_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(flat(3, system=False), indent=1))
    data = Dataset.from_file(path)
    assert [len(e.messages) for e in data] == [6]
    assert "is read as one chat; where it holds several, write" in data.warnings[0]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps(flat(2, system=True)) for _ in range(2)))
    assert [len(e.messages) for e in Dataset.from_file(chats)] == [6, 6], "one chat a line is what the file says"


def test_several_chats_in_a_record_are_as_many_examples() -> None:
    tools = [{"name": "look_up", "parameters": {}}]
    chats = [flat(1, system=True), flat(2, system=False)]
    data = Dataset.from_records([{"id": "a", "functions": tools, "train_messages": chats}, {"id": "b", "turns": chats}])
    assert data.ids == ["a-1", "a-2", "b-1", "b-2"]
    assert [len(e.messages) for e in data] == [3, 4, 3, 4]
    assert data[1].tools == [{"type": "function", "function": tools[0]}]
    assert not data[2].tools
    assert "holds several chats in each record" in data.warnings[0]


def test_unknown_columns_are_refused_with_the_line_to_write() -> None:
    rows = [
        {"index": n, "repo": "r", "lines": f"{n}.5", "code": f"def f{n}(): ...", "des": f"Does {n}."} for n in range(5)
    ]
    with pytest.raises(DataError, match=r"data\.columns: \{user: code, assistant: des\}$"):
        Dataset.from_records(rows)


def test_a_table_without_names_of_columns_is_refused_with_the_line_to_add(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("Can I return my opened skis?,No returns ever.\nDo you rent tents?,Yes by the day.\n")
    with pytest.raises(DataError, match="Put a line with names above it, such as prompt,completion"):
        Dataset.from_file(path)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference data"),
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "preference data"),
        ({**CHATS[0], "rejected_response": "r"}, "preference data"),
        ({"prompt": "p", "completion": "c", "label": True}, "preference data"),
        ({"messages": CHATS[0]["messages"][:1], "reference_answer": "mild"}, "reinforcement data"),
        ({"a": "x", "b": "y"}, r"its columns \(a, b\) are those of no data set that is known"),
    ],
)
def test_what_cannot_be_attributed_is_refused_by_its_name(record: dict[str, Any], name: str) -> None:
    with pytest.raises(DataError, match=name):
        Dataset.from_records([record] * 3)


# Files


def csv_text(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


PAIRS = DIALECTS["question and answer"][0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(CHATS)),
        ("pretty.json", json.dumps(CHATS, indent=2)),
        ("array.jsonl", json.dumps(CHATS)),
        ("pretty.jsonl", "\n".join(json.dumps(c, indent=2) for c in CHATS)),
        ("wrapped.json", json.dumps({"data": CHATS})),
        ("bom.jsonl", "\ufeff" + "\r\n".join(json.dumps(c) for c in CHATS) + "\r\n\r\n"),
        ("table.csv", csv_text(PAIRS)),
        ("semicolons.csv", csv_text(PAIRS, ";")),
        ("table.tsv", csv_text(PAIRS, "\t")),
        ("cells.csv", csv_text([{"messages": json.dumps(c["messages"])} for c in CHATS])),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_read(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    raw = content.encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert turns(Dataset.from_file(path)) == EXPECTED


def test_parquet_and_saved_data_sets_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(CHATS)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert turns(Dataset.from_file(tmp_path / "d.parquet")) == EXPECTED
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    pyarrow.parquet.write_table(table.slice(0, 2), hub / "train-00000-of-00002.parquet")
    pyarrow.parquet.write_table(table.slice(2), hub / "train-00001-of-00002.parquet")
    assert turns(Dataset.from_file(tmp_path / "hub")) == EXPECTED
    pyarrow.parquet.write_table(table, hub / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"holds several files \(.*\); give one of them"):
        Dataset.from_file(tmp_path / "hub")
    saved = tmp_path / "saved"
    saved.mkdir()
    with (
        pyarrow.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert turns(Dataset.from_file(saved)) == EXPECTED


def test_a_folder_of_splits_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder without data files"):
        Dataset.from_file(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"holds several splits \(train\); give the folder of one"):
        Dataset.from_file(tmp_path)


@pytest.mark.parametrize("raw", [b"\x1f\x8bnot gzip", b"PAR1 not parquet"])
def test_damaged_files_are_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        Dataset.from_file(path)


def test_lines_of_arrays_and_tables_are_those_of_the_file(tmp_path: Path) -> None:
    bad = [*CHATS, {"messages": []}]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(bad, indent=1))
    with pytest.raises(DataError) as caught:
        Dataset.from_file(path)
    (problem,) = caught.value.problems
    line = next(n for n, text in enumerate(path.read_text().split("\n"), 1) if '"messages": []' in text) - 1
    assert problem == f"d.json:{line}: messages must be a non-empty list"
    table = tmp_path / "d.csv"
    table.write_text('question,answer\n"two\nlines",yes\nmissing,\n')
    with pytest.raises(DataError, match=r"d\.csv:4: messages\[1\]\.content is missing"):
        Dataset.from_file(table)


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ([json.dumps(c) + "," for c in CHATS], "a comma follows the object: take it out"),
        ([json.dumps(c)[:-1] + ",}" for c in CHATS], "a comma stands before a closing bracket"),
        ([str(c) for c in CHATS], "single quotes, as Python prints them: write it with json.dumps"),
        ([json.dumps(c) for c in CHATS[:2]] + [json.dumps(CHATS[2]) * 2], "one line must hold one object only"),
        (['{"prompt": "a\tb", "completion": "c"}'] * 3, r"a tab or line break stands inside a text"),
        ([json.dumps(c)[:40] for c in CHATS], "the line ends too early"),
    ],
)
def test_broken_json_is_named_with_its_likely_cause(tmp_path: Path, lines: list[str], hint: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        Dataset.from_file(path)
    assert re.match(r"d\.jsonl:[13]: not JSON: ", caught.value.problems[0])
    assert hint in caught.value.problems[0]


def test_windows_1252_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"prompt": "Zürich", "completion": "c"}\n'.encode("cp1252") * 9)
    with pytest.raises(DataError) as caught:
        Dataset.from_file(path)
    (problem,) = caught.value.problems
    assert "looks like Windows-1252" in problem
    assert "(all 9 records: lines 1, 2, 3, 4, 5, ...)" in problem


def test_a_problem_that_many_records_share_is_one_line_and_others_keep_theirs() -> None:
    records = [{"messages": [{"role": "user", "content": "a"}]} for _ in range(4000)]
    records[7] = {"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError) as caught:
        Dataset.from_records(records)
    assert len(caught.value.problems) == 2
    assert "no assistant turn carries the loss" in caught.value.problems[0]
    assert "(3,999 records: lines 1, 2, 3, 4, 5, ...)" in caught.value.problems[0]
    assert caught.value.problems[1].startswith("data:8: messages[0].role is 'wizard'")


def test_many_equal_records_take_linear_time() -> None:
    records = [{"prompt": "p", "completion": "c"}] * 2_000

    def steps(n: int) -> int:
        counted = 0

        def count(*_: Any) -> Any:  # every line of every function, and every round of a comprehension
            nonlocal counted
            counted += 1
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            dataset = Dataset.from_records(records[:n])
        finally:
            sys.settrace(before)
        assert len(set(dataset.ids)) == n
        return counted

    steps(10)
    assert steps(2_000) < 9 * steps(250)


# Whole messages


def test_what_a_record_says_is_what_a_trainer_gets(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    record = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Use"}, {"type": "text", "text": " tools."}]},
            {"role": "user", "content": "q", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "20", "tool_call_id": "c1"},
            {"role": "assistant", "content": "a", "reasoning_content": "since", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "strict": True}}],
        "parallel_tool_calls": False,
    }
    data = Dataset.from_file(jsonl(tmp_path / "d.jsonl", [{**record, "id": "x", "source": "s", "note": 1}]))
    assert json.loads(data.training_file([0], "all")) == record
    data.to_jsonl(tmp_path / "kept.jsonl")
    kept = Dataset.from_jsonl(tmp_path / "kept.jsonl")
    assert kept[0] == data[0]
    assert kept.digest == data.digest
    assert data[0].messages[2].text == "f(x=1)"
    assert data[0].prompt_text() == "Use tools.\nq\nf(x=1)\n20"
    assert data[0].completion_text() == "since\na"
    other = Dataset.from_records([{**record, "tools": [{"type": "function", "function": {"name": "g"}}]}])
    assert other[0].content_hash != data[0].content_hash


def test_ids_of_plain_records_are_those_of_earlier_versions() -> None:
    """Runs of version 0.1 know their examples by them."""
    data = Dataset.from_records([CHATS[0], {"prompt": "2+2=", "completion": "4"}])
    assert data.ids == ["ab192b449b5bd743", "72211d71de45770d"]
    assert data.digest == "851694c7ba2250dd433052a60ef3dfe6ac39161b08b0272561dd428a7ec97ef5"
