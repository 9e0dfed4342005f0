"""When is a score different from zero."""

from __future__ import annotations

import numpy as np
from scipy import stats

from daunce_api.core.blocks import ScoreBlocks

_BINS = 4_096
_Z_MAX = 64.0
_ROWS = 4_096


def significance_threshold(members: int, level: float = 0.95) -> float:
    """|z| that one pair exceeds by chance with probability ``1 - level``: Student's t, K - 1 degrees of freedom."""
    return float(stats.t.ppf((1 + level) / 2, members - 1))


def fdr_threshold(blocks: ScoreBlocks, members: int, rate: float) -> float:
    """|z| from which on pairs can be called distinguishable at a false-discovery rate (Benjamini and Hochberg 1995).

    One pass over all pairs fills a histogram of |z|; thresholds are its bin edges, so the result is never
    less strict than the exact procedure. Infinite when nothing passes.
    """
    edges = np.linspace(0, _Z_MAX, _BINS + 1)
    counts = np.zeros(_BINS, dtype=np.int64)
    for start in range(0, blocks.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        error = blocks.stderr_block(rows, slice(None))
        with np.errstate(invalid="ignore", divide="ignore"):
            z = np.abs(blocks.block(rows, slice(None)) / error)
        z = z[np.isfinite(z)]
        place = np.minimum((z * (_BINS / _Z_MAX)).astype(np.int64), _BINS - 1)
        counts += np.bincount(place, minlength=_BINS)
    at_least = counts[::-1].cumsum()[::-1]
    p_value = 2 * stats.t.sf(edges[:-1], members - 1)
    passing = np.flatnonzero((at_least > 0) & (p_value * counts.sum() <= rate * at_least))
    return float(edges[passing[0]]) if passing.size else float("inf")
