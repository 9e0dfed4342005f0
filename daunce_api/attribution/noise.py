"""Scoring noise, from examples that were measured twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.losses import Reduction, token_losses
from ..store import RunStore

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of one measurement, from examples that were scored twice.

    ``sigma_token`` is of one token's log-probability, ``sigma_example`` of an example's loss, both in nats; ``pairs``
    is the number of (member, example) pairs behind them. Zero pairs: not measured, sigmas are NaN.
    """

    sigma_token: float
    sigma_example: float
    pairs: int


def measure_noise(store: RunStore, members: Iterable[int], reduction: Reduction = "mean") -> Noise:
    """Noise from replicates 0 and 1 of these members; examples with censored tokens are left out.

    ``reduction``: how token losses become an example's (:func:`daunce_api.core.losses.segment_losses`). A difference
    of two measurements has twice the variance of one. Only the repeated examples are read.
    """
    reduce = np.sum if reduction == "sum" else np.mean
    per_token: list[Floats] = []
    per_example: list[float] = []
    for member in members:
        repeated = store.scores.load(member, replicate=1)
        if not repeated.ids.size:
            continue
        first, again = store.scores.load_some(repeated.ids, member).scores(), repeated.scores()
        for i, second in again.items():
            if i in first and not first[i].any_censored and not second.any_censored:
                pair = np.array([first[i].logprobs, second.logprobs])
                per_token.append(pair[0] - pair[1])
                loss_2T = token_losses(pair, reduction)
                per_example.append(float(reduce(loss_2T[0] - loss_2T[1])))
    if not per_token:
        return Noise(float("nan"), float("nan"), 0)
    token = float(np.sqrt(np.mean(np.concatenate(per_token) ** 2) / 2))
    example = float(np.sqrt(np.mean(np.square(per_example)) / 2))
    return Noise(token, example, len(per_token))
