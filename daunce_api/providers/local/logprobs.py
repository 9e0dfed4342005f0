"""Log-probabilities of tokens, and tokens drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, float64.

    ``logprobs[t - 1]`` is log p(ids[t] | ids[:t]) for t = 1 ... len(ids) - 1. ``top_ids`` and ``top_logprobs``
    (len(ids) - 1, top) are the most likely tokens there, best first; None where top is 0.
    """

    logprobs: NDArray[np.float64]
    top_ids: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Generation:
    """Sampled continuation: ``ids``, and at each the model's own log-probabilities (at temperature 1).

    ``finished`` is True where a stop id ended it; that id is the last of ``ids``.
    """

    ids: tuple[int, ...]
    logprobs: NDArray[np.float64]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float64]
    finished: bool


def read_logprobs(logits: Tensor, target: Tensor, top: int) -> TokenLogprobs:
    """Log-probabilities of ``target`` (n,), and of the ``top`` most likely tokens, from logits (n, vocabulary)."""
    logprobs = logits.cpu().double().log_softmax(-1)
    chosen = logprobs.gather(1, target[:, None])[:, 0].numpy()
    if not top:
        return TokenLogprobs(chosen)
    return TokenLogprobs(chosen, *most_likely(logprobs, top))


def most_likely(logprobs: Tensor, top: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and log-probabilities (n, top) of the most likely tokens, best first; ``logprobs`` (n, vocabulary)."""
    values, order = logprobs.topk(min(top, logprobs.shape[1]), dim=1)
    return order.numpy(), values.numpy()


def sample(logits: NDArray[np.float64], temperature: float, top_p: float, random: np.random.Generator) -> int:
    """A token drawn from logits (vocabulary,): the likeliest at temperature 0, otherwise one of the smallest set of
    tokens that holds ``top_p`` of the probability."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    kept = order[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
    share = probabilities[kept] / probabilities[kept].sum()
    return int(random.choice(kept, p=share))
