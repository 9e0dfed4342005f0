"""Sums of scores over groups of examples, and their standard errors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import DataError
from .choice import Choice
from .jackknife import LEAST_FOR_CORRELATION
from .pairs import Scores, Shrinkage, fit
from .rows import Floats, Index, MemberLosses

_ROWS = 8_192
_PAIRS = 1_000_000  # that are weighted at a time
_CHANGES = 10_000_000  # of groups by members that are held at a time
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores between groups of training examples and groups of test examples (or single ones).

    Attributes:
        train_groups, test_groups: (G,) and (H,) labels, in order of first appearance; indices where no labels were
            given.
        score_GH: (G, H) sums of scores; positive = helpful. Examples without losses are left out, so that a group's
            score is that of its other examples, and NaN where it has none.
        stderr_GH: (G, H) standard errors of the sums of the evidence over the choice of members.
        estimator, why: as in `top`.
        prior_GH: (G, H) the part of each score that is prior, or None where there is none.
    """

    train_groups: tuple[Hashable, ...]
    test_groups: tuple[Hashable, ...]
    score_GH: Floats
    stderr_GH: Floats
    estimator: str
    why: str
    prior_GH: Floats | None = None


def group_scores(
    losses: MemberLosses,
    choice: Choice,
    train_labels_N: Sequence[Hashable] | None = None,
    test_labels_M: Sequence[Hashable] | None = None,
) -> GroupScores:
    """Sum scores over groups on either side.

    Args:
        losses, choice: see `member_losses` and `choose`.
        train_labels_N, test_labels_M: any hashable labels, or None for every example by itself.

    Raises:
        DataError: a label sequence of the wrong length. Otherwise as `fit`.
    """
    scores = fit(losses, choice.estimator.name, choice.setting)
    rows, row_of = _numbered(train_labels_N, scores.shape[0], "training")
    columns, column_of = _numbered(test_labels_M, scores.shape[1], "test")
    some_rows, row = np.unique(row_of[scores.kept_N], return_inverse=True)
    some_columns, column = np.unique(column_of[scores.kept_M], return_inverse=True)

    def placed(values: Floats) -> Floats:
        out = np.full((len(rows), len(columns)), np.nan, dtype=values.dtype)
        out[np.ix_(some_rows, some_columns)] = values
        return out

    score, error = group_sums(scores, row, column)
    prior = None
    if scores.prior_NM is not None:
        summed = np.zeros((some_rows.size, some_columns.size))
        _add_rows(summed, row, _summed(scores.prior_NM, column))
        prior = placed(summed)
    return GroupScores(rows, columns, placed(score), placed(error), choice.estimator.name, choice.why, prior)


def group_sums(scores: Scores, row_of: Index, column_of: Index) -> tuple[Floats, Floats]:
    """(G, H) sums of scores over groups of examples, and the standard errors of their evidence.

    Sums of columns come before the product, so they cost no more than single examples do; where pairs have weights
    or a prior, about what all pairs cost. Norms of summed correlations are taken as known, see `jackknife`.
    """
    if _is_single(row_of) and _is_single(column_of):
        return scores.inner(_ALL, _ALL), scores.inner_stderr(_ALL, _ALL)
    if scores.shrinkage is not None:
        return _sums_of_blocks(scores, row_of, column_of), _weighted_errors(scores, scores.shrinkage, row_of, column_of)
    left, right, tests = (
        _summed(x, of)
        for x, of in ((scores.left_RN, row_of), (scores.right_RM, column_of), (scores.tests_RM, column_of))
    )
    sums = replace(scores, left_RN=left, right_RM=right, tests_RM=tests, standardized=False, prior_NM=None)
    error = sums.inner_stderr(_ALL, _ALL)
    if scores.standardized and scores.stages.members < LEAST_FOR_CORRELATION:
        error[:] = np.nan
    score = sums.inner(_ALL, _ALL) if scores.prior_NM is None else _sums_of_blocks(scores, row_of, column_of)
    return score, error


def _sums_of_blocks(scores: Scores, row_of: Index, column_of: Index) -> Floats:
    score = np.zeros((int(row_of.max()) + 1, int(column_of.max()) + 1))
    for start in range(0, row_of.size, _ROWS):
        rows = slice(start, start + _ROWS)
        _add_rows(score, row_of[rows], _summed(scores.inner(rows, _ALL), column_of))
    return score


def _weighted_errors(scores: Scores, shrinkage: Shrinkage, row_of: Index, column_of: Index) -> Floats:
    """(G, H) standard errors of sums of weighted scores: what each member changes in a pair's score before weights,
    times what that makes of the weighted one. In a sum, that weights follow chance does not average out. Some
    groups of training examples after the others, since changes of all members in all of them may be many."""
    by_member = scores.stages.by_member
    rights_KPM = by_member(np.concatenate([t.right(scores.tests_RM) for t in scores.terms]))
    members, columns = len(rights_KPM), int(column_of.max()) + 1
    error = np.empty((int(row_of.max()) + 1, columns), dtype=scores.left_RN.dtype)
    step, pairs = max(1, _CHANGES // (members * columns)), max(1, _PAIRS // column_of.size)
    for first in range(0, error.shape[0], step):
        some = np.flatnonzero((row_of >= first) & (row_of < first + step))
        part, weights = replace(scores, left_RN=scores.left_RN[:, some]), shrinkage.rows(some)
        change = np.zeros((members, min(step, error.shape[0] - first), columns))
        for start in range(0, some.size, pairs):
            rows = slice(start, start + pairs)
            slope = weights.slope(part.product(rows, _ALL), rows, _ALL)
            lefts_KPX = by_member(np.concatenate([t.left(part.left_RN[:, rows]) for t in scores.terms]))
            for k in range(members):
                change_of_k = (lefts_KPX[k].T @ rights_KPM[k]) * slope
                _add_rows(change[k], row_of[some[rows]] - first, _summed(change_of_k, column_of))
        change = (change - change.mean(axis=0)) * np.sqrt(1 - 1 / members)
        error[first : first + step] = np.sqrt((change**2).sum(axis=0))
    return error


def _numbered(labels: Sequence[Hashable] | None, count: int, side: str) -> tuple[tuple[Hashable, ...], Index]:
    if labels is None:
        return tuple(range(count)), np.arange(count)
    if len(labels) != count:
        raise DataError(f"{len(labels)} labels were given for {count} {side} examples; each needs one.")
    number: dict[Hashable, int] = {}
    of = np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)
    return tuple(number), of


def _is_single(group_of: Index) -> bool:
    """Whether every example is its own group, in order."""
    return np.array_equal(group_of, np.arange(group_of.size))


def _summed(values_RX: Floats, group_of: Index) -> Floats:
    """(R, G) sums of columns by the group that each belongs to; all groups from 0 to G - 1 have columns."""
    order = np.argsort(group_of, kind="stable")
    starts = np.flatnonzero(np.diff(group_of[order], prepend=-1))
    return np.asarray(np.add.reduceat(values_RX[:, order], starts, axis=1))


def _add_rows(total_GH: Floats, group_of: Index, values_XH: Floats) -> None:
    """Add rows to those of their groups, in place."""
    present, number = np.unique(group_of, return_inverse=True)
    total_GH[present] += _summed(values_XH.T, number).T
