"""From per-token log-probabilities to per-example losses.

A loss is a negative log-likelihood in nats: ``loss = -mean(log p)`` over the tokens of the completion (the
measured output of a member), or ``-sum(log p)``. For classifiers it can be the negative margin instead,
``-mean(log p - log(1 - p))``, which Daunce (arXiv 2505.23223) measures for images. A training and a test example are
reduced in the same way, each by its own token count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, DataError

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


def per_example_losses(
    token_logprobs: Sequence[ArrayLike | None], reduction: Reduction = "mean"
) -> NDArray[np.float64]:
    """Reduce ragged token log-probabilities to one loss an example.

    Args:
        token_logprobs: for each of N examples the natural-log probabilities of its completion tokens (length T_i >=
            1), or ``None`` where the example was not scored.
        reduction: ``"mean"`` gives nats per completion token, ``"sum"`` nats per example, ``"margin"`` the negative
            mean margin of the tokens (of either sign).

    Returns:
        (N,) float64 losses in nats, NaN where the input is ``None``. Higher is worse.

    Raises:
        DataError: an example has no tokens, or a log-probability is NaN, -inf or clearly positive.
    """
    rows = [None if row is None else np.asarray(row, dtype=np.float64).ravel() for row in token_logprobs]
    empty = [i for i, row in enumerate(rows) if row is not None and row.size == 0]
    if empty:
        raise DataError(
            "Examples without completion tokens have no loss. Nothing was computed; drop them or mark them as None.",
            [f"example {i}" for i in empty[:20]],
        )
    present = [row for row in rows if row is not None]
    losses = np.full(len(rows), np.nan)
    if present:
        lengths = np.array([row.size for row in present])
        values = segment_losses(np.concatenate(present), lengths, reduction)
        losses[[i for i, row in enumerate(rows) if row is not None]] = values
    return losses


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
