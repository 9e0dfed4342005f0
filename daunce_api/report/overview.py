"""What the report says about the run as a whole: sources, suspicious examples, quality and the loss matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from daunce_api import core
from daunce_api.attribution import Attribution
from daunce_api.core.blocks import FactorBlocks, score_blocks
from daunce_api.core.quality import MINIMUM_MEMBERS
from daunce_api.core.uncertainty import significance_threshold
from daunce_api.report.facts import QualityPoint

_ROWS = 4_096
_CURVE_POINTS = 7
_PICTURE = (96, 480)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SourceScores:
    """Total scores between groups.

    Attributes:
        rows, columns: names of the S training groups and T test groups.
        total_ST: sum of scores over the group's training examples, mean over the group's test examples; > 0 helps.
        stderr_ST: its standard error over members, NaN where it is not known (correlation, missing losses).
        rows_count, columns_count: examples in each group.
        threshold: |z| from which a total can be told from zero (two-sided 5 %).
    """

    rows: list[str]
    columns: list[str]
    total_ST: Floats
    stderr_ST: Floats
    rows_count: list[int]
    columns_count: list[int]
    threshold: float


@dataclass(frozen=True, eq=False)
class TrainView:
    """One number a training example, for the table of all of them.

    Attributes:
        mean_score_N: mean score over the test examples; negative = on balance harmful.
        self_influence_N: mean loss of members that did not train on it minus that of members that did, nats (Feldman &
            Zhang's memorisation estimate): high for examples that nothing else in the data explains.
        suspicion_N: 0 to 1, mean of the two ranks (high self-influence, low mean score), 1 = look here first.
        included_N: in how many members' subsets it was.
        distinguishable: share of all pairs whose score can be told from zero at 5 %.
    """

    mean_score_N: Floats
    self_influence_N: Floats
    suspicion_N: Floats
    included_N: NDArray[np.int64]
    distinguishable: float


def source_scores(attribution: Attribution, columns: list[int]) -> SourceScores:
    """Scores summed by source. Test examples without sources stand for themselves."""
    labels = [attribution.labels("test")[j] for j in columns]
    if len(set(labels)) == 1:
        labels = [attribution.test[j].id for j in columns]
    names, first = np.unique(np.array(labels), return_index=True)
    column_names = [str(n) for n in names[np.argsort(first)]]
    column_of = np.array([column_names.index(label) for label in labels])
    # Rows in the order of the columns, so that what helps itself stands on the diagonal.
    of_train = attribution.labels("train")
    place = {name: t for t, name in enumerate(column_names)}
    row_names = sorted(set(of_train), key=lambda name: (place.get(name, len(place)), name))
    row_of = np.array([row_names.index(label) for label in of_train])
    S, T = len(row_names), len(column_names)
    group_NS = np.eye(S)[row_of]
    group_MT = np.eye(T)[column_of] / np.bincount(column_of)
    threshold = significance_threshold(len(attribution.members))
    blocks = _blocks(attribution)
    if isinstance(blocks, FactorBlocks) and not blocks.factors.standardised:
        f = blocks.factors
        errors = tuple(replace(term, right_KM=term.right_KM[:, columns] @ group_MT) for term in f.errors)
        grouped = FactorBlocks(core.Factors(f.left_KN @ group_NS, f.right_KM[:, columns] @ group_MT, errors))
        total, stderr = (part(slice(None), slice(None)) for part in (grouped.block, grouped.stderr_block))
    else:
        total, stderr = np.zeros((S, T)), np.full((S, T), np.nan)
        for start in range(0, len(attribution.train), _ROWS):
            rows = slice(start, start + _ROWS)
            total += group_NS[rows].T @ np.nan_to_num(blocks.block(rows, slice(None)))[:, columns] @ group_MT
    return SourceScores(
        row_names,
        column_names,
        np.asarray(total, dtype=np.float64),
        np.asarray(stderr, dtype=np.float64),
        np.bincount(row_of, minlength=S).tolist(),
        np.bincount(column_of, minlength=T).tolist(),
        threshold,
    )


def train_view(attribution: Attribution) -> TrainView:
    """Mean score, self-influence and suspicion of every training example, in one pass over all pairs."""
    blocks = _blocks(attribution)
    threshold = significance_threshold(len(attribution.members))
    mean, marked, pairs = [], 0, 0
    for start in range(0, len(attribution.train), _ROWS):
        rows = slice(start, start + _ROWS)
        score, stderr = blocks.block(rows, slice(None)), blocks.stderr_block(rows, slice(None))
        known = np.isfinite(score) & np.isfinite(stderr)
        marked += int((np.abs(score[known]) >= threshold * stderr[known]).sum())
        pairs += int(known.sum())
        seen = np.isfinite(score)
        mean.append(np.where(seen, score, 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1))
    mean_N = np.concatenate(mean).astype(np.float64)
    self_N = self_influence(attribution)
    suspicion = (_share_below(self_N) + _share_below(-mean_N)) / 2
    included = attribution.inclusion_KN.astype(bool).sum(axis=0)
    return TrainView(mean_N, self_N, suspicion, included, marked / max(pairs, 1))


def self_influence(attribution: Attribution) -> Floats:
    """(N,) loss left out minus loss trained on, nats; NaN where an example was in no subset, or in all of them."""
    inside = attribution.inclusion_KN.astype(bool)
    loss, seen = attribution.train_loss_KN, np.isfinite(attribution.train_loss_KN)
    out = []
    for mask in (seen & ~inside, seen & inside):
        count = mask.sum(axis=0)
        total = np.where(mask, loss, 0).sum(axis=0, dtype=np.float64)
        out.append(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))
    return np.asarray(out[0] - out[1])


def quality_curve(attribution: Attribution) -> tuple[QualityPoint, ...]:
    """self_lds of the first 8, ... K members, for the curve of quality against members."""
    members = len(attribution.members)
    if members < MINIMUM_MEMBERS:
        return ()
    points = []
    for k in np.unique(np.geomspace(MINIMUM_MEMBERS, members, _CURVE_POINTS).round().astype(int)):
        found = core.self_lds(
            attribution.train_loss_KN[:k],
            attribution.test_loss_KM[:k],
            attribution.inclusion_KN[:k],
            attribution.estimator,
            attribution.noise,
            attribution.rho,
        )
        points.append(QualityPoint(int(k), found.value, found.low, found.high))
    return tuple(points)


def loss_picture(attribution: Attribution) -> tuple[NDArray[np.int8], float, list[int]]:
    """The loss matrix at a glance: members down, examples across (training by source, then test), centred by column.

    Returns:
        int8 (rows, columns), 127 = the limit; the limit in nats (98th percentile of the size of a cell); and how many
        columns the training and the test examples take.
    """
    order = np.argsort(np.array(attribution.labels("train")), kind="stable")
    sides = [attribution.train_loss_KN[:, order], attribution.test_loss_KM]
    width = sum(s.shape[1] for s in sides)
    cells = []
    for side in sides:
        seen = np.isfinite(side)
        mean = np.where(seen, side, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
        share = max(1, round(_PICTURE[1] * side.shape[1] / width)) if width > _PICTURE[1] else side.shape[1]
        cells.append(
            _shrink(np.where(seen, side - mean, 0), min(_PICTURE[0], side.shape[0]), min(share, side.shape[1]))
        )
    picture = np.concatenate(cells, axis=1)
    limit = float(np.quantile(np.abs(picture), 0.98)) or 1.0
    return (
        np.clip(np.round(picture / limit * 127), -127, 127).astype(np.int8),
        limit,
        [c.shape[1] for c in cells],
    )


def _shrink(matrix: Floats, rows: int, columns: int) -> Floats:
    """Means over a grid of blocks."""
    for axis, size in ((0, rows), (1, columns)):
        edges = np.linspace(0, matrix.shape[axis], size + 1).round().astype(int)
        counts = np.diff(edges)
        matrix = np.add.reduceat(matrix, edges[:-1], axis=axis) / (counts[:, None] if axis == 0 else counts)
    return matrix


def _share_below(value_N: Floats) -> Floats:
    """(N,) rank between 0 (lowest) and 1 (highest), .5 where unknown."""
    out = np.full(value_N.shape, 0.5)
    known = np.isfinite(value_N)
    if known.sum() > 1:
        out[known] = (rankdata(value_N[known]) - 1) / (known.sum() - 1)
    return out


def _blocks(attribution: Attribution) -> Any:
    members = core.member_losses(attribution.train_loss_KN, attribution.test_loss_KM, attribution.inclusion_KN)
    return score_blocks(attribution.choice.estimator, members, attribution.choice.setting)
