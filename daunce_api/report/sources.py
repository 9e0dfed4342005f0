"""What each source of the training data does to each group of answers: the numbers behind the heat map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..attribution import Attribution
from ..core import significance_threshold

MAX_GROUPS = 60
"""Rows, and columns, of the heat map; what does not fit is added up in one more."""
_CANDIDATES = 500
"""Columns that are looked at to find the strongest."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SourceScores:
    """Total scores between groups.

    Attributes:
        rows, columns: the S training groups and T groups of answers: names of sources, or positions of test examples
            where these have no sources; None, the last, for all others together.
        total_ST: sum of scores over the group's training examples, mean over the group's test examples; > 0 helps.
        stderr_ST: its standard error over members, NaN where it is not known.
        rows_count, columns_count: examples in each group.
        threshold: |z| from which a total is significant (two-sided 5 %).
        other_rows, other_columns: how many groups stand behind None; 0 where there is none.
    """

    rows: tuple[str | None, ...]
    columns: tuple[str | int | None, ...]
    total_ST: Floats
    stderr_ST: Floats
    rows_count: list[int]
    columns_count: list[int]
    threshold: float
    other_rows: int
    other_columns: int

    @property
    def of_answers(self) -> bool:
        """Whether columns are single answers."""
        return isinstance(self.columns[0], int)

    @property
    def note(self) -> str:
        """What the map leaves out, in words; "" where it shows everything."""
        sides = (
            (self.rows, self.other_rows, "sources"),
            (self.columns, self.other_columns, "answers" if self.of_answers else "groups of answers"),
        )
        shown = [f"the {len(x) - 1} of {len(x) - 1 + others:,} {name}" for x, others, name in sides if others]
        if not shown:
            return ""
        return (
            f"Shown are {' and '.join(shown)} whose effects are the most certain; “all others” takes the rest "
            "together, with its own interval."
        )


def source_scores(attribution: Attribution, shown: Sequence[int]) -> SourceScores:
    """Scores summed by source. Test examples without sources stand for themselves: the ``shown`` ones, by position."""
    train_N: list[Hashable] = [*attribution.labels("train")]
    test_M: list[Hashable] = [*attribution.labels("test")]
    if len(set(test_M)) == 1:
        test_M = [*range(len(attribution.test))]
        candidates: set[Hashable] = {*shown[:_CANDIDATES]}
    else:
        candidates = {name for name, _ in Counter(test_M).most_common(_CANDIDATES)}
    groups = len(set(train_N)), len(set(test_M))
    test_M = _folded(test_M, candidates)
    found = attribution.grouped(train_N, test_M)
    rows, columns = _strongest(found, 0), _strongest(found, 1)
    if not rows.issuperset(found.train_groups) or not columns.issuperset(found.test_groups):
        train_N, test_M = _folded(train_N, rows), _folded(test_M, columns)
        # Anew: the standard error of a sum is not the sum of standard errors.
        found = attribution.grouped(train_N, test_M)
    # Rows in the order of the columns, so that what helps itself stands on the diagonal.
    place = {name: t for t, name in enumerate(found.test_groups)}
    row_order = sorted(
        range(len(found.train_groups)),
        key=lambda s: (
            found.train_groups[s] is None,
            place.get(found.train_groups[s], len(place)),
            str(found.train_groups[s]),
        ),
    )
    column_order = sorted(range(len(place)), key=lambda t: found.test_groups[t] is None)
    of_row, of_column = Counter(train_N), Counter(test_M)
    shape = np.ix_(row_order, column_order)
    columns_count = [of_column[found.test_groups[t]] for t in column_order]
    total, stderr = (np.asarray(x[shape] / columns_count, np.float64) for x in (found.score_GH, found.stderr_GH))
    names = [found.train_groups[s] for s in row_order]
    kinds = [found.test_groups[t] for t in column_order]
    return SourceScores(
        tuple(None if name is None else str(name) for name in names),
        tuple(kind if isinstance(kind, int) or kind is None else str(kind) for kind in kinds),
        total,
        stderr,
        [of_row[name] for name in names],
        columns_count,
        significance_threshold(len(attribution.members)),
        *(
            count - len(kept) + 1 if None in kept else 0
            for count, kept in zip(groups, (of_row, of_column), strict=True)
        ),
    )


def _folded(labels: list[Hashable], kept: set[Hashable]) -> list[Hashable]:
    return [label if label in kept else None for label in labels]


def _strongest(found: core.GroupScores, axis: int) -> set[Hashable]:
    """The groups with the strongest cells: by |z|, or by |score| where some errors are not known."""
    groups = (found.train_groups, found.test_groups)[axis]
    names = [g for g, name in enumerate(groups) if name is not None]
    # One that is left over takes as much room as "all others" would.
    if len(groups) <= MAX_GROUPS + 1:
        return {groups[g] for g in names}
    size = np.abs(found.score_GH)
    if np.isfinite(found.stderr_GH).all():
        size = np.divide(size, found.stderr_GH, out=np.zeros_like(size), where=found.stderr_GH > 0)
    strength = size.max(axis=1 - axis)
    return {groups[g] for g in sorted(names, key=lambda g: -strength[g])[:MAX_GROUPS]}
