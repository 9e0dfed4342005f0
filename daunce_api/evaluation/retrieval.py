"""Retrieval metrics: does a ranking find the training examples that are known to be responsible?

The known ones are planted (a backdoor, a wrong answer) or relabelled. Higher score = ranked earlier. Tied scores have
no order, so every metric is its expected value over all orders of the ties, in closed form (McSherry & Najork,
"Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008). Without
ties they are the textbook values. A score of NaN (unknown) ranks below everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Means over the test examples that have at least one relevant training example.

    Attributes:
        average_precision: 0 to 1; a random order gives about the share of relevant examples.
        precision: of the first R, with R the number of relevant examples (0 to 1).
        mrr: mean reciprocal rank of the first relevant example (0 to 1].
        tests: how many test examples the means are over.
    """

    average_precision: float
    precision: float
    mrr: float
    tests: int


def average_precision(score_N: ArrayLike, relevant_N: ArrayLike) -> float:
    """Mean, over the relevant examples, of the precision at their rank; between 0 and 1.

    Args:
        score_N: (N,) scores, higher = earlier.
        relevant_N: (N,) whether an example is relevant.

    Raises:
        DataError: shapes differ, or nothing is relevant.
    """
    score, relevant = _checked(score_N, relevant_N)
    total = 0.0
    before = hits = 0
    for size, found in _tie_groups(score, relevant):
        if found:
            # At place t of the group a relevant one is met with probability found/size; given that, each of the t - 1
            # places before it in the group holds a relevant one with probability (found - 1)/(size - 1).
            place = np.arange(1, size + 1)
            above = (place - 1) * ((found - 1) / (size - 1) if size > 1 else 0.0)
            total += found / size * float(((hits + above + 1) / (before + place)).sum())
        before += size
        hits += found
    return total / hits


def precision_at(score_N: ArrayLike, relevant_N: ArrayLike, k: int | None = None) -> float:
    """Share of relevant examples among the first k; between 0 and 1.

    Args:
        score_N: (N,) scores, higher = earlier.
        relevant_N: (N,) whether an example is relevant.
        k: 1 to N; default: the number of relevant examples ("precision at the planted count").

    Raises:
        DataError: shapes differ, nothing is relevant, or k is outside 1 to N.
    """
    score, relevant = _checked(score_N, relevant_N)
    k = int(relevant.sum()) if k is None else k
    if not 1 <= k <= score.size:
        raise DataError(f"precision_at needs k between 1 and the {score.size} examples, not {k}.")
    room, hits = k, 0.0
    for size, found in _tie_groups(score, relevant):
        taken = min(size, room)
        hits += found * taken / size
        room -= taken
        if not room:
            break
    return hits / k


def reciprocal_rank(score_N: ArrayLike, relevant_N: ArrayLike) -> float:
    """1 / rank of the first relevant example; between 1/N and 1.

    Args:
        score_N: (N,) scores, higher = earlier.
        relevant_N: (N,) whether an example is relevant.

    Raises:
        DataError: shapes differ, or nothing is relevant.
    """
    score, relevant = _checked(score_N, relevant_N)
    before = 0
    for size, found in _tie_groups(score, relevant):
        if found:
            break
        before += size
    # P(the first t places of the group hold none): the product of (size - found - s) / (size - s), s < t.
    step = np.arange(size - found)
    none_yet = np.concatenate([[1.0], np.cumprod((size - found - step) / (size - step))])
    first_here = none_yet * found / (size - np.arange(none_yet.size))
    return float((first_here / (before + 1 + np.arange(none_yet.size))).sum())


def retrieval(score_NM: ArrayLike, relevant: ArrayLike) -> Retrieval:
    """All metrics, as means over the test examples.

    Args:
        score_NM: (N, M) scores, higher = earlier.
        relevant: (N,) the same for all test examples, or (N, M); test examples without a relevant one are left out.

    Raises:
        DataError: shapes differ, or no test example has a relevant training example.
    """
    score, known = np.asarray(score_NM), np.asarray(relevant).astype(bool)
    if score.ndim != 2:
        raise DataError(f"Scores must be (N, M), training by test examples; got {score.shape}.")
    if known.ndim == 1:
        known = np.broadcast_to(known[:, None], (known.size, score.shape[1]))
    if known.shape != score.shape:
        raise DataError(f"Labels {known.shape} do not match the scores {score.shape}: one label a training example.")
    columns = np.flatnonzero(known.any(axis=0))
    if not columns.size:
        raise DataError("No training example is labelled as relevant, so there is nothing to retrieve.")
    pairs = [(score[:, j], known[:, j]) for j in columns]
    return Retrieval(
        float(np.mean([average_precision(*pair) for pair in pairs])),
        float(np.mean([precision_at(*pair) for pair in pairs])),
        float(np.mean([reciprocal_rank(*pair) for pair in pairs])),
        int(columns.size),
    )


def _checked(score_N: ArrayLike, relevant_N: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    score, relevant = np.asarray(score_N, dtype=np.float64), np.asarray(relevant_N).astype(bool)
    if score.ndim != 1 or score.shape != relevant.shape:
        raise DataError(f"Scores {score.shape} and labels {relevant.shape} must be two vectors of one length.")
    if not relevant.any():
        raise DataError("No training example is labelled as relevant, so there is nothing to retrieve.")
    return np.where(np.isnan(score), -np.inf, score), relevant


def _tie_groups(score: NDArray[Any], relevant: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(size, relevant ones) of every group of equal scores, best score first."""
    _, group, sizes = np.unique(-score, return_inverse=True, return_counts=True)
    found = np.bincount(group, weights=relevant, minlength=sizes.size)
    for size, hits in zip(sizes, found, strict=True):
        yield int(size), int(hits)
