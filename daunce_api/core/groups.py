"""Scores of groups (sources, authors, files) with their own standard errors.

A group's score is the sum of its members' scores, so it is a sum of columns before the product: as cheap as one
example. Its standard error is taken over members of the ensemble for the sum as a whole, so that what its examples
share is counted as shared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from daunce_api.core.blocks import FactorBlocks, ScoreBlocks, score_blocks
from daunce_api.core.checkpoints import Checkpoints, Floats
from daunce_api.core.choice import choose
from daunce_api.core.estimators import Factors
from daunce_api.core.members import member_losses
from daunce_api.core.spectrum import Setting
from daunce_api.errors import DataError

_ROWS = 4_096


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores between groups of training examples and groups of test examples (or single ones).

    Attributes:
        train_groups, test_groups: (G,) and (H,) labels, in order of first appearance; indices where no labels were
            given.
        score_GH: (G, H) sums of scores; positive = helpful. Pairs without a score count as zero.
        stderr_GH: (G, H) standard errors of the sums over the choice of members; NaN where losses are missing and a
            group has more than one example. For `correlation` column norms are taken as known.
        estimator, why: as in `top`.
    """

    train_groups: tuple[Hashable, ...]
    test_groups: tuple[Hashable, ...]
    score_GH: Floats
    stderr_GH: Floats
    estimator: str
    why: str


def group_scores(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    train_labels_N: Sequence[Hashable] | None = None,
    test_labels_M: Sequence[Hashable] | None = None,
    estimator: str = "auto",
    *,
    inclusion_KN: ArrayLike | None = None,
    noise: float | NDArray[np.float64] | None = None,
    rho: float | None = None,
    earlier: Checkpoints | None = None,
) -> GroupScores:
    """Sum scores over groups on either side.

    Args:
        train_labels_N, test_labels_M: any hashable labels, or None for every example by itself.
        train_loss_KN, test_loss_KM, estimator, inclusion_KN, noise, rho, earlier: as for `scores`.

    Returns:
        GroupScores.

    Raises:
        DataError: a label sequence of the wrong length. Otherwise as `scores`.
    """
    members = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, earlier)
    rows, row_of = _numbered(train_labels_N, members.train_KN.shape[1], "training")
    columns, column_of = _numbered(test_labels_M, members.test_KM.shape[1], "test")
    choice = choose(members, estimator, Setting(noise, rho))
    blocks = score_blocks(choice.estimator, members, choice.setting)
    whole = slice(None)
    if isinstance(blocks, FactorBlocks):
        grouped = FactorBlocks(_grouped(blocks.factors, row_of, len(rows), column_of, len(columns)))
        score, error = grouped.block(whole, whole), grouped.stderr_block(whole, whole)
    else:
        score, error = _summed(blocks, row_of, len(rows), column_of, len(columns))
    return GroupScores(rows, columns, score, error, choice.estimator.name, choice.why)


def _numbered(
    labels: Sequence[Hashable] | None, count: int, side: str
) -> tuple[tuple[Hashable, ...], NDArray[np.int64]]:
    if labels is None:
        return tuple(range(count)), np.arange(count)
    if len(labels) != count:
        raise DataError(f"{len(labels)} labels were given for {count} {side} examples; each needs one.")
    number: dict[Hashable, int] = {}
    of = np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.int64)
    return tuple(number), of


def _add_up(values_RX: Floats, group_of: NDArray[np.int64], groups: int) -> Floats:
    """(R, G) sums of columns."""
    order = np.argsort(group_of, kind="stable")
    starts = np.searchsorted(group_of[order], np.arange(groups))
    return np.asarray(np.add.reduceat(values_RX[:, order], starts, axis=1))


def _grouped(f: Factors, row_of: NDArray[np.int64], rows: int, column_of: NDArray[np.int64], columns: int) -> Factors:
    single = rows == row_of.size and columns == column_of.size
    return replace(
        f,
        left_RN=_add_up(f.left_RN, row_of, rows),
        right_RM=_add_up(f.right_RM, column_of, columns),
        errors=tuple(replace(term, right_RM=_add_up(term.right_RM, column_of, columns)) for term in f.errors),
        standardised=f.standardised and single,
    )


def _summed(
    blocks: ScoreBlocks, row_of: NDArray[np.int64], rows: int, column_of: NDArray[np.int64], columns: int
) -> tuple[Floats, Floats]:
    score, error = np.zeros((rows, columns)), np.full((rows, columns), np.nan)
    alone_row, alone_column = np.bincount(row_of) == 1, np.bincount(column_of) == 1
    for start in range(0, blocks.shape[0], _ROWS):
        piece = slice(start, start + _ROWS)
        block = np.nan_to_num(blocks.block(piece, slice(None)))
        np.add.at(score, row_of[piece], _add_up(block, column_of, columns))
        single = np.ix_(np.flatnonzero(alone_row[row_of[piece]]), np.flatnonzero(alone_column[column_of]))
        place = np.ix_(row_of[piece][single[0].ravel()], column_of[single[1].ravel()])
        error[place] = blocks.stderr_block(piece, slice(None))[single]
    return score, error
