"""Removal: by how much an answer's loss rises when a ranking's top examples are left out, against random ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Rise:
    """Mean rise of the loss over answers, in the unit of the losses; higher = the removed examples mattered more.

    Attributes:
        value: the mean.
        low, high: 95 % interval; None with a single random removal, which shows no noise.
    """

    value: float
    low: float | None
    high: float | None


def removal_rise(without_T: ArrayLike, random_RT: ArrayLike) -> Rise:
    """Losses without a ranking's top examples against losses without random ones.

    Answer j has one model of its own, trained without the top examples of j, and R models trained without random ones
    that all answers share. With ``rise_j = without_j - mean of random_rj over r``, the mean over answers errs in two
    independent ways, and the interval is Welch's for the sum of two means:

    * A, over answers: answers differ, and each has only one fine-tune. The sample variance of ``rise_j`` over answers
      holds both, divided by T. It is not taken below the variance of a loss over random removals (mean over answers),
      the noise that any one fine-tune has, since few answers can agree by chance. One answer has that noise alone, and
      its interval is about this answer only.
    * B, over random removals: all answers lean on the same R models, so a random model that came out badly moves all
      of them together and does not average out over answers. Its variance is that of a model's mean loss over
      answers, divided by R.

    The half width is ``t sqrt(A + B)`` with Satterthwaite's ``(A + B)^2 / (A^2 / a + B^2 / (R - 1))`` degrees of
    freedom, a = T - 1 (R - 1 where A is the noise of random removals). It errs on the wide side: what of B belongs to
    single answers is in A too, and random removals also differ in what they remove. Sources: Welch 1947, Satterthwaite
    1946; coverage is simulated in the tests.

    Args:
        without_T: (T,) loss of each answer under its own model.
        random_RT: (R, T) losses of the same answers under every random model.

    Raises:
        DataError: shapes differ, nothing to compare, or entries that are not finite.
    """
    without, random = np.asarray(without_T, dtype=np.float64), np.asarray(random_RT, dtype=np.float64)
    if without.ndim != 1 or random.ndim != 2 or random.shape[1:] != without.shape or not random.size:
        raise DataError(
            f"Losses {without.shape} and random ones {random.shape} must be (T,) and (R, T), neither empty."
        )
    if not (np.isfinite(without).all() and np.isfinite(random).all()):
        raise DataError("Losses of the retrained models have NaN or infinite entries; leave out the answers concerned.")
    randoms, answers = random.shape
    rise = without - random.mean(axis=0)
    value = float(rise.mean())
    if randoms < 2:
        return Rise(value, None, None)
    spread, freedom = float(random.var(axis=0, ddof=1).mean()), randoms - 1
    if answers > 1 and rise.var(ddof=1) >= spread:
        spread, freedom = float(rise.var(ddof=1)), answers - 1
    over_answers = spread / answers
    over_randoms = float(random.mean(axis=1).var(ddof=1)) / randoms
    variance = over_answers + over_randoms
    if variance == 0:
        return Rise(value, value, value)
    together = over_answers**2 / freedom + over_randoms**2 / (randoms - 1)
    # One answer: both parts are the same estimate, with its R - 1 degrees of freedom.
    free = randoms - 1 if answers == 1 else variance**2 / together
    half = float(stats.t.ppf(0.975, free) * np.sqrt(variance))
    return Rise(value, value - half, value + half)
