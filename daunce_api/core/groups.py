"""Scores of groups (sources, authors, files) with their own standard errors.

A group's score is the sum of its members' scores, so it is a sum of columns before the product: as cheap as one
example. Its standard error is taken over members of the ensemble for the sum as a whole, so that what its examples
share is counted as shared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError
from .blocks import score_blocks
from .checkpoints import Checkpoints, Floats
from .choice import Choice, choose
from .members import MemberLosses, member_losses
from .spectrum import Setting


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores between groups of training examples and groups of test examples (or single ones).

    Attributes:
        train_groups, test_groups: (G,) and (H,) labels, in order of first appearance; indices where no labels were
            given.
        score_GH: (G, H) sums of scores; positive = helpful. Examples without a single loss are left out, so that a
            group's score is that of its other examples, and NaN where it has none. Of the others, pairs without a score
            count as zero.
        stderr_GH: (G, H) standard errors of the sums over the choice of members, of the same pairs. Where losses are
            missing a member counts for the pairs of which it has both; NaN if a pair has a score but no standard error.
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
    return grouped(members, choose(members, estimator, Setting(noise, rho)), train_labels_N, test_labels_M)


def grouped(
    members: MemberLosses,
    choice: Choice,
    train_labels_N: Sequence[Hashable] | None = None,
    test_labels_M: Sequence[Hashable] | None = None,
) -> GroupScores:
    """`group_scores` of an estimator that is chosen already. Raises DataError for labels of the wrong length."""
    rows, row_of = _numbered(train_labels_N, members.train_KN.shape[1], "training")
    columns, column_of = _numbered(test_labels_M, members.test_KM.shape[1], "test")
    score, error = score_blocks(choice.estimator, members, choice.setting).group_block(row_of, column_of)
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
