"""Data sets from pandas and from Hugging Face ``datasets``."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest

from daunce_api.data.dataset import Dataset, Example, Message
from daunce_api.errors import DataError

CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
MESSAGES = (Message("user", "u"), Message("assistant", "a"))


def test_a_frame_of_prompts_is_read_row_by_row() -> None:
    frame = pd.DataFrame({"prompt": ["p", "q"], "completion": ["c", "d"], "source": ["s", None]})
    data = Dataset.from_pandas(frame)
    assert [(e.prompt, e.completion, e.source, e.line) for e in data] == [("p", "c", "s", 1), ("q", "d", None, 2)]
    assert data.warnings == ()


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT])
def test_missing_ids_and_sources_count_as_not_given(missing: Any) -> None:
    column = pd.Series(["a", missing], dtype=object)
    data = Dataset.from_pandas(
        pd.DataFrame({"id": column, "source": column, "prompt": ["p", "p"], "completion": ["c", "c"]})
    )
    assert data.ids == ["a", data[1].content_hash]
    assert data.sources == ["a", None]


@pytest.mark.parametrize("dtype", ["float64", "Int64", "object"])
def test_whole_number_ids_with_holes_stay_whole_numbers(dtype: str) -> None:
    ids = pd.Series([1, None, 3], dtype=dtype)
    data = Dataset.from_pandas(pd.DataFrame({"id": ids, "prompt": list("pqr"), "completion": list("cde")}))
    assert data.ids == ["1", data[1].content_hash, "3"]


def test_a_missing_completion_is_a_problem_of_its_row() -> None:
    frame = pd.DataFrame({"prompt": ["p", "q"], "completion": ["c", float("nan")]})
    with pytest.raises(DataError) as caught:
        Dataset.from_pandas(frame)
    assert caught.value.problems == ("DataFrame:2: completion is missing",)


def test_chats_and_prompts_may_be_mixed_in_one_frame() -> None:
    frame = pd.DataFrame({"messages": [CHAT, None], "prompt": [None, "p"], "completion": [None, "c"]})
    data = Dataset.from_pandas(frame)
    assert data[0].messages == MESSAGES
    assert (data[1].prompt, data[1].completion) == ("p", "c")


@pytest.mark.parametrize(
    "messages",
    [
        np.array(CHAT, dtype=object),
        tuple(CHAT),
        {"role": ["user", "assistant"], "content": ["u", "a"]},
        {
            "role": np.array(["user", "assistant"]),
            "content": np.array(["u", "a"]),
            "weight": np.array([np.nan, np.nan]),
        },
        [{**m, "weight": float("nan"), "tool_calls": None} for m in CHAT],
    ],
    ids=["array", "tuple", "struct of lists", "struct of arrays", "missing weights"],
)
def test_every_way_to_store_a_list_of_messages(messages: Any) -> None:
    data = Dataset.from_pandas(pd.DataFrame({"messages": pd.Series([messages], dtype=object)}))
    assert data[0].messages == MESSAGES


def test_weights_that_a_table_turned_into_floats_are_weights_again() -> None:
    messages = {"role": ["assistant", "user", "assistant"], "content": ["a", "b", "c"], "weight": [0.0, np.nan, 1.0]}
    data = Dataset.from_pandas(pd.DataFrame({"messages": [messages]}))
    weights = [m.weight for m in data[0].messages]
    assert weights == [0, None, 1]
    assert [type(w) for w in weights] == [int, type(None), int]


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match="messages must be a non-empty list"):
        Dataset.from_pandas(pd.DataFrame({"messages": [{"role": ["user", "assistant"], "content": ["u"]}]}))


def test_columns_that_nothing_reads_are_named() -> None:
    frame = pd.DataFrame({"prompt": ["p"], "completion": ["c"], "topic": ["t"], 5: [1]})
    assert Dataset.from_pandas(frame, name="f").warnings == (
        "f: field '5' of 1 record is not used",
        "f: field 'topic' of 1 record is not used",
    )


def test_a_column_twice_is_refused() -> None:
    frame = pd.DataFrame([["p", "q", "c"]], columns=["prompt", "prompt", "completion"])
    with pytest.raises(DataError, match="more than one column prompt"):
        Dataset.from_pandas(frame)


def test_a_frame_and_the_file_it_came_from_are_the_same_data() -> None:
    raw = '{"id":"a","prompt":"p","completion":"c"}\n{"id":"b","prompt":"q","completion":"d"}\n'
    frame = pd.read_json(io.StringIO(raw), lines=True)
    records = [{"id": "a", "prompt": "p", "completion": "c"}, {"id": "b", "prompt": "q", "completion": "d"}]
    assert Dataset.from_pandas(frame).digest == Dataset.from_records(records).digest


def test_parquet_keeps_chats(tmp_path: Any) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "d.parquet"
    pd.DataFrame({"messages": [CHAT], "id": ["x"]}).to_parquet(path)
    assert list(Dataset.from_pandas(pd.read_parquet(path))) == [Example("x", messages=MESSAGES)]


def test_deeply_nested_cells_are_refused_not_followed() -> None:
    nested: Any = "x"
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(DataError):
        Dataset.from_pandas(pd.DataFrame({"messages": pd.Series([nested], dtype=object)}))


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("datasets")

    def test_list_of_structs(self) -> None:
        import datasets

        table = datasets.Dataset.from_list(
            [{"messages": CHAT, "id": "a", "topic": 1}, {"messages": [*CHAT, *CHAT], "id": None, "topic": 2}]
        )
        data = Dataset.from_huggingface(table, name="hf")
        assert data[0] == Example("a", messages=MESSAGES)
        assert data[1].messages == MESSAGES + MESSAGES
        assert data[1].id == data[1].content_hash
        assert data.warnings == ("hf: field 'topic' of all 2 records is not used",)

    def test_struct_of_lists(self) -> None:
        import datasets

        columns = {"role": datasets.Value("string"), "content": datasets.Value("string")}
        kind = datasets.Features({"messages": {k: datasets.List(v) for k, v in columns.items()}})
        rows = [{"messages": {"role": ["user", "assistant"], "content": ["u", "a"]}}]
        data = Dataset.from_huggingface(datasets.Dataset.from_list(rows, features=kind))
        assert data[0].messages == MESSAGES

    def test_prompts_streams_and_splits(self) -> None:
        import datasets

        table = datasets.Dataset.from_dict({"prompt": ["p"], "completion": ["c"], "source": [None]})
        expected = [Example(Dataset.from_huggingface(table)[0].content_hash, prompt="p", completion="c")]
        assert list(Dataset.from_huggingface(table)) == expected
        assert list(Dataset.from_huggingface(table.to_iterable_dataset())) == expected
        with pytest.raises(DataError, match=r"dictionary of splits \(train\); pass one"):
            Dataset.from_huggingface(datasets.DatasetDict({"train": table}))
