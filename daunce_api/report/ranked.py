"""What the report lists: strongest pairs with their intervals, and where a text search would have put them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..attribution import Attribution
from ..attribution.similarity import Bm25, example_texts

_PAIRS = 40_000
_MINIMUM_DEPTH = 20
_BM25_CELLS = 20_000_000
OVERLAP = 10


@dataclass(frozen=True, eq=False)
class Listing:
    """The k strongest training examples of one sign for each of M test examples.

    Attributes:
        index_Mk: positions in the training set, -1 past the last one of this sign.
        score_Mk: positive = helpful.
        low_Mk, high_Mk: ends of the score's 95 % interval, NaN where it is not known.
        clear_Mk: whether the score is significant (5 %, per pair).
        prior_Mk: the part of each score that was known before any member was trained, or None where there is no prior;
            the rest is evidence, and the interval is that of the evidence.
        bm25_rank_Mk: place (1 = best) that BM25 gives the same example for the same test example; 0 where they share
            no word.
    """

    index_Mk: NDArray[np.int64]
    score_Mk: NDArray[Any]
    low_Mk: NDArray[Any]
    high_Mk: NDArray[Any]
    clear_Mk: NDArray[np.bool_]
    prior_Mk: NDArray[Any] | None
    bm25_rank_Mk: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Listings:
    """Both signs, and how much of our first ten BM25 also has in its first ten (mean over test examples, 0 to 1)."""

    proponents: Listing
    opponents: Listing
    overlap: float


def listings(attribution: Attribution, columns: list[int]) -> Listings:
    """Rank the training examples for some test examples, deeper where there are fewer of them."""
    depth = min(len(attribution.train), max(_MINIMUM_DEPTH, _PAIRS // len(columns)))
    found = [_signed(attribution.ranking(depth, opponents=sign < 0, columns=columns), sign) for sign in (1, -1)]
    bm25 = Bm25(example_texts(attribution.train))
    texts = example_texts(attribution.test[j] for j in columns)
    wanted = min(OVERLAP, len(attribution.train))
    shared: list[float] = []
    step = max(1, _BM25_CELLS // len(attribution.train))
    for start in range(0, len(columns), step):
        score = bm25.scores(texts[start : start + step])
        for c in range(score.shape[1]):
            column, j = score[:, c], start + c
            descending = -np.sort(-column)
            for listing in found:
                index = listing.index_Mk[j]
                seen = index >= 0
                value = column[index[seen]]
                # Equal scores share the best place among them.
                place = np.searchsorted(-descending, -value, side="left") + 1
                listing.bm25_rank_Mk[j][seen] = np.where(value > 0, place, 0)
            first = found[0].bm25_rank_Mk[j][:wanted]
            shared.append(float(((first > 0) & (first <= wanted)).sum()) / wanted)
    return Listings(found[0], found[1], float(np.mean(shared)))


def _signed(ranking: core.Ranking, sign: int) -> Listing:
    """Only the entries of the wanted sign: the weakest "proponents" of a ranking can have negative scores."""
    right = (ranking.index_Mk >= 0) & (sign * np.nan_to_num(ranking.score_Mk) > 0)
    assert ranking.stderr_Mk is not None
    assert ranking.distinguishable_Mk is not None
    correlation = ranking.estimator == "correlation"
    ends = core.confidence_interval(ranking.score_Mk, ranking.stderr_Mk, ranking.members, correlation=correlation)
    prior = None if ranking.prior_Mk is None else np.where(right, ranking.prior_Mk, 0)
    width = max(1, int(right.sum(axis=1).max()))
    index = np.where(right, ranking.index_Mk, -1)[:, :width]
    score, low, high = (np.where(right, x, 0)[:, :width] for x in (ranking.score_Mk, *ends))
    clear, prior = (right & ranking.distinguishable_Mk)[:, :width], None if prior is None else prior[:, :width]
    return Listing(index, score, low, high, clear, prior, bm25_rank_Mk=np.zeros(index.shape, dtype=np.int64))
