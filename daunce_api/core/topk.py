"""Proponents and opponents: the k largest or smallest scores of every example, exact, with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from .choice import Choice
from .jackknife import significance_threshold, z_values
from .pairs import Scores, fit
from .rows import Floats, Index, Mask, MemberLosses

_POINTS, _QUERIES = 2_048, 512  # a tile of scores that stays in cache
_COPIED = 8_192
_BINS, _Z_MAX, _ROWS = 4_096, 64.0, 4_096


@dataclass(frozen=True, eq=False)
class Ranking:
    """The k strongest partners of every example.

    Attributes:
        index_Mk: (M, k) int64 indices of training examples (with per="train": (N, k), of test examples), strongest
            first; -1 where an example has no losses.
        score_Mk: their scores; positive = helpful. Descending for proponents, ascending for opponents.
        stderr_Mk: standard errors over the choice of members, or None. Where scores are shrunk towards zero
            (`pairs`), those of the scores before, times the weights, which are taken as known: so z is that of the
            score before. Of the evidence alone where there is a prior.
        z_Mk: evidence / stderr (correlations on Fisher's scale, see `jackknife.z_values`), or None.
        distinguishable_Mk: |z| above ``z_threshold``, or None: whether the evidence is significantly not zero.
        z_threshold: two-sided 5 % point of Student's t with K - 1 degrees of freedom, for one pair looked at by
            itself; or the Benjamini-Hochberg threshold over all N x M pairs, with a false-discovery rate.
        estimator, why: which estimator, and what chose it.
        question: what a ranking by this estimator answers.
        members: K.
        opponents: whether these are the smallest scores.
        prior_Mk: the part of each score that is prior, or None where there is none; the rest is evidence.
    """

    index_Mk: Index
    score_Mk: Floats
    stderr_Mk: Floats | None
    z_Mk: Floats | None
    distinguishable_Mk: Mask | None
    z_threshold: float | None
    estimator: str
    why: str
    question: str
    members: int
    opponents: bool
    prior_Mk: Floats | None = None

    def at(self, rows: Any = slice(None), places: Any = slice(None)) -> Ranking:
        """Some examples' partners, or some of their places, by indices."""
        names = ("index_Mk", "score_Mk", "stderr_Mk", "z_Mk", "distinguishable_Mk", "prior_Mk")
        arrays = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value[rows][:, places] for name, value in arrays.items()})


def top(
    losses: MemberLosses,
    choice: Choice,
    k: int,
    *,
    stderr: bool = True,
    opponents: bool = False,
    per: Literal["test", "train"] = "test",
    fdr: float | None = None,
) -> Ranking:
    """The k largest (or smallest) scores of every test example, exact, without the N x M matrix.

    Args:
        losses: see `member_losses`; matrices may be memory-mapped. Test examples may be left out after the choice:
            without ``fdr`` a pair's entry does not depend on which others there are.
        choice: see `choose`.
        k: how many; more than there are means all.
        stderr: also standard errors, z-values and what is significantly not zero.
        opponents: the smallest scores instead of the largest.
        per: "test" ranks training examples for each test example, "train" the other way round.
        fdr: mark as distinguishable so that at most this share of all marked pairs of the N x M is expected to be false
            (Benjamini-Hochberg; costs a pass over all pairs).

    Raises:
        ConfigurationError: k < 1, an unknown option, or fdr outside (0, 1). Otherwise as `fit`.

    Example:
        >>> from daunce_api.core import choose, member_losses, top
        >>> rng = np.random.default_rng(0)
        >>> inclusion = rng.random((40, 100)) < 0.5
        >>> train = 0.1 * rng.normal(size=(40, 100)) - inclusion  # an example in the subset has a lower loss
        >>> losses = member_losses(train, -1.0 * inclusion[:, :3], inclusion)
        >>> top(losses, choose(losses), k=1).index_Mk[:, 0]
        array([0, 1, 2])
    """
    if k < 1 or per not in ("test", "train"):
        raise ConfigurationError(f'top needs k >= 1 and per="test" or "train"; got k={k}, per={per!r}.')
    if fdr is not None and not (stderr and 0 < fdr < 1):
        raise ConfigurationError(f"A false-discovery rate lies in (0, 1) and needs standard errors; got fdr={fdr}.")
    scores, swap = fit(losses, choice.estimator.name, choice.setting), per == "train"
    points, queries = (scores.kept_M, scores.kept_N) if swap else (scores.kept_N, scores.kept_M)
    many, count = scores.shape[::-1] if swap else scores.shape

    def placed(part: NDArray[Any], missing: float) -> NDArray[Any]:
        out = np.full((count, min(k, many)), missing, dtype=part.dtype)
        out[queries, : part.shape[1]] = part
        return out

    inner, value = _largest(_oriented(scores, swap=swap, sign=-1 if opponents else 1), min(k, points.size))
    score = placed(-value if opponents else value, np.nan)
    rows, columns = (np.arange(queries.size)[:, None], inner) if swap else (inner, np.arange(queries.size)[:, None])
    prior = None if scores.prior_NM is None else placed(scores.prior_NM[rows, columns], np.nan)
    error = z = marks = threshold = None
    if stderr:
        error = placed(_pair_errors(scores, inner, swap=swap), np.nan)
        z = z_values(score if prior is None else score - prior, error, correlation=scores.standardized)
        threshold = significance_threshold(scores.stages.members) if fdr is None else fdr_threshold(scores, fdr)
        marks = np.abs(z) >= threshold
    index = placed(points[inner], -1)
    members = scores.stages.members
    names = choice.estimator.name, choice.why, choice.question_text
    return Ranking(index, score, error, z, marks, threshold, *names, members, opponents, prior)


