"""Which tokens of a test answer a training example helps or hurts.

Scores are linear in the test example's loss (or in its logarithm, which has the same sign), so the loss of every token
can stand in the place of a test example: the result is that token's part of the score, up to a common factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daunce_api import core
from daunce_api.attribution import Attribution
from daunce_api.core.blocks import FactorBlocks, score_blocks

DEPTH = 10


@dataclass(frozen=True, eq=False)
class TokenView:
    """Tokens of the M listed test answers, one after the other.

    Attributes:
        pieces: T strings in all.
        edges: (M + 1,) where each answer's tokens begin.
        loss_T: mean loss of each token over members, nats.
        part_proponents, part_opponents: int8, for each answer its (DEPTH, T_j) parts flattened: share of each token in
            the pair's score, 127 = the largest of the pair.
    """

    pieces: list[str]
    edges: NDArray[np.int64]
    loss_T: NDArray[Any]
    part_proponents: NDArray[np.int8]
    part_opponents: NDArray[np.int8]


def token_view(
    attribution: Attribution,
    columns: list[int],
    proponents_Mk: NDArray[np.int64],
    opponents_Mk: NDArray[np.int64],
) -> TokenView | None:
    """Token parts of the first DEPTH proponents and opponents; None without token log-probabilities of the answers."""
    table = attribution.tokens.get("test")
    if table is None:
        return None
    loss_KT = -np.concatenate([table.logprobs[j] for j in columns], axis=1)
    edges = np.concatenate([[0], np.cumsum([len(table.pieces[j]) for j in columns])])
    seen = np.isfinite(loss_KT)
    mean = np.where(seen, loss_KT, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    flat: list[list[NDArray[np.int8]]] = [[], []]
    blocks = None
    if seen.all() and np.isfinite(attribution.train_loss_KN).all():
        # The scores of one token by itself would be standardised under correlation; its parts are the covariance's.
        name = attribution.choice.estimator.name
        estimator = core.ESTIMATORS["covariance" if name == "correlation" else name]
        members = core.member_losses(attribution.train_loss_KN, loss_KT, attribution.inclusion_KN)
        blocks = score_blocks(estimator, members, replace(attribution.choice.setting, log_offset=None))
    for side, index_Mk in zip(flat, (proponents_Mk, opponents_Mk), strict=True):
        for j in range(len(columns)):
            own = np.arange(edges[j], edges[j + 1])
            part = np.zeros((DEPTH, own.size))
            rows = index_Mk[j, :DEPTH]
            rows = rows[rows >= 0]
            if isinstance(blocks, FactorBlocks) and rows.size:
                part[: rows.size] = blocks.select(rows, own).block(slice(None), slice(None))
            largest = np.abs(part).max(axis=1, keepdims=True)
            side.append(np.round(127 * part / np.where(largest > 0, largest, 1)).astype(np.int8).ravel())
    pieces = [piece for j in columns for piece in table.pieces[j]]
    return TokenView(pieces, edges.astype(np.int64), mean, *(np.concatenate(side) for side in flat))
