"""Truths of LDS in the forms that other tools read and write, so that theirs can judge ours and ours theirs.

dattri's ``dattri.metric.lds(score, (values, indices))`` takes what `to_dattri` gives. As a file a truth is one ``.npz``
(`save_truth`, `load_truth`).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._util.files import replacing
from ..errors import DataError

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def to_dattri(truth_inclusion_SN: ArrayLike, truth_loss_SM: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    """A truth as dattri's ``lds(score, (values, indices))`` takes it (there as tensors).

    dattri correlates ``+sum of kept scores`` with the values, so the values are negated losses: then helpful =
    positive on both sides.

    Args:
        truth_inclusion_SN: (S, N) bool, subsets of one size.
        truth_loss_SM: (S, M) losses in nats, or (S, R, M) with R training seeds, which are averaged.

    Returns:
        (S, M) negated losses and (S, n) indices of each subset.

    Raises:
        DataError: subsets differ in size, which dattri's form cannot hold, or the two do not fit.
    """
    inclusion, loss = _fitting(truth_inclusion_SN, truth_loss_SM)
    sizes = inclusion.sum(axis=1)
    if len(set(sizes.tolist())) > 1:
        raise DataError(f"dattri's form needs subsets of one size; these have {sizes.min()} to {sizes.max()} examples.")
    return -loss, np.nonzero(inclusion)[1].reshape(len(inclusion), -1).astype(np.int64)


def from_dattri(values_SM: ArrayLike, indices_Sn: ArrayLike, train_size: int) -> tuple[Bools, Floats]:
    """The inverse of `to_dattri`: (S, N) inclusion and (S, M) losses.

    Raises:
        DataError: an index outside the training set, or arrays that do not fit.
    """
    indices = np.asarray(indices_Sn, dtype=np.int64)
    if indices.ndim != 2:
        raise DataError(f"Indices of subsets must be (S, n); these are {indices.shape}.")
    if indices.size and not (indices.min() >= 0 and indices.max() < train_size):
        raise DataError(f"Indices run from {indices.min()} to {indices.max()}, outside {train_size} training examples.")
    inclusion = np.zeros((indices.shape[0], train_size), dtype=bool)
    np.put_along_axis(inclusion, indices, True, axis=1)
    return _fitting(inclusion, -np.asarray(values_SM, dtype=np.float64))


def save_truth(
    path: str | Path,
    truth_inclusion_SN: ArrayLike,
    truth_loss_SM: ArrayLike,
    train_ids: Sequence[str],
    test_ids: Sequence[str],
    score_NM: ArrayLike | None = None,
) -> Path:
    """Write a truth as one ``.npz`` for dattri: ``values`` and ``indices`` of `to_dattri`, ``train_ids``, ``test_ids``,
    and with them ``score``, the (N, M) scores that it is to judge.

    Raises:
        DataError: as `to_dattri`. StoreError: the file cannot be written.
    """
    values, indices = to_dattri(truth_inclusion_SN, truth_loss_SM)
    arrays = {"values": values, "indices": indices, "train_ids": np.array(train_ids), "test_ids": np.array(test_ids)}
    if score_NM is not None:
        arrays["score"] = np.asarray(score_NM)
    path = Path(path)
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path


def load_truth(path: str | Path, train_ids: Sequence[str], test_ids: Sequence[str]) -> tuple[Bools, Floats]:
    """Read a truth: what retrained models lose, and what each was trained on.

    The ``.npz`` holds ``values`` (S, M) and ``indices`` (S, n) as `save_truth` writes them, or ``inclusion`` (S, N) and
    ``loss`` (S, M), or (S, R, M) with R training seeds, as `daunce_api.evaluation.lds` takes them. Examples are in the
    run's order; where the file has ``train_ids`` and ``test_ids``, that is checked.

    Returns:
        (S, N) inclusion and (S, M) losses in nats, seeds averaged.

    Raises:
        DataError: not such a file, or of other examples.
    """
    path = Path(path)
    try:
        file = np.load(path, allow_pickle=False)
        arrays: dict[str, NDArray[Any]] = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else {}
    except OSError as error:
        raise DataError(f"{path} cannot be read as a truth in .npz: {error.strerror or error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy's own words are of pickles, and how to load them all the same.
        raise DataError(
            f"{path} cannot be read as a truth in .npz: it is another kind of file, damaged, or holds objects. "
            "`daunce export --format dattri` writes one."
        ) from error
    for name, ids in (("train_ids", train_ids), ("test_ids", test_ids)):
        if name in arrays and not np.array_equal(arrays[name], np.array(ids)):
            raise DataError(f"{path} is a truth of other examples than the run's, or in another order ({name} differ).")
    try:
        if {"values", "indices"} <= arrays.keys():
            inclusion, loss = from_dattri(arrays["values"], arrays["indices"], len(train_ids))
        elif {"inclusion", "loss"} <= arrays.keys():
            inclusion, loss = _fitting(arrays["inclusion"], arrays["loss"])
        else:
            raise DataError("it holds neither values and indices nor inclusion and loss")
        if (inclusion.shape[1], loss.shape[1]) != (len(train_ids), len(test_ids)):
            raise DataError(
                f"it has {inclusion.shape[1]} training and {loss.shape[1]} test examples, the run {len(train_ids)} and "
                f"{len(test_ids)}"
            )
    except (DataError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a truth for this run: {error}") from error
    return inclusion, loss


def _fitting(inclusion_SN: ArrayLike, loss_SM: ArrayLike) -> tuple[Bools, Floats]:
    inclusion, loss = np.asarray(inclusion_SN).astype(bool), np.asarray(loss_SM, dtype=np.float64)
    if loss.ndim == 3:
        loss = loss.mean(axis=1)
    if inclusion.ndim != 2 or loss.ndim != 2 or len(inclusion) != len(loss):
        raise DataError(
            f"A truth is (S, N) inclusion and (S, M) or (S, R, M) losses; got {inclusion.shape}, {np.shape(loss_SM)}."
        )
    return inclusion, loss
