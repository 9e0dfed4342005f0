from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from daunce_api.errors import DataError
from daunce_api.evaluation import lds
from daunce_api.evaluation.interchange import (
    from_dattri,
    load_bergson,
    save_bergson,
    save_npy,
    save_parquet,
    to_dattri,
)

SCORE = np.random.default_rng(0).normal(size=(6, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bergson_folder_comes_back(tmp_path: Path, dtype: type) -> None:
    save_bergson(tmp_path / "scores", SCORE.astype(dtype))
    back = load_bergson(tmp_path / "scores")
    assert back.dtype == dtype
    assert np.array_equal(back, SCORE.astype(dtype))
    assert sorted(p.name for p in (tmp_path / "scores").iterdir()) == ["info.json", "scores.bin"]


def test_a_bergson_folder_has_the_layout_of_its_writer(tmp_path: Path) -> None:
    """bergson 2.5.1 aligns each (score, written) pair to the next power of two: 8 bytes in single precision."""
    save_bergson(tmp_path, SCORE[:, :2].astype(np.float32))
    info = json.loads((tmp_path / "info.json").read_text())
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
    raw = (tmp_path / "scores.bin").read_bytes()
    assert len(raw) == 96
    assert np.frombuffer(raw[8:12], np.float32)[0] == np.float32(SCORE[0, 1])
    assert raw[4] == raw[12] == 1


def test_unfinished_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a score folder"):
        load_bergson(tmp_path)
    save_bergson(tmp_path, SCORE)
    raw = bytearray((tmp_path / "scores.bin").read_bytes())
    raw[8] = 0
    (tmp_path / "scores.bin").write_bytes(raw)
    with pytest.raises(DataError, match="never written"):
        load_bergson(tmp_path)
    with pytest.raises(DataError, match="finite"):
        save_bergson(tmp_path, np.full((2, 2), np.nan))


def test_npy_and_parquet_come_back(tmp_path: Path) -> None:
    save_npy(tmp_path / "s.npy", SCORE)
    assert np.array_equal(np.load(tmp_path / "s.npy"), SCORE)
    pq = pytest.importorskip("pyarrow.parquet")
    save_parquet(tmp_path / "s.parquet", SCORE, [f"t{i}" for i in range(6)], ["a", "b", "c"])
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["train_id", "a", "b", "c"]
    assert table["train_id"].to_pylist()[2] == "t2"
    assert np.array_equal(table["b"].to_numpy(), SCORE[:, 1])
    assert table.schema.metadata[b"sign"] == b"positive = helpful"
    assert not list(tmp_path.glob("*.part"))


def test_ids_must_fit_and_differ(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="do not fit"):
        save_parquet(tmp_path / "s", SCORE, ["t"], ["a", "b", "c"])
    with pytest.raises(DataError, match="differ"):
        save_parquet(tmp_path / "s", SCORE, [f"t{i}" for i in range(6)], ["a", "a", "train_id"])


def test_a_truth_goes_to_dattri_and_back() -> None:
    rng = np.random.default_rng(1)
    score = rng.normal(size=(14, 3))
    inclusion = np.array([rng.permutation([True] * 7 + [False] * 7) for _ in range(10)])
    loss = rng.normal(size=(10, 3))
    values, indices = to_dattri(inclusion, loss)
    assert indices.shape == (10, 7)
    kept = np.stack([score[row].sum(axis=0) for row in indices])
    theirs = [spearmanr(kept[:, j], values[:, j]).statistic for j in range(3)]
    assert np.allclose(lds(score, inclusion, loss).per_test_M, theirs)
    again = from_dattri(values, indices, 14)
    assert np.array_equal(again[0], inclusion)
    assert np.array_equal(again[1], loss)


def test_dattris_form_needs_one_size_and_known_indices() -> None:
    with pytest.raises(DataError, match="one size"):
        to_dattri([[1, 0], [1, 1]], np.zeros((2, 1)))
    with pytest.raises(DataError, match="outside"):
        from_dattri(np.zeros((1, 1)), [[7]], 6)
