"""Truths of LDS, to dattri's form and back, as arrays and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from daunce_api.errors import DataError
from daunce_api.evaluation import from_dattri, lds, load_truth, save_truth, to_dattri

TRAIN, TEST = [f"t{i}" for i in range(14)], ["a", "b", "c"]
RNG = np.random.default_rng(1)
INCLUSION = np.array([RNG.permutation([True] * 7 + [False] * 7) for _ in range(10)])
LOSS = RNG.normal(size=(10, 3))


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


def test_seeds_are_averaged_for_dattri() -> None:
    by_seed = np.stack([LOSS + 1, LOSS - 1], axis=1)
    assert np.allclose(to_dattri(INCLUSION, by_seed)[0], -LOSS)
    with pytest.raises(DataError, match=r"\(S, N\) inclusion"):
        to_dattri(INCLUSION[:3], LOSS)


def test_a_truth_comes_back_from_its_file(tmp_path: Path) -> None:
    score = RNG.normal(size=(14, 3))
    path = save_truth(tmp_path / "new" / "truth.npz", INCLUSION, LOSS, TRAIN, TEST, score)
    assert [f.name for f in path.parent.iterdir()] == ["truth.npz"]
    inclusion, loss = load_truth(path, TRAIN, TEST)
    assert np.array_equal(inclusion, INCLUSION)
    assert np.array_equal(loss, LOSS)
    with np.load(path, allow_pickle=False) as file:
        assert np.array_equal(file["score"], score)
        assert np.array_equal(file["values"], -LOSS)
        assert file["indices"].shape == (10, 7)


def test_a_truth_as_lds_takes_it_is_read_too(tmp_path: Path) -> None:
    by_seed = np.stack([LOSS + 1, LOSS - 1], axis=1)
    np.savez(tmp_path / "truth.npz", inclusion=INCLUSION, loss=by_seed)
    inclusion, loss = load_truth(tmp_path / "truth.npz", TRAIN, TEST)
    assert np.array_equal(inclusion, INCLUSION)
    assert np.allclose(loss, LOSS)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"loss": LOSS}, "neither values and indices nor inclusion and loss"),
        ({"inclusion": INCLUSION, "loss": LOSS[:, :2]}, "14 training and 2 test examples, the run 14 and 3"),
        ({"inclusion": INCLUSION[:, :9], "loss": LOSS}, "9 training and 3 test"),
        ({"values": LOSS, "indices": np.full((10, 2), 14)}, "outside 14"),
        ({"inclusion": INCLUSION, "loss": LOSS, "test_ids": np.array(["a", "c", "b"])}, "in another order"),
        ({"inclusion": INCLUSION, "loss": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_truths_of_something_else_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "truth.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_truth(tmp_path / "truth.npz", TRAIN, TEST)


def test_files_that_are_no_truth_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", LOSS)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_text("")
    for name in ("one.npy", "text.npz", "empty.npz", "nothing.npz"):
        with pytest.raises(DataError, match=name) as caught:
            load_truth(tmp_path / name, TRAIN, TEST)
        assert "pickle" not in str(caught.value)
