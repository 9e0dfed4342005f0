"""The linear datamodeling score (Park et al., "TRAK", 2023, section 2): how well scores predict retrained models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ..core.crossval import weighted_correlation
from ..errors import DataError

DRAWS = 1_000


@dataclass(frozen=True, eq=False)
class LDS:
    """The linear datamodeling score of a score matrix.

    Attributes:
        value: mean over test examples of the Spearman correlation over subsets; 1 is perfect, 0 is chance.
        low, high: 95 % bootstrap interval over subsets.
        per_test_M: (M,) the correlations; NaN for a test example whose truth or prediction does not vary.
    """

    value: float
    low: float
    high: float
    per_test_M: NDArray[np.float64]


def lds(
    score_NM: ArrayLike, truth_inclusion_SN: ArrayLike, truth_loss_SM: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> LDS:
    """Judge scores against models that were trained on random subsets.

    The prediction for subset S and test example j is ``-sum of score_ij over i in S`` (positive scores are helpful, so
    more of them mean a lower loss); it is compared with the measured loss by Spearman's rank correlation over subsets.

    Args:
        score_NM: (N, M) scores, positive = helpful.
        truth_inclusion_SN: (S, N) bool (or multiplicities): what each model of the truth was trained on. None of them
            may be a member of the ensemble behind the scores.
        truth_loss_SM: (S, M) losses of those models, or (S, R, M) with R training seeds, which are averaged.
        draws, seed: bootstrap over subsets.

    Returns:
        LDS. The interval is the mean's over redrawn subsets, with ranks taken once over all subsets.

    Raises:
        DataError: shapes differ, fewer than 3 subsets, or entries that are not finite.
    """
    score, inclusion = np.asarray(score_NM, dtype=np.float64), np.asarray(truth_inclusion_SN, dtype=np.float64)
    loss = np.asarray(truth_loss_SM, dtype=np.float64)
    if loss.ndim == 3:
        loss = loss.mean(axis=1)
    if (
        score.ndim != 2
        or inclusion.ndim != 2
        or inclusion.shape[1:] != score.shape[:1]
        or loss.shape != (inclusion.shape[0], score.shape[1])
    ):
        raise DataError(
            f"Scores {score.shape}, truth's inclusion {inclusion.shape} and truth's losses {np.shape(truth_loss_SM)} "
            "do not fit: they must be (N, M), (S, N) and (S, M) or (S, R, M)."
        )
    if inclusion.shape[0] < 3:
        raise DataError(
            f"A rank correlation over {inclusion.shape[0]} subsets says nothing; the truth needs at least 3."
        )
    for name, values in (("scores", score), ("truth's losses", loss)):
        if not np.isfinite(values).all():
            raise DataError(f"The {name} have NaN or infinite entries; leave out the examples concerned.")
    x, y = rankdata(-(inclusion @ score), axis=0), rankdata(loss, axis=0)
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), draws)
    weights = np.vstack([np.ones(len(x)), counts])
    correlation = weighted_correlation(x, y, weights)
    constant = (np.ptp(x, axis=0) == 0) | (np.ptp(y, axis=0) == 0)
    correlation[:, constant] = np.nan
    if constant.all():
        return LDS(float("nan"), float("nan"), float("nan"), correlation[0])
    means = np.nanmean(correlation, axis=1)
    low, high = np.quantile(means[1:] - np.median(means[1:]), [0.025, 0.975])
    value = float(means[0])
    return LDS(value, max(-1.0, value + float(low)), min(1.0, value + float(high)), correlation[0])
