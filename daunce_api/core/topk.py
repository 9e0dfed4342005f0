"""Proponents and opponents: the k largest or smallest scores of every example, with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError
from .blocks import FactorBlocks, ScoreBlocks, score_blocks
from .checkpoints import Checkpoints, Floats
from .choice import Choice, choose
from .complete import LEAST_FOR_CORRELATION, correlation_without, jackknife
from .estimators import Factors, Question
from .members import MemberLosses, member_losses
from .selection import Best, Index, above, largest, prepare_points
from .spectrum import Setting
from .uncertainty import fdr_threshold, same_p, significance_threshold, z_values

_ROWS = 4_096
_PAIRS = 400_000
_BLOCK = 4_000_000
_DENSE = 200
"""How many pairs of a block cost as much as one chosen pair that is gathered (measured: 90 to 300)."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """The k strongest partners of every example.

    Attributes:
        index_Mk: (M, k) int64 indices of training examples (with per="train": (N, k), of test examples), strongest
            first; -1 where an example has fewer than k scores (missing losses).
        score_Mk: their scores; positive = helpful. Descending for proponents, ascending for opponents.
        stderr_Mk: standard errors over the choice of members, or None. Where scores are drawn towards zero
            (`shrinkage`), those of the scores before, times the weights, which are taken as known: so z is that of the
            score before.
        z_Mk: score / stderr (correlations on Fisher's scale, see `uncertainty.z_values`), or None. Where a pair has
            fewer members in common than K: the value for K members with the same p-value, so that one threshold serves.
        distinguishable_Mk: |z| above ``z_threshold``, or None: whether the score can be told from zero.
        z_threshold: two-sided 5 % point of Student's t with K - 1 degrees of freedom, for one pair looked at by
            itself; or the Benjamini-Hochberg threshold over all N x M pairs, when a false-discovery rate was asked for.
        estimator, why: which estimator, and what chose it.
        question: what a ranking by this estimator answers.
        members: K.
        opponents: whether these are the smallest scores.
        common_Mk: how many members have both losses of the pair, or None where all K have all.
    """

    index_Mk: Index
    score_Mk: Floats
    stderr_Mk: Floats | None
    z_Mk: Floats | None
    distinguishable_Mk: NDArray[np.bool_] | None
    z_threshold: float | None
    estimator: str
    why: str
    question: str
    members: int
    opponents: bool
    common_Mk: Floats | None = None


def top(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    k: int,
    estimator: str = "auto",
    stderr: bool = True,
    opponents: bool = False,
    *,
    inclusion_KN: ArrayLike | None = None,
    noise: float | NDArray[np.float64] | None = None,
    rho: float | None = None,
    question: Question = "attribution",
    per: Literal["test", "train"] = "test",
    fdr: float | None = None,
    earlier: Checkpoints | None = None,
) -> Ranking:
    """The k largest (or smallest) scores of every test example, exact, without the N x M matrix.

    Args:
        train_loss_KN, test_loss_KM, inclusion_KN, estimator, noise, rho, earlier: as for `scores`. Inputs may be
            memory-mapped.
        k: how many; more than there are means all.
        stderr: also standard errors, z-values and what can be told from zero.
        opponents: the smallest scores instead of the largest.
        question: with estimator="auto": "attribution" (effect on the loss, judged by LDS) or "retrieval" (which
            examples belong together). A named estimator answers its own, and refuses retrieval if that is not it.
        per: "test" ranks training examples for each test example, "train" the other way round.
        fdr: mark as distinguishable so that at most this share of all marked pairs of the N x M is expected to be false
            (Benjamini-Hochberg; costs a pass over all pairs).

    Returns:
        Ranking.

    Raises:
        ConfigurationError: k < 1, an unknown option, or fdr outside (0, 1). Otherwise as `scores`.
    """
    members = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, earlier)
    choice = choose(members, estimator, Setting(noise, rho), question)
    return ranked(members, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)


def ranked(
    members: MemberLosses,
    choice: Choice,
    k: int,
    *,
    stderr: bool = True,
    opponents: bool = False,
    per: Literal["test", "train"] = "test",
    fdr: float | None = None,
) -> Ranking:
    """`top` with an estimator that is chosen already. Of ``members``, test examples may be left out afterwards: without
    ``fdr`` a pair's entry does not depend on which others there are."""
    if k < 1 or per not in ("test", "train"):
        raise ConfigurationError(f'top needs k >= 1 and per="test" or "train"; got k={k}, per={per!r}.')
    if fdr is not None and not (stderr and 0 < fdr < 1):
        raise ConfigurationError(f"A false-discovery rate lies in (0, 1) and needs standard errors; got fdr={fdr}.")
    part, rows, columns = members.observed()
    setting = choice.setting.of_examples(rows, members.train_KN.shape[1])
    blocks = score_blocks(choice.estimator, part, setting)
    error = common = None
    if isinstance(blocks, FactorBlocks):
        index, score = _top_of_factors(blocks.factors, k, opponents, per)
        error = _pair_errors(blocks.factors, index, per) if stderr else None
    else:
        index, score, error, common = _top_of_blocks(blocks, k, opponents, per, stderr)
    if part is not members:
        points, queries, count = (rows, columns, members.test_KM.shape[1])
        if per == "train":
            points, queries, count = (columns, rows, members.train_KN.shape[1])
        many = members.train_KN.shape[1] if per == "test" else members.test_KM.shape[1]
        shape = (count, min(k, many))
        index = _placed(np.where(index >= 0, points[index], -1), queries, shape, -1)
        score = _placed(score, queries, shape, np.nan)
        error, common = (
            None if x is None else _placed(x, queries, shape, fill) for x, fill in ((error, np.nan), (common, 0))
        )
    z = marked = threshold = None
    if error is not None:
        fisher = choice.estimator.name == "correlation"
        z = z_values(score, error, correlation=fisher)
        if common is not None:
            z = same_p(z, common, members.count)
        if fdr is None:
            threshold = significance_threshold(members.count)
        else:
            threshold = fdr_threshold(blocks, members.count, fdr, correlation=fisher)
        marked = np.abs(z) >= threshold
    return Ranking(
        index,
        score,
        error,
        z,
        marked,
        threshold,
        choice.estimator.name,
        choice.why,
        choice.question_text,
        members.count,
        opponents,
        common,
    )


def _placed(part_Xk: NDArray[Any], rows: NDArray[np.int64], shape: tuple[int, int], missing: float) -> NDArray[Any]:
    """Rows in their places among all examples; what is not there is missing."""
    out = np.full(shape, missing, dtype=part_Xk.dtype)
    out[rows, : part_Xk.shape[1]] = part_Xk
    return out


def _top_of_factors(factors: Factors, k: int, opponents: bool, per: str) -> tuple[Index, Floats]:
    points, queries, shrinkage = factors.left_RN, factors.right_RM, factors.shrinkage
    if per == "train":
        points, queries = queries, points
        shrinkage = None if shrinkage is None else shrinkage.swapped()
    sign = -1 if opponents else 1
    signed = queries * sign if opponents else queries
    index, value = largest(prepare_points(points), signed, min(k, points.shape[1]), shrinkage)
    return index, value * sign if opponents else value


def _pair_errors(factors: Factors, index_Mk: Index, per: str) -> Floats:
    """Standard errors of chosen pairs: R multiplications each, whatever N x M is, or picked from whole blocks where the
    chosen ones are a fair share of all."""
    errors = factors.errors()
    count = len(errors) * factors.stages.count
    many = (factors.left_RN if per == "test" else factors.right_RM).shape[1]
    products = count * (count + 1) // 2 + 3
    if not factors.standardised and many * products <= _DENSE * count * index_Mk.shape[1]:
        return _picked_errors(FactorBlocks(factors), index_Mk, per)
    left_NR = np.ascontiguousarray(factors.left_RN.T)
    terms = [
        (
            None if t.left_map is None else t.left_map.astype(left_NR.dtype),
            np.ascontiguousarray((factors.right_RM if factors.standardised else t.right(factors.tests_RM)).T),
        )
        for t in errors
    ]
    right_MR = None if factors.shrinkage is None else np.ascontiguousarray(factors.right_RM.T)
    stages = factors.stages
    inflation = stages.inflation().astype(left_NR.dtype)
    out = np.empty(index_Mk.shape, dtype=left_NR.dtype)
    step = max(1, _PAIRS * 50 // (index_Mk.shape[1] * left_NR.shape[1]))

    def by_member(values: Floats) -> Floats:
        """Sums over the rows of each member, on the last axis."""
        return np.asarray(values.reshape(*values.shape[:-1], stages.count, stages.members).sum(axis=-2))

    for start in range(0, index_Mk.shape[0], step):
        chosen = index_Mk[start : start + step]
        own = np.arange(start, start + chosen.shape[0])
        rows, columns = (chosen, own[:, None]) if per == "test" else (own[:, None], chosen)
        left = left_NR[rows]
        if factors.standardised:
            right = terms[0][1][columns]
            score = (left * right).sum(axis=-1, keepdims=True)
            parts = (by_member(inflation * x * y) for x, y in ((left, right), (left, left), (right, right)))
            change = score - correlation_without(score, *parts)
        else:
            change = by_member(
                sum(
                    ((left if maps is None else left @ maps) * right[columns] for maps, right in terms),
                    np.zeros((), left.dtype),
                )
            )
        squares = np.einsum("...k,...k->...", change, change)
        least = LEAST_FOR_CORRELATION if factors.standardised else 3
        error = jackknife(squares, change.sum(axis=-1), stages.members, least)
        if factors.shrinkage is not None and right_MR is not None:
            score = np.einsum("...r,...r->...", left, right_MR[columns])
            pairs = (x.ravel() for x in np.broadcast_arrays(rows, columns))
            error *= factors.shrinkage.weight(score.ravel(), *pairs).reshape(score.shape)
        out[start : start + step] = error
    return out


def _picked_errors(blocks: FactorBlocks, index_Mk: Index, per: str) -> Floats:
    out = np.empty(index_Mk.shape, dtype=blocks.factors.left_RN.dtype)
    whole = slice(None)
    step = max(1, _BLOCK // blocks.shape[0 if per == "test" else 1])
    for start in range(0, index_Mk.shape[0], step):
        piece = slice(start, start + step)
        error = blocks.stderr_block(whole, piece).T if per == "test" else blocks.stderr_block(piece, whole)
        out[piece] = np.take_along_axis(error, index_Mk[piece], axis=1)
    return out


def _top_of_blocks(
    blocks: ScoreBlocks, k: int, opponents: bool, per: str, stderr: bool
) -> tuple[Index, Floats, Floats | None, Floats | None]:
    """Incomplete data: the same selection over blocks, pairs without a score left out."""
    many, few = blocks.shape if per == "test" else blocks.shape[::-1]
    sign = -1 if opponents else 1
    best = Best(few, min(k, many), np.dtype(np.float64))
    whole = slice(None)
    for start in range(0, many, _ROWS):
        piece = slice(start, start + _ROWS)
        block = blocks.block(piece, whole).T if per == "test" else blocks.block(whole, piece)
        padded = np.full((few, -(-block.shape[1] // 8) * 8), -np.inf)
        padded[:, : block.shape[1]] = np.where(np.isnan(block), -np.inf, sign * block)
        row, column = above(padded, best.threshold)
        best.offer(row, padded[row, column], start + column)
        best.settle()
    index, value = best.sorted()
    score = np.where(index >= 0, sign * value, np.nan)
    if not stderr:
        return index, score, None, None
    error, common = np.full(index.shape, np.nan), np.zeros(index.shape)
    for start in range(0, many, _ROWS):
        row, place = np.nonzero((index >= start) & (index < start + _ROWS))
        if row.size:
            piece = slice(start, start + _ROWS)
            for out, of in ((error, blocks.stderr_block), (common, blocks.count_block)):
                block = of(piece, whole).T if per == "test" else of(whole, piece)
                out[row, place] = block[row, index[row, place] - start]
    return index, score, error, common
