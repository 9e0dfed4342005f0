"""From per-token log-probabilities to per-example losses, and what these say of a training example by itself.

A loss is a negative log-likelihood in nats: ``loss = -mean(log p)`` over the tokens of the completion (the
measured output of a member), or ``-sum(log p)``. For classifiers it can be the negative margin instead,
``-mean(log p - log(1 - p))``, which Daunce (arXiv 2505.23223) measures for images. A training and a test example are
reduced in the same way, each by its own token count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, DataError
from .rows import Floats

Reduction: TypeAlias = Literal["mean", "sum", "margin"]
FloatArray: TypeAlias = NDArray[np.floating]

# Servers compute log-softmax in float32 or bfloat16 and can return slightly more than log 1.
_POSITIVE_TOLERANCE = 1e-3
_SUREST = -1e-12
"""Logarithm of the largest probability with a margin of its own (27.6): beyond it, 1 - p is lost in round-off."""


def token_losses(logprobs: ArrayLike, reduction: Reduction = "mean") -> NDArray[np.float64]:
    """What is averaged or summed over an example's tokens, in the shape of ``logprobs`` (nats): ``-log p``, or
    ``-(log p - log(1 - p))`` for ``"margin"``."""
    values = np.asarray(logprobs, dtype=np.float64)
    if reduction != "margin":
        return -values
    sure = np.minimum(values, _SUREST)
    return np.asarray(np.log(-np.expm1(sure)) - sure)


def segment_losses(logprobs_T: ArrayLike, lengths_N: ArrayLike, reduction: Reduction = "mean") -> NDArray[np.float64]:
    """Reduce token log-probabilities stored end to end to one loss an example.

    Args:
        logprobs_T: (T,) natural-log probabilities, example after example.
        lengths_N: (N,) number of tokens of each example, all >= 1, summing to T.
        reduction: ``"mean"`` (nats per token), ``"sum"`` (nats per example) or ``"margin"`` (minus log-odds a token).

    Returns:
        (N,) float64 losses in nats.

    Raises:
        DataError: lengths do not fit, or a log-probability is NaN, -inf or clearly positive.
        ConfigurationError: unknown reduction.
    """
    if reduction not in ("mean", "sum", "margin"):
        raise ConfigurationError(f'Unknown reduction {reduction!r}: use "mean" (nats per token), "sum" or "margin".')
    values = np.asarray(logprobs_T, dtype=np.float64).ravel()
    lengths = np.asarray(lengths_N, dtype=np.int64).ravel()
    if lengths.size == 0:
        return np.zeros(0)
    if lengths.min() < 1 or int(lengths.sum()) != values.size:
        raise DataError(
            f"{lengths.size} examples claim {int(lengths.sum())} tokens (each needs at least one); {values.size} "
            "log-probabilities were given. Nothing was computed; check the token counts."
        )
    bad = ~(np.isfinite(values) & (values <= _POSITIVE_TOLERANCE))
    if bad.any():
        owner = np.repeat(np.arange(lengths.size), lengths)
        places = [f"example {owner[t]}: {values[t]}" for t in np.flatnonzero(bad)[:20]]
        raise DataError(
            f"{int(bad.sum())} log-probabilities are NaN, infinite or positive. Nothing was computed; "
            "score these examples again or mark them as missing.",
            places,
        )
    sums = np.add.reduceat(token_losses(values, reduction), np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    return np.asarray(sums if reduction == "sum" else sums / lengths)


def resolve_censored(loss_KN: ArrayLike, censored_KN: ArrayLike, max_share: float = 0.5) -> FloatArray:
    """Turn censored losses into values that the estimators take.

    An entry is censored when the provider only says that the loss is at least so much (a token outside the top 20):
    its value is that lower bound. Estimators know no censoring, so it is decided here, once: the bound is the value,
    which attributes the clipped loss, min(loss, bound).

    Args:
        loss_KN: (K, N) losses in nats; a lower bound where censored; NaN where missing.
        censored_KN: (K, N) bool.
        max_share: a column (example) censored in more than this share of its observed members becomes NaN as a whole:
            what is left of it says more about the bound than about the model.

    Returns:
        (K, N) losses, a copy.

    Raises:
        DataError: shapes differ.
    """
    loss = np.array(loss_KN, dtype=np.result_type(np.asarray(loss_KN).dtype, np.float32))
    censored = np.asarray(censored_KN, dtype=bool)
    if loss.shape != censored.shape or loss.ndim != 2:
        raise DataError(f"Losses {loss.shape} and their censoring mask {censored.shape} must be one (K, N) shape.")
    observed = np.isfinite(loss)
    share = (censored & observed).sum(axis=0) / np.maximum(observed.sum(axis=0), 1)
    loss[:, share > max_share] = np.nan
    return loss


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """What members say about each training example. NaN where too few members scored it.

    Attributes:
        variance_N: variance of its loss over members, less the scoring noise, nats^2: its `covariance` score to itself.
        memorised_N: mean loss of members that did not see it less that of members that did, nats (Feldman and Zhang
            2020, section 2.1, with the loss as the measured output): high for mislabelled and rare examples. None
            without inclusion.
    """

    variance_N: Floats
    memorised_N: Floats | None


def self_influence(
    train_loss_KN: ArrayLike, inclusion_KN: ArrayLike | None = None, noise: float = 0.0
) -> SelfInfluence:
    """Self-influence of every training example.

    Args:
        train_loss_KN: (K, N) losses in nats, NaN = missing.
        inclusion_KN: (K, N) whether example i is in member k's subset.
        noise: standard deviation of the scoring noise, nats.

    Returns:
        SelfInfluence.

    Raises:
        DataError: shapes differ.
    """
    loss = np.asarray(train_loss_KN, dtype=np.float64)
    if loss.ndim != 2:
        raise DataError(f"Training losses must be (K, N), not {loss.shape}.")
    seen = np.isfinite(loss)
    _, variance, count = _moments(loss, seen)
    variance = np.where(count >= 2, np.maximum(variance - noise**2, 0), np.nan)
    if inclusion_KN is None:
        return SelfInfluence(variance, None)
    inclusion = np.asarray(inclusion_KN) > 0
    if inclusion.shape != loss.shape:
        raise DataError(f"Inclusion has shape {inclusion.shape}, training losses {loss.shape}; they must agree.")
    mean_in, _, n_in = _moments(loss, seen & inclusion)
    mean_out, _, n_out = _moments(loss, seen & ~inclusion)
    return SelfInfluence(variance, np.where((n_in >= 1) & (n_out >= 1), mean_out - mean_in, np.nan))


def _moments(loss_KN: Floats, chosen_KN: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """(N,) mean, variance and count over the chosen members of each column."""
    count = chosen_KN.sum(axis=0).astype(np.float64)
    mean = np.where(chosen_KN, loss_KN, 0).sum(axis=0) / np.maximum(count, 1)
    deviation = np.where(chosen_KN, loss_KN - mean, 0)
    return mean, (deviation**2).sum(axis=0) / np.maximum(count - 1, 1), count
