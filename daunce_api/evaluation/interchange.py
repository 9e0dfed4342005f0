"""Scores and truths in the forms that other tools read, so that theirs can judge ours.

* scores as ``.npy`` and ``.parquet`` (one row a pair, or a wide table), and as bergson's score folder (``scores.bin``
  and ``info.json``; bergson 2.5, read there with ``bergson.data.load_scores``);
* truths as the pair (loss, indices) that dattri's ``dattri.metric.lds`` takes.

Everything is written to a ``.part`` and then renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from daunce_api.errors import DataError, MissingExtraError


def save_npy(path: str | Path, score_NM: ArrayLike) -> None:
    """Write (N, M) scores as one ``.npy`` array; positive = helpful."""
    part = _part(path)
    with part.open("wb") as file:
        np.save(file, np.asarray(score_NM))
    os.replace(part, path)


def save_parquet(path: str | Path, score_NM: ArrayLike, train_ids: Sequence[str], test_ids: Sequence[str]) -> None:
    """Write (N, M) scores as a parquet table: column ``train_id`` and one column a test id; positive = helpful.

    Raises:
        DataError: ids do not fit the scores or repeat.
        MissingExtraError: pyarrow is not installed (extra ``parquet``).
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("Writing parquet", "parquet") from error
    score = np.asarray(score_NM)
    if score.shape != (len(train_ids), len(test_ids)):
        raise DataError(f"Scores {score.shape} do not fit {len(train_ids)} training and {len(test_ids)} test ids.")
    names = ["train_id", *test_ids]
    if len(set(names)) != len(names):
        raise DataError('Test ids must differ from each other and from "train_id" to be column names.')
    columns = [pa.array(list(train_ids)), *(pa.array(np.ascontiguousarray(column)) for column in score.T)]
    table = pa.table(dict(zip(names, columns, strict=True)), metadata={"sign": "positive = helpful"})
    part = _part(path)
    pq.write_table(table, part)
    os.replace(part, path)


def save_bergson(folder: str | Path, score_NM: ArrayLike) -> None:
    """Write (N, M) scores as bergson's score folder: one record a training example, one field a test example.

    The sign stays ours, positive = helpful; bergson calls that ``higher_is_better`` (pass it where its commands ask).

    Raises:
        DataError: scores are not (N, M) and finite.
    """
    score = np.asarray(score_NM)
    score = score.astype(np.float32 if score.dtype == np.float32 else np.float64, copy=False)
    if score.ndim != 2 or not np.isfinite(score).all():
        raise DataError("bergson's folder holds one finite score for every pair; leave out examples without scores.")
    layout = _layout(score.shape[1], score.dtype)
    rows = np.zeros(score.shape[0], dtype=np.dtype(layout))
    for j in range(score.shape[1]):
        rows[f"score_{j}"] = score[:, j]
        rows[f"written_{j}"] = True
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "attribute_tokens": False,
        "num_items": score.shape[0],
        "num_rows": score.shape[0],
        "num_scores": score.shape[1],
        "dtype": layout,
    }
    part = _part(folder / "scores.bin")
    rows.tofile(part)
    os.replace(part, folder / "scores.bin")
    part = _part(folder / "info.json")
    part.write_text(json.dumps(info, indent=2))
    os.replace(part, folder / "info.json")


def load_bergson(folder: str | Path) -> NDArray[Any]:
    """Read a bergson score folder (one row a document) as (N, M) scores; the sign is the folder's.

    Raises:
        DataError: not such a folder, or scores in it were never written.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / "info.json").read_text())
        record = np.dtype(info["dtype"])
        rows = np.memmap(folder / "scores.bin", dtype=record, mode="r", shape=(int(info["num_rows"]),))
        count = int(info["num_scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a score folder of bergson ({error}).") from error
    if info.get("attribute_tokens"):
        raise DataError(f"{folder} holds scores of tokens; only scores of documents can be read.")
    if not all(rows[f"written_{j}"].all() for j in range(count)):
        raise DataError(f"{folder} has scores that were never written; finish the run that makes it.")
    return np.stack([np.asarray(rows[f"score_{j}"]) for j in range(count)], axis=1)


def _layout(scores: int, dtype: np.dtype[Any]) -> Any:
    """bergson's record, as ``np.dtype`` takes it: value and flag alternate, each value aligned to its size."""
    width = dtype.itemsize
    return {
        "names": [name for j in range(scores) for name in (f"score_{j}", f"written_{j}")],
        "formats": [dtype.name, "bool"] * scores,
        "offsets": [offset for j in range(scores) for offset in (2 * width * j, 2 * width * j + width)],
        "itemsize": 2 * width * scores,
    }


def to_dattri(truth_inclusion_SN: ArrayLike, truth_loss_SM: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A truth as dattri's ``lds(score, (values, indices))`` takes it (there as tensors).

    dattri correlates ``+sum of kept scores`` with the values, so the values are negated losses: then helpful =
    positive on both sides.

    Returns:
        (S, M) negated losses and (S, n) indices of each subset.

    Raises:
        DataError: subsets differ in size, which dattri's form cannot hold.
    """
    inclusion = np.asarray(truth_inclusion_SN).astype(bool)
    sizes = inclusion.sum(axis=1)
    if len(set(sizes.tolist())) > 1:
        raise DataError(f"dattri's form needs subsets of one size; these have {sizes.min()} to {sizes.max()} examples.")
    loss = np.asarray(truth_loss_SM, dtype=np.float64)
    return -loss, np.nonzero(inclusion)[1].reshape(len(inclusion), -1).astype(np.int64)


def from_dattri(
    values_SM: ArrayLike, indices_Sn: ArrayLike, train_size: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The inverse of `to_dattri`: (S, N) inclusion and (S, M) losses.

    Raises:
        DataError: an index outside the training set.
    """
    indices = np.asarray(indices_Sn, dtype=np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < train_size):
        raise DataError(f"Indices run from {indices.min()} to {indices.max()}, outside {train_size} training examples.")
    inclusion = np.zeros((indices.shape[0], train_size), dtype=bool)
    np.put_along_axis(inclusion, indices, True, axis=1)
    return inclusion, -np.asarray(values_SM, dtype=np.float64)


def _part(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(path.name + ".part")
