"""What the report says about the run as a whole: every training example, quality and the loss matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..attribution import Attribution
from ..core import MINIMUM_MEMBERS, significance_threshold

_ROWS = 4_096
_CURVE_POINTS = 4
_PICTURE = (96, 480)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrainView:
    """One number a training example, for the table of all of them.

    Attributes:
        mean_score_N: mean score over the test examples; negative = on balance harmful.
        self_influence_N: mean loss of members that did not train on it minus that of members that did, nats (Feldman &
            Zhang's memorisation estimate): high for examples that nothing else in the data explains.
        included_N: in how many members' subsets it was.
        significant: share of all pairs whose score is significant (5 %, per pair).
    """

    mean_score_N: Floats
    self_influence_N: Floats
    included_N: NDArray[np.int64]
    significant: float


def train_view(attribution: Attribution) -> TrainView:
    """Mean score and self-influence of every training example, in one pass over all pairs."""
    blocks = attribution.scored
    threshold = significance_threshold(len(attribution.members))
    mean, marked, pairs = [], 0, 0
    for start in range(0, len(attribution.train), _ROWS):
        rows = slice(start, start + _ROWS)
        score, z = blocks.block(rows), np.abs(blocks.z_block(rows))
        marked += int((z >= threshold).sum())
        pairs += int(np.isfinite(z).sum())
        seen = np.isfinite(score)
        mean.append(np.where(seen, score, 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1))
    mean_N = np.concatenate(mean).astype(np.float64)
    memorised = attribution.self_influence().memorised_N
    self_N = np.full(mean_N.shape, np.nan) if memorised is None else memorised
    included = attribution.inclusion_KN.astype(bool).sum(axis=0)
    return TrainView(mean_N, self_N, included, marked / max(pairs, 1))


def quality_curve(attribution: Attribution) -> list[list[float]]:
    """[members, self_lds, low, high] of the first 8, ... K members, for the curve of quality against members."""
    members = len(attribution.members)
    if members < MINIMUM_MEMBERS:
        return []
    points = []
    for k in np.unique(np.geomspace(MINIMUM_MEMBERS, members, _CURVE_POINTS).round().astype(int)):
        found = attribution.first(int(k)).self_lds
        if found is not None:
            points.append([int(k), found.value, found.low, found.high])
    return points


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
