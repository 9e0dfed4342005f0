"""A training file without some examples keeps everything else as it was."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api import Dataset
from daunce_api.errors import DataError
from daunce_api.fix import Proposal
from daunce_api.fix.cleaned import write_cleaned
from daunce_api.fix.folder import keep
from daunce_api.fix.near_duplicates import near_duplicates
from daunce_api.fix.proposal import Group

RECORDS: list[dict[str, Any]] = [
    {"prompt": f"question {i}, é", "completion": f'answer "{i}"\nsecond line', "source": "s"} for i in range(5)
]


def _removed(folder: Path, name: str, content: bytes, removed: set[int]) -> bytes:
    path = folder / name
    path.write_bytes(content)
    data = Dataset.from_file(path)
    assert len(data) == 5
    cleaned = write_cleaned(path, data, removed, folder / "fix")
    assert [e.prompt for e in Dataset.from_file(cleaned)] == [
        r["prompt"] for i, r in enumerate(RECORDS) if i not in removed
    ]
    assert cleaned.name.startswith("train.cleaned")
    assert path.read_bytes() == content
    return cleaned.read_bytes()


def _lines(separators: tuple[str, str] = (", ", ": ")) -> list[bytes]:
    return [json.dumps(r, ensure_ascii=False, separators=separators).encode() for r in RECORDS]


@settings(max_examples=30)
@given(
    removed=st.sets(st.integers(0, 4), max_size=4),
    end=st.sampled_from([b"\n", b"\r\n"]),
    blank=st.booleans(),
    last=st.booleans(),
    bom=st.booleans(),
)
def test_lines_of_jsonl_keep_their_bytes(
    tmp_path_factory: pytest.TempPathFactory, removed: set[int], end: bytes, blank: bool, last: bool, bom: bool
) -> None:
    between = end + end if blank else end
    content = between.join(_lines((" ,", "  : "))) + (end if last else b"")
    mark = b"\xef\xbb\xbf" if bom else b""
    cleaned = _removed(tmp_path_factory.mktemp("j"), "train.jsonl", mark + content, removed)
    assert cleaned.startswith(mark)
    kept = [line for i, line in enumerate(_lines((" ,", "  : "))) if i not in removed]
    assert [x for x in cleaned.removeprefix(mark).replace(b"\r\n", b"\n").split(b"\n") if x] == kept
    assert cleaned.endswith(b"\n") == last
    if end == b"\r\n" and len(kept) > 1:
        assert cleaned.count(b"\r\n") == cleaned.count(b"\n")


def test_rows_of_csv_keep_their_bytes_also_over_several_lines(tmp_path: Path) -> None:
    rows = [
        f'"{r["prompt"]}" ,"{r["completion"].replace(chr(34), chr(34) * 2)}"\r\n'.replace(" ,", ",") for r in RECORDS
    ]
    content = "prompt,completion\r\n" + "".join(rows)
    cleaned = _removed(tmp_path, "train.csv", content.encode(), {1, 4})
    assert cleaned.decode() == "prompt,completion\r\n" + rows[0] + rows[2] + rows[3]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=4),
        "\n".join(json.dumps(r, indent=1) for r in RECORDS),
        json.dumps({"version": [3, 1, 0, 0, 0], "data": RECORDS}),
    ],
    ids=["array", "pretty array", "pretty objects", "wrapped"],
)
def test_json_texts_hold_equal_records(tmp_path: Path, content: str) -> None:
    cleaned = _removed(tmp_path, "train.json", content.encode(), {0, 3})
    if content.startswith('{"version"'):
        assert json.loads(cleaned) == {"version": [3, 1, 0, 0, 0], "data": [RECORDS[1], RECORDS[2], RECORDS[4]]}


def test_gzip_stays_gzip(tmp_path: Path) -> None:
    cleaned = _removed(tmp_path, "train.jsonl.gz", gzip.compress(b"\n".join(_lines())), {2})
    assert gzip.decompress(cleaned).split(b"\n") == [line for i, line in enumerate(_lines()) if i != 2]


def test_parquet_holds_equal_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pd.DataFrame(RECORDS).to_parquet(path)
    cleaned = write_cleaned(path, Dataset.from_file(path), {1}, tmp_path / "fix")
    expected = pd.DataFrame([r for i, r in enumerate(RECORDS) if i != 1])
    pd.testing.assert_frame_equal(pd.read_parquet(cleaned), expected)


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(_lines()))
    data = Dataset.from_file(path)
    path.write_bytes(b"\n".join(_lines()[:4]))
    with pytest.raises(DataError, match="has changed since the run: it holds 4 records"):
        write_cleaned(path, data, {1}, tmp_path / "fix")
    assert not (tmp_path / "fix").exists()


def test_a_file_that_cannot_be_cut_by_lines_is_replaced_by_the_runs_own_copy(tmp_path: Path) -> None:
    """CSV whose lines end in a carriage return alone: cut at line feeds it would be written whole."""
    path = tmp_path / "train.csv"
    path.write_bytes(b"prompt,completion\r" + b"".join(f"question {i},answer {i}\r".encode() for i in range(5)))
    data = Dataset.from_file(path)
    data.to_jsonl(tmp_path / "run" / "data" / "train.jsonl")
    source = SimpleNamespace(data=SimpleNamespace(train=path, columns=None))
    run: Any = SimpleNamespace(run_dir=tmp_path / "run", train=data, config=source)
    groups = tuple(Group((i,), 1.0, 0.1, 0.01) for i in (1, 3))
    attribution: Any = SimpleNamespace(train=data, members=(0, 1))
    folder = keep(run, Proposal(attribution, ("q",), (), groups, groups, (), "a test"))
    assert folder is not None
    assert [e.prompt for e in Dataset.from_file(folder / "train.cleaned.jsonl")] == [f"question {i}" for i in (0, 2, 4)]
    assert not list(folder.glob("*.csv"))
    assert json.loads((folder / "fix.json").read_text())["cleaned"] == "train.cleaned.jsonl"


def test_near_duplicates_are_linked_and_others_are_not() -> None:
    base = "the refund has to be asked for within thirty days of the day on which the goods have arrived at your door"
    texts = [
        base,
        "how do I wax my skis before the season begins in the mountains",
        base.upper() + "!",
        base.replace("thirty", "sixty"),
        "no",
        "No ",
        "yes",
    ]
    groups = near_duplicates(texts)
    assert groups[0] == groups[2] == groups[3]
    assert groups[4] == groups[5]
    assert len(set(groups)) == 4


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=3, max_size=8), min_size=2, max_size=8))
def test_no_pair_above_the_limit_is_missed(words: list[list[str]]) -> None:
    """Against all pairs, joined by hand."""
    texts = [" ".join(w) for w in words]
    grams = [{tuple(w[k : k + 3]) for k in range(len(w) - 2)} for w in words]
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(grams[i] & grams[j]) >= 0.7 * len(grams[i] | grams[j]):
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    found = near_duplicates(texts)
    assert [[a == b for b in found] for a in found] == [[a == b for b in group] for a in group]