def _oriented(scores: Scores, *, swap: bool, sign: int) -> Scores:
    """With the sides exchanged, and all scores times ``sign``."""
    left, right, shrinkage, prior = scores.left_RN, scores.right_RM, scores.shrinkage, scores.prior_NM
    if swap:
        left, right = right, left
        shrinkage = None if shrinkage is None else shrinkage.swapped()
        prior = None if prior is None else prior.T
    if sign < 0:
        right, prior = -right, None if prior is None else -prior
    return replace(scores, left_RN=left, right_RM=right, shrinkage=shrinkage, prior_NM=prior)


def _largest(scores: Scores, k: int) -> tuple[Index, Floats]:
    """(M, k) indices of rows and their scores, largest first, equal ones by index.

    Rows come in blocks, long vectors first. Blocks after which no product of lengths exceeds a column's k-th best score
    are skipped. What exceeds it waits until there is enough to be worth merging: a slightly stale threshold lets a
    few more through and costs less than a fresh one.
    """
    scores, order, length_N, length_M = _by_length(scores)
    many, count = order.size, length_M.size
    value, index = np.empty((count, k), dtype=scores.right_RM.dtype), np.empty((count, k), dtype=np.int64)
    first = min(many, max(_POINTS, 2 * k))
    for tile in range(0, count, _QUERIES):
        columns = slice(tile, tile + _QUERIES)
        block = np.ascontiguousarray(scores.inner(slice(0, first), columns).T)
        keep = np.argpartition(block, first - k, axis=1)[:, first - k :]
        best, place = np.take_along_axis(block, keep, axis=1), keep
        threshold, waiting, found = best.min(axis=1), list[tuple[Index, Floats, Index]](), 0
        for start in range(first, many, _POINTS):
            if (length_N[start] * length_M[columns] < threshold).all():
                break
            waiting.append(_above(scores, slice(start, start + _POINTS), columns, threshold))
            found += waiting[-1][0].size
            if found > best.size:
                _merge(best, place, waiting)
                threshold, waiting, found = best.min(axis=1), [], 0
        if found:
            _merge(best, place, waiting)
        place = order[place]
        by_value = np.lexsort((place, -best), axis=1)
        index[columns], value[columns] = (np.take_along_axis(x, by_value, axis=1) for x in (place, best))
    return index, value


def _by_length(scores: Scores) -> tuple[Scores, Index, Floats, Floats]:
    """Scores with rows in order of falling length, that order, and lengths whose products no score exceeds."""
    left_RN, right_RM, shrinkage, prior = scores.left_RN, scores.right_RM, scores.shrinkage, scores.prior_NM
    lengths = [np.sqrt(np.einsum("rx,rx->x", x, x)) for x in (left_RN, right_RM)]
    if shrinkage is not None:
        lengths = shrinkage.lengths()
    order = np.argsort(-lengths[0], kind="stable")
    left_NR = np.empty(left_RN.shape[::-1], dtype=left_RN.dtype)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    for start in range(0, order.size, _COPIED):  # read in sequence, written by whole rows
        piece = slice(start, start + _COPIED)
        left_NR[place[piece]] = np.ascontiguousarray(left_RN[:, piece].T)
    if shrinkage is not None:
        shrinkage = shrinkage.rows(order)
    slack = 1 + 100 * float(np.finfo(left_NR.dtype).eps)  # rounding of lengths against that of products
    reach_M = lengths[1] * (slack if scores.of_sides else np.inf)
    prior = None if prior is None else prior[order]
    return replace(scores, left_RN=left_NR.T, shrinkage=shrinkage, prior_NM=prior), order, lengths[0][order], reach_M


