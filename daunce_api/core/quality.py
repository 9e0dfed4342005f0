"""self_lds: the quality of a run, from the run alone.

Members are split into folds. Scores fitted on the other folds predict the test losses of a held-out member from its
inclusion row, ``-inclusion @ score``, and the prediction is compared with what was measured, by Spearman's rank
correlation over members, for each test example (METHOD, "What else was measured", lambda). It is the LDS of the run
judged
on its own members: no fine-tune is spent on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from daunce_api.core.blocks import ScoreBlocks, score_blocks
from daunce_api.core.estimators import Estimator
from daunce_api.core.members import Floats, MemberLosses
from daunce_api.core.spectrum import Setting, centred, spectrum_of
from daunce_api.errors import ConfigurationError, NotEnoughMembersError

FOLDS = 10
MINIMUM_MEMBERS = 8
_ROWS = 8_192


@dataclass(frozen=True)
class SelfLDS:
    """An estimate of the LDS of a run, made from the run's own members.

    Attributes:
        value: mean over test examples of the Spearman correlation between predicted and measured losses of held-out
            members; 1 is perfect, 0 is chance.
        low, high: 95 % bootstrap interval over members.
        estimator: which estimator it is about.
        members: K.
    """

    value: float
    low: float
    high: float
    estimator: str
    members: int


def fold_of(members: int, folds: int = FOLDS) -> NDArray[np.int64]:
    """(K,) fold of each member, round-robin, so that the split depends on nothing but K."""
    return np.arange(members) % min(folds, members)


def held_out_predictions(
    members: MemberLosses, estimators: Sequence[tuple[Estimator, Setting]], folds: int = FOLDS
) -> list[NDArray[np.float64]]:
    """Predict every member's test losses from its inclusion row with scores fitted on the other folds.

    Filter estimators share one decomposition a fold, so that judging twenty of them costs little more than one.

    Returns:
        one (K, M) array for each estimator, in nats up to the estimator's own scale and offset.
    """
    if members.inclusion_KN is None:
        raise ConfigurationError("self_lds compares members by their subsets: pass inclusion_KN.")
    if members.count < MINIMUM_MEMBERS:
        raise NotEnoughMembersError(
            f"self_lds needs at least {MINIMUM_MEMBERS} members, {members.count} are scored. Scores can be computed "
            "already; "
            "their quality is known when more members are."
        )
    fold = fold_of(members.count, folds)
    out = [np.full(members.test_KM.shape, np.nan) for _ in estimators]
    for f in range(int(fold.max()) + 1):
        held, rest = fold == f, members.rows(fold != f)
        inclusion = np.asarray(members.inclusion_KN[held], dtype=np.float64)
        inclusion -= np.asarray(rest.inclusion_KN).mean(axis=0, dtype=np.float64)
        shared = None
        if rest.complete and any(e.filter is not None for e, _ in estimators):
            spectrum = spectrum_of(rest, Setting())
            projected = (inclusion @ centred(rest.train_KN).T.astype(np.float64)) @ spectrum.u_KD
            shared = projected, spectrum.u_KD.T @ centred(rest.test_KM), spectrum
        for index, (estimator, setting) in enumerate(estimators):
            if shared is not None and estimator.filter is not None:
                noisy = replace(shared[2], noise_energy=setting.noise_energy(rest.train_KN.shape[1]))
                phi = estimator.filter(noisy, setting)
                out[index][held] = -(shared[0] * phi) @ shared[1]
            else:
                out[index][held] = -_weighted_sum(inclusion, score_blocks(estimator, rest, setting))
    return out


def _weighted_sum(weight_SN: Floats, blocks: ScoreBlocks) -> NDArray[np.float64]:
    """(S, M) weight @ score without the N x M matrix; pairs without a score count as zero."""
    total = np.zeros((weight_SN.shape[0], blocks.shape[1]))
    for start in range(0, blocks.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        total += weight_SN[:, rows] @ np.nan_to_num(blocks.block(rows, slice(None)))
    return total


def column_spearman(x_SM: ArrayLike, y_SM: ArrayLike) -> NDArray[np.float64]:
    """(M,) Spearman correlation of matching columns, over the rows where both are observed; 0 for a constant column.

    NaN where fewer than 3 rows are observed.
    """
    x, y = np.array(x_SM, dtype=np.float64), np.array(y_SM, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    if both.all():
        return _rank_correlation(x, y)
    out = np.full(x.shape[1], np.nan)
    for j in range(x.shape[1]):
        seen = both[:, j]
        if seen.sum() >= 3:
            out[j] = _rank_correlation(x[seen, j : j + 1], y[seen, j : j + 1])[0]
    return out


def _rank_correlation(x_SM: Floats, y_SM: Floats) -> NDArray[np.float64]:
    x, y = rankdata(x_SM, axis=0), rankdata(y_SM, axis=0)
    x -= x.mean(axis=0)
    y -= y.mean(axis=0)
    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    cross = (x * y).sum(axis=0)
    return np.asarray(np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0))


def judge(prediction_KM: Floats, members: MemberLosses, estimator: str, *, draws: int = 200, seed: int = 0) -> SelfLDS:
    """Compare held-out predictions with what the members measured, with a bootstrap interval over members."""
    value = float(np.nanmean(column_spearman(prediction_KM, members.test_KM)))
    rng = np.random.default_rng(seed)
    values = np.array(
        [
            np.nanmean(column_spearman(prediction_KM[pick], members.test_KM[pick]))
            for pick in rng.integers(0, members.count, size=(draws, members.count))
        ]
    )
    # Repeated members shift the bootstrap's centre; its spread is what carries over.
    low, high = np.nanquantile(values - np.nanmean(values), [0.025, 0.975])
    return SelfLDS(value, value + float(low), value + float(high), estimator, members.count)
