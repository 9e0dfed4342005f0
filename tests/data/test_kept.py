"""Data sets of a run folder: read as far as they are looked at, and never other than they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api.data.dataset import Dataset
from daunce_api.data.encoded import EncodedExample
from daunce_api.data.kept import KeptDataset, KeptTokens, keep_dataset, kept_dataset, keys_of
from daunce_api.errors import StoreCorruptError

RECIPE = ["tokenizer", "last"]


def chats() -> Dataset:
    turns = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "2+2?\u2028"},
        {"role": "assistant", "content": "4", "weight": 0},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes \x1b[1m"},
    ]
    records = [{"id": f"c{i}", "source": "s" if i % 2 else None, "messages": turns[i % 2 :]} for i in range(4)]
    return Dataset.from_records([*records, {"id": "p", "prompt": "a\n", "completion": "b"}, {"id": "t", "text": "x y"}])


def tokens_of(data: Dataset) -> tuple[EncodedExample, ...]:
    return tuple(
        EncodedExample(e, (1, 70_000 + i, 3), (1, 2), (1, 4)[: i % 3], ("the system message",) * (i % 2))
        for i, e in enumerate(data)
    )


def written(path: Path, data: Dataset) -> KeptDataset:
    keep_dataset(path, data, tokens_of(data), RECIPE)
    kept = kept_dataset(path, data.digest)
    assert isinstance(kept, KeptDataset)
    return kept


def test_what_is_read_back_is_what_was_kept(tmp_path: Path) -> None:
    data = chats()
    kept = written(tmp_path / "train.jsonl", data)
    tokens = kept.tokens(RECIPE)
    assert isinstance(tokens, KeptTokens)
    assert (len(kept), kept.digest, kept.content_hashes) == (len(data), data.digest, data.content_hashes)
    assert (kept[3], kept[-1], tokens[2], tokens[-1]) == (data[3], data[5], tokens_of(data)[2], tokens_of(data)[-1])
    assert tokens.keys == keys_of(tokens) == [e.key for e in tokens_of(data)]
    assert "_examples" not in kept.__dict__  # single examples are read alone
    assert list(kept) == list(data)
    assert (kept.ids, kept.sources, kept[1:3], kept.position("p")) == (data.ids, data.sources, data[1:3], 4)
    assert (kept.warnings, kept.where(0)) == (data.warnings, "train.jsonl:1")
    assert tuple(tokens) == tokens_of(data)
    assert tokens[1:3] == tokens_of(data)[1:3]
    for wrong in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            kept[wrong]


def test_token_ids_of_another_recipe_are_not_used(tmp_path: Path) -> None:
    path, data = tmp_path / "train.jsonl", chats()
    kept = written(path, data)
    assert kept.tokens(["tokenizer", "all"]) is None
    keep_dataset(path, data, tokens_of(data)[::-1], ["other", "all"])
    again = kept_dataset(path, data.digest)
    assert isinstance(again, KeptDataset)
    assert again.tokens(RECIPE) is None
    assert keys_of(again.tokens(["other", "all"]) or ()) == [e.key for e in tokens_of(data)[::-1]]


def test_a_file_that_is_held_is_not_written_again(tmp_path: Path) -> None:
    path, data = tmp_path / "train.jsonl", chats()
    written(path, data)
    before = [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(tmp_path.iterdir())]
    keep_dataset(path, data, tokens_of(data), RECIPE)
    keep_dataset(path, data)  # tokens that are not known now do not replace those that are kept
    assert [(p.name, p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "of other bytes"])
def test_a_damaged_index_is_not_used(tmp_path: Path, damage: str) -> None:
    path, data = tmp_path / "train.jsonl", chats()
    written(path, data)
    index = path.with_suffix(".index.npz")
    raw = index.read_bytes()
    if damage == "cut":
        index.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        place = raw.index(b"keys") + 200
        index.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    elif damage == "gone":
        index.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"prompt":', b'"prompt": '))
    kept = kept_dataset(path, data.digest)
    assert not isinstance(kept, KeptDataset)
    assert list(kept) == list(data)
    assert isinstance(written(path, data), KeptDataset)  # and it is written anew


def test_an_edited_file_is_refused_whatever_its_index_says(tmp_path: Path) -> None:
    path, data = tmp_path / "train.jsonl", chats()
    written(path, data)
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(StoreCorruptError, match=r"train\.jsonl does not hold the examples"):
        kept_dataset(path, data.digest)
    with pytest.raises(StoreCorruptError):
        kept_dataset(path, "0" * 64)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8)), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]) -> None:
    records = [{"prompt": a, "completion": f"x{b}"} for a, b in texts]
    if any("\ud800" <= c <= "\udfff" for record in records for text in record.values() for c in text):
        return
    data = Dataset.from_records(records)
    folder = tmp_path_factory.mktemp("kept")
    kept = written(folder / "train.jsonl", data)
    assert [kept[i] for i in range(len(kept))] == list(data) == list(written(folder / "train.jsonl", data))


def test_numbers_are_packed_without_a_loss(tmp_path: Path) -> None:
    data = Dataset.from_records([{"prompt": "a", "completion": str(i)} for i in range(3)])
    big = [EncodedExample(e, (-1, 2**40 + i), (1,)) for i, e in enumerate(data)]
    keep_dataset(tmp_path / "d.jsonl", data, big, RECIPE)
    kept = kept_dataset(tmp_path / "d.jsonl", data.digest)
    assert isinstance(kept, KeptDataset)
    assert tuple(kept.tokens(RECIPE) or ()) == tuple(big)
    assert kept._kept["targets"].dtype == np.uint8
