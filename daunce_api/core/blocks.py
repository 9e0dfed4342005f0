"""Scores of one estimator block by block, whether or not losses are missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from daunce_api.core.checkpoints import Checkpoints, Floats
from daunce_api.core.complete import FactorBlocks
from daunce_api.core.estimators import Estimator
from daunce_api.core.incomplete import PairwiseBlocks, PatternBlocks
from daunce_api.core.members import MemberLosses
from daunce_api.core.spectrum import Setting, stabilised

__all__ = ["FactorBlocks", "ScoreBlocks", "score_blocks"]


class ScoreBlocks(Protocol):
    """Scores that are computed where they are asked for."""

    shape: tuple[int, int]

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores of some training (rows) and test examples (columns); NaN where there is no answer."""
        ...

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) their standard errors."""
        ...


def score_blocks(estimator: Estimator, members: MemberLosses, setting: Setting) -> ScoreBlocks:
    """Scores of one estimator, ready to be computed block by block."""
    if not setting.checkpoints:
        members = members.final()
    if setting.log_offset is not None:
        members = _on_log_scale(members, setting.log_offset)
    if members.complete:
        return FactorBlocks(estimator.factorise(members, setting))
    if estimator.moment:
        return PairwiseBlocks(estimator, members)
    return PatternBlocks(estimator, members, setting)


def _on_log_scale(members: MemberLosses, log_offset: float) -> MemberLosses:
    *earlier, final = (stabilised(loss_KM, log_offset) for loss_KM in members.test_stages)
    if members.earlier is None:
        return replace(members, test_KM=final)
    checkpoints = Checkpoints(members.earlier.train_loss_SKN, np.stack(earlier))
    return replace(members, test_KM=final, earlier=checkpoints)
