"""Scores written for other tools: what they read is what we computed, whatever its size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Attribution, Dataset, core
from daunce_api.attribution.score_files import load_bergson, write_scores
from daunce_api.errors import ConfigurationError, DataError, MissingExtraError, StoreError

SCORE = np.random.default_rng(0).normal(size=(6, 3))
TRAIN, TEST = [f"t{i}" for i in range(6)], ["a", "b", "c"]
Load = Callable[[Path], Any]


def side(n: int, name: str) -> Dataset:
    return Dataset.from_records([{"id": f"{name}{i}", "prompt": "p", "completion": "c"} for i in range(n)], name=name)


@pytest.fixture
def attribution() -> Attribution:
    rng = np.random.default_rng(3)
    losses = rng.normal(2, 0.1, (9, 7)), rng.normal(2, 0.1, (9, 4))
    return Attribution(side(7, "t"), side(4, "q"), tuple(range(9)), *losses, rng.random((9, 7)) < 0.5, "covariance")


def pairs(path: Path) -> Any:
    pq = pytest.importorskip("pyarrow.parquet")
    return pq.read_table(path)


def wide(path: Path) -> Any:
    table = pairs(path).to_pandas()
    return table.pivot(index="train_id", columns="test_id", values="score").to_numpy()


FORMS: dict[str, Load] = {"npy": np.load, "parquet": wide, "bergson": load_bergson}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs_a_block", [1, 12, 1_000])
def test_what_is_exported_is_what_is_computed(
    attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, pairs_a_block: int
) -> None:
    monkeypatch.setattr("daunce_api.attribution.measurements._BLOCK_PAIRS", pairs_a_block)
    path = attribution.export(tmp_path / "new" / "scores", form)
    expected = core.scores(attribution.train_loss_KN, attribution.test_loss_KM, None, "covariance")
    np.testing.assert_allclose(FORMS[form](path), expected, rtol=1e-12)
    np.testing.assert_allclose(attribution.scores_NM(), expected, rtol=1e-12)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_precision_is_kept(tmp_path: Path, form: str, dtype: type) -> None:
    score = SCORE.astype(dtype)
    back = FORMS[form](write_scores(tmp_path / "s", form, [score[:4], score[4:]], TRAIN, TEST))
    assert back.dtype == dtype
    assert np.array_equal(back, score)


def test_parquet_has_one_row_a_pair(tmp_path: Path) -> None:
    table = pairs(write_scores(tmp_path / "s", "parquet", [SCORE[:4], SCORE[4:]], TRAIN, TEST))
    assert table.column_names == ["train_id", "test_id", "score"]
    assert table["train_id"].to_pylist() == [i for i in TRAIN for _ in TEST]
    assert table["test_id"].to_pylist() == TEST * 6
    assert table.schema.metadata[b"sign"] == b"positive = helpful"


def test_pairs_without_a_score_are_null_in_parquet(tmp_path: Path) -> None:
    score = SCORE.copy()
    score[2, 1] = np.nan
    table = pairs(write_scores(tmp_path / "s", "parquet", [score], TRAIN, TEST))
    assert table["score"].null_count == 1
    assert table["score"][7].as_py() is None


@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_written_as_they_come(tmp_path: Path, form: str) -> None:
    """No writer asks for the next block while it holds more than two: memory does not grow with N."""
    alive: list[int] = []

    class Block(np.ndarray[Any, Any]):
        def __del__(self) -> None:
            if getattr(self, "counted", False):
                alive.pop()

    def blocks() -> Iterator[Any]:
        for _ in range(40):
            block = SCORE[:2].copy().view(Block)
            block.counted = True
            alive.append(1)
            assert len(alive) <= 3
            yield block
            del block

    ids = [f"t{i}" for i in range(80)]
    assert FORMS[form](write_scores(tmp_path / "s", form, blocks(), ids, TEST)).shape == (80, 3)


def test_a_bergson_folder_has_the_layout_of_its_writer(tmp_path: Path) -> None:
    """bergson 2.5.1 aligns each (score, written) pair to the next power of two: 8 bytes in single precision."""
    write_scores(tmp_path / "b", "bergson", [SCORE[:, :2].astype(np.float32)], TRAIN, TEST[:2])
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["info.json", "scores.bin"]
    info = json.loads((tmp_path / "b" / "info.json").read_text())
    assert info == {
        "attribute_tokens": False,
        "num_items": 6,
        "num_rows": 6,
        "num_scores": 2,
        "dtype": {
            "names": ["score_0", "written_0", "score_1", "written_1"],
            "formats": ["float32", "bool", "float32", "bool"],
            "offsets": [0, 4, 8, 12],
            "itemsize": 16,
        },
    }
    raw = (tmp_path / "b" / "scores.bin").read_bytes()
    assert len(raw) == 96
    assert np.frombuffer(raw[8:12], np.float32)[0] == np.float32(SCORE[0, 1])
    assert raw[4] == raw[12] == 1


def test_unfinished_and_foreign_bergson_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a score folder"):
        load_bergson(tmp_path)
    write_scores(tmp_path, "bergson", [SCORE], TRAIN, TEST)
    raw = bytearray((tmp_path / "scores.bin").read_bytes())
    raw[8] = 0
    (tmp_path / "scores.bin").write_bytes(raw)
    with pytest.raises(DataError, match="never written"):
        load_bergson(tmp_path)


def test_what_fails_on_the_way_leaves_what_was_there(tmp_path: Path) -> None:
    write_scores(tmp_path / "b", "bergson", [SCORE], TRAIN, TEST)
    gaps = SCORE.copy()
    gaps[5, 0] = np.nan
    with pytest.raises(DataError, match="finite"):
        write_scores(tmp_path / "b", "bergson", [gaps[:4], gaps[4:]], TRAIN, TEST)
    assert np.array_equal(load_bergson(tmp_path / "b"), SCORE)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [[SCORE[:5]], [SCORE, SCORE[:1]], [SCORE[:, :2]]])
def test_blocks_must_make_up_the_ids(tmp_path: Path, form: str, blocks: list[Any]) -> None:
    with pytest.raises(DataError, match=r"does not fit|were given"):
        write_scores(tmp_path / "s", form, blocks, TRAIN, TEST)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_forms_and_places_that_are_not_there(
    attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form: Any = "dattri"
    with pytest.raises(ConfigurationError, match="npy, csv, parquet, bergson"):
        attribution.export(tmp_path / "s", form)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        attribution.export(tmp_path / "file" / "scores.npy", "npy")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"daunce-api\[parquet\]"):
        attribution.export(tmp_path / "s", "parquet")


def test_missing_losses_are_exported_as_missing(attribution: Attribution, tmp_path: Path) -> None:
    losses = attribution.train_loss_KN.copy()
    losses[:, 2] = np.nan
    made = replace(attribution, train_loss_KN=losses)
    back = np.load(made.export(tmp_path / "s.npy", "npy"))
    assert np.isnan(back[2]).all()
    np.testing.assert_allclose(back, made.scores_NM())
    with pytest.raises(DataError, match="have not scored"):
        made.export(tmp_path / "b", "bergson")
