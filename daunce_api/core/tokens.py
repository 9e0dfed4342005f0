"""Which tokens carry a pair's score.

An example's loss is the mean (or sum) of its token losses, and `covariance` and the filters are linear in the loss
deviations of either side. So a pair's score is a sum over pairs of tokens, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError, DataError
from .checkpoints import Checkpoints, Floats, Stages
from .estimators import estimator_named
from .losses import Reduction, token_losses
from .members import member_losses
from .spectrum import Setting, spectrum_of


@dataclass(frozen=True, eq=False)
class TokenScores:
    """A pair's score, split over tokens. Positive = helpful, as for whole examples.

    Attributes:
        score_TU: (T, U) share of training token t and test token u.
        train_T: (T,) share of each training token, summed over test tokens.
        test_U: (U,) share of each test token, summed over training tokens.
        total: the pair's score, the sum of everything.
    """

    score_TU: Floats
    train_T: Floats
    test_U: Floats
    total: float


def token_scores(
    train_logprobs_KT: ArrayLike,
    test_logprobs_KU: ArrayLike,
    estimator: str = "covariance",
    *,
    train_loss_KN: ArrayLike | None = None,
    inclusion_KN: ArrayLike | None = None,
    noise: float | None = None,
    rho: float | None = None,
    ridge: float | None = None,
    reduction: Reduction = "mean",
) -> TokenScores:
    """Split the score of one training and one test example over their completion tokens.

    With earlier checkpoints every array of losses or log-probabilities has an axis of S + 1 stages in front, the final
    models last. Without them the split is that of the final models' score, also where the pair's score uses
    checkpoints.

    Args:
        train_logprobs_KT: (K, T) or (S + 1, K, T) natural-log probabilities of the training example's completion tokens
            under each member.
        test_logprobs_KU: (K, U) or (S + 1, K, U) those of the test example.
        estimator: `covariance`, or a filter (`whitened`, `half_whitened`, `matched`).
        train_loss_KN: (K, N) or (S + 1, K, N) losses of the whole training set, which a filter's spectrum comes from.
        inclusion_KN, noise, rho, ridge: as for `scores` and `Setting`.
        reduction: how losses are reduced to examples; the total is the score under that reduction.

    Returns:
        TokenScores; the total equals the pair's entry of `scores` for the same losses (test losses taken as they
        are, as every estimator but "auto" does).

    Raises:
        ConfigurationError: an estimator that is not linear in the losses, or a filter without the training losses.
        DataError: missing entries.
    """
    train, test = (token_losses(values, reduction) for values in (train_logprobs_KT, test_logprobs_KU))
    if train.ndim not in (2, 3) or train.shape[:-1] != test.shape[:-1] or not train.size or not test.size:
        raise DataError(
            "Token log-probabilities must be (K, T) and (K, U), or (S + 1, K, T) and (S + 1, K, U), none empty; got "
            f"{train.shape}, {test.shape}."
        )
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise DataError(
            "Token scores need every token's log-probability under every member; leave out incomplete members."
        )
    entry = estimator_named(estimator)
    if entry.filter is None:
        raise ConfigurationError(f"{entry.name} is not linear in the losses of both sides; token scores need a filter.")
    train, test = (x if x.ndim == 3 else x[None] for x in (train, test))
    stages = Stages.of(np.ones(train.shape[:2], dtype=np.bool_))
    a, b = (stages.centre(x.reshape(-1, x.shape[2])) for x in (train, test))
    if reduction != "sum":
        a, b = a / train.shape[2], b / test.shape[2]
    if entry.name == "covariance":
        weighted = b / stages.freedom
    else:
        if train_loss_KN is None:
            raise ConfigurationError(f"{entry.name} takes its spectrum from the training losses: pass train_loss_KN.")
        whole = np.asarray(train_loss_KN)
        whole = whole if whole.ndim == 3 else whole[None]
        if whole.shape[:2] != train.shape[:2]:
            raise DataError(f"Training losses {whole.shape} and log-probabilities differ in stages or members.")
        members = member_losses(whole[-1], test[-1], inclusion_KN, Checkpoints(whole[:-1], test[:-1]))
        if not members.complete or members.count != train.shape[1] or not members.stages.present_TK.all():
            raise DataError("Token scores need complete training losses of the same members.")
        setting = Setting(noise, rho, ridge)
        spectrum = spectrum_of(members, setting)
        phi = entry.filter(spectrum, setting)
        weighted = spectrum.u_RD @ (phi[:, None] * (spectrum.u_RD.T @ b))
    score = a.T @ weighted
    return TokenScores(score, score.sum(axis=1), score.sum(axis=0), float(score.sum()))
