"""When is a score different from zero."""

from __future__ import annotations

import numpy as np
from scipy import stats

from .blocks import ScoreBlocks
from .checkpoints import Floats

_BINS = 4_096
_Z_MAX = 64.0
_ROWS = 4_096


def significance_threshold(members: int, level: float = 0.95) -> float:
    """|z| that one pair exceeds by chance with probability ``1 - level``: Student's t, K - 1 degrees of freedom."""
    return float(stats.t.ppf((1 + level) / 2, members - 1))


def z_values(score: Floats, stderr: Floats, *, correlation: bool = False) -> Floats:
    """How many standard errors scores are from zero; NaN where the error is zero or unknown.

    A correlation's error shrinks as it nears 1, so correlations are compared on Fisher's scale (1921):
    ``arctanh(r) / (stderr / (1 - r^2))``.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        z = _fisher(score) * (1 - np.square(score)) if correlation else score
        return np.asarray(np.where(stderr > 0, z / stderr, np.nan))


def same_p(z: Floats, common: Floats, members: int) -> Floats:
    """z-values of K members that have the p-values of ``z`` from as many members as a pair has in common.

    So pairs with fewer members can be held against one threshold; where all K are there z stays as it is.
    """
    fewer = (common < members) & np.isfinite(z)
    if not fewer.any():
        return z
    out = np.array(z)
    tail = stats.t.sf(np.abs(z[fewer]), common[fewer] - 1)
    out[fewer] = np.copysign(stats.t.isf(tail, members - 1), z[fewer])
    return out


def z_block(
    blocks: ScoreBlocks, rows: slice, columns: slice, members: int, *, correlation: bool = False
) -> tuple[Floats, Floats]:
    """(n, m) scores and their z-values, on the scale of K members (`same_p`)."""
    score, stderr = blocks.block(rows, columns), blocks.stderr_block(rows, columns)
    return score, same_p(z_values(score, stderr, correlation=correlation), blocks.count_block(rows, columns), members)


def confidence_interval(
    score: Floats, stderr: Floats, members: int | Floats, *, correlation: bool = False, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Lower and upper end of an interval for the expected score: Student's t with K - 1 degrees of freedom.

    Args:
        score, stderr: any matching shape. members: K, or for each score how many members it rests on. level: nominal
            coverage.
        correlation: scores are correlations; the interval is symmetric on Fisher's scale and stays within -1 to 1.
    """
    width = stats.t.ppf((1 + level) / 2, np.maximum(np.asarray(members) - 1, 1)) * np.asarray(stderr)
    if not correlation:
        return np.asarray(score - width), np.asarray(score + width)
    middle = _fisher(score)
    with np.errstate(invalid="ignore", divide="ignore"):
        width = width / (1 - np.tanh(middle) ** 2)
    return np.asarray(np.tanh(middle - width)), np.asarray(np.tanh(middle + width))


def _fisher(correlation: Floats) -> Floats:
    return np.asarray(np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6)))


def fdr_threshold(blocks: ScoreBlocks, members: int, rate: float, *, correlation: bool = False) -> float:
    """|z| from which on pairs can be called distinguishable at a false-discovery rate (Benjamini and Hochberg 1995).

    One pass over all pairs fills a histogram of |z|; thresholds are its bin edges, so the result is never
    less strict than the exact procedure. Infinite when nothing passes.
    """
    edges = np.linspace(0, _Z_MAX, _BINS + 1)
    counts = np.zeros(_BINS, dtype=np.int64)
    for start in range(0, blocks.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        z = np.abs(z_block(blocks, rows, slice(None), members, correlation=correlation)[1])
        z = z[np.isfinite(z)]
        place = np.minimum((z * (_BINS / _Z_MAX)).astype(np.int64), _BINS - 1)
        counts += np.bincount(place, minlength=_BINS)
    at_least = counts[::-1].cumsum()[::-1]
    p_value = 2 * stats.t.sf(edges[:-1], members - 1)
    passing = np.flatnonzero((at_least > 0) & (p_value * counts.sum() <= rate * at_least))
    return float(edges[passing[0]]) if passing.size else float("inf")
