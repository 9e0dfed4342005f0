"""Self-influence: how much the ensemble disagrees about a training example, for finding mislabelled data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError
from .stages import Floats


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
