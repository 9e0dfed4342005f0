"""What a report shows of a removal ranking, where answers are marked as wanted or unwanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Retrained:
    """A marked answer before and after a retraining without the proposed examples.

    ``loss`` in nats per token and ``probability`` (geometric mean over the answer's tokens) under models of all data,
    of the cleaned data, and of data without as many random examples. ``change``: of the loss, with its 95 % interval.
    ``said``: what a model of all data and one of the cleaned data answer by themselves; None where it is not known.
    """

    id: str
    verdict: str
    loss: tuple[float, ...]
    probability: tuple[float, ...]
    change: tuple[float, ...]
    said: tuple[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Candidates:
    """Training examples by what taking them out would do, most useful removal first.

    Attributes:
        effect_N: by how much the example favors unwanted over wanted answers, in the unit of the ranking; NaN where it
            is not known.
        proposed_N: whether the ranking proposes to remove it.
        label: name of the column, two or three words.
        words: one or two sentences on how the ranking was made.
        verdict: what retraining without proposed examples did, in a sentence; '' where nothing was retrained.
        retrained: the same for each marked answer.
    """

    effect_N: NDArray[np.float64]
    proposed_N: NDArray[np.bool_]
    label: str
    words: str
    verdict: str = ""
    retrained: tuple[Retrained, ...] = ()


HOW_TO_MARK = (
    "Mark answers to see what to take out: daunce fix RUN --unwanted ID (and --wanted ID for those that should stay), "
    "a field verdict in the test file, or the ticks in daunce view. This table then ranks the examples by their effect "
    "on unwanted against wanted ones."
)