def _above(scores: Scores, rows: slice, columns: slice, threshold_m: Floats) -> tuple[Index, Floats, Index]:
    """Columns, values and rows of the scores that exceed their column's threshold."""
    late = scores.shrinkage if scores.of_sides else None
    block = scores.product(rows, columns) if late else scores.inner(rows, columns)
    marks = np.zeros((block.shape[0], _QUERIES), dtype=np.bool_)
    limit_m = late.least(threshold_m, rows, columns) if late else threshold_m
    np.greater(block, limit_m, out=marks[:, : block.shape[1]])
    words = np.flatnonzero(marks.view(np.uint64) != 0)  # eight at a time, since hardly any is above
    row, column = np.divmod(words * 8, _QUERIES)
    place, inner = np.nonzero(marks[row[:, None], column[:, None] + np.arange(8)])
    row, column = row[place], column[place] + inner
    value = block[row, column]
    if late:
        value = value * late.weight(value, rows.start + row, columns.start + column)
        above = value > threshold_m[column]
        row, column, value = row[above], column[above], value[above]
    return column, value, rows.start + row


def _merge(value_mk: Floats, index_mk: Index, waiting: list[tuple[Index, Floats, Index]]) -> None:
    """Keep the k best of the best so far and what waits (one score at least), in place."""
    query, value, index = (np.concatenate(part) for part in zip(*waiting, strict=True))
    order = np.argsort(query.astype(np.uint16), kind="stable")  # of a tile; short integers sort in one pass
    query, value, index = query[order], value[order], index[order]
    touched, first, count = np.unique(query, return_index=True, return_counts=True)
    k = value_mk.shape[1]
    values = np.full((touched.size, k + int(count.max())), -np.inf, dtype=value_mk.dtype)
    indices = np.zeros(values.shape, dtype=np.int64)
    values[:, :k], indices[:, :k] = value_mk[touched], index_mk[touched]
    row = np.repeat(np.arange(touched.size), count)
    place = k + np.arange(query.size) - first[row]
    values[row, place], indices[row, place] = value, index
    keep = np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]
    value_mk[touched] = np.take_along_axis(values, keep, axis=1)
    index_mk[touched] = np.take_along_axis(indices, keep, axis=1)


def _pair_errors(scores: Scores, index_Qk: Index, *, swap: bool) -> Floats:
    """(Q, k) standard errors of each query's pairs, as blocks of one column (with ``swap`` of one row) each."""
    scores = replace(scores, left_RN=np.asfortranarray(scores.left_RN), tests_RM=np.asfortranarray(scores.tests_RM))
    out = np.empty(index_Qk.shape, dtype=scores.left_RN.dtype)
    for q, partners in enumerate(index_Qk):
        own = slice(q, q + 1)
        block = scores.inner_stderr(own, partners) if swap else scores.inner_stderr(partners, own)
        out[q] = block.ravel()
    return out


def fdr_threshold(scores: Scores, rate: float) -> float:
    """|z| from which on pairs are significant at a false-discovery rate (Benjamini and Hochberg 1995).

    One pass over all pairs fills a histogram of |z|; thresholds are its bin edges, so the result is never
    less strict than the exact procedure. Infinite when nothing passes.
    """
    counts = np.zeros(_BINS, dtype=np.int64)
    for start in range(0, scores.shape[0], _ROWS):
        z = np.abs(scores.z_block(slice(start, start + _ROWS)))
        place = np.minimum((z[np.isfinite(z)] * (_BINS / _Z_MAX)).astype(np.int64), _BINS - 1)
        counts += np.bincount(place, minlength=_BINS)
    at_least = counts[::-1].cumsum()[::-1]
    edges = np.linspace(0, _Z_MAX, _BINS + 1)
    from scipy.special import stdtr  # slow to import

    p_value = 2 * stdtr(scores.stages.members - 1, -edges[:-1])
    passing = np.flatnonzero((at_least > 0) & (p_value * counts.sum() <= rate * at_least))
    return float(edges[passing[0]]) if passing.size else float("inf")
