"""The scores that an evaluation table compares: ours, and baselines that read nothing but text."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..attribution import Attribution
from ..attribution.similarity import bm25_scores, embedding_scores, example_texts, random_scores
from ..errors import MissingExtraError

Scores = NDArray[np.float64]


def method_scores(attribution: Attribution) -> dict[str, Scores]:
    """(N, M) scores by method, ours first; higher = earlier.

    ``attribution`` is the run's own estimator, ``correlation`` what "retrieval" ranks by (once, where they are the
    same). ``embeddings`` are there when the extra of that name is installed.
    """
    chosen = attribution.choice.estimator.name
    out = {f"attribution ({chosen})": np.asarray(attribution.scores_NM(), dtype=np.float64)}
    related = core.choose(attribution.losses, "auto", "retrieval").estimator.name
    if related != chosen:
        out[f"attribution ({related})"] = np.asarray(attribution.with_estimator(related).scores_NM(), dtype=np.float64)
    train, test = example_texts(attribution.train), example_texts(attribution.test)
    out["BM25"] = bm25_scores(train, test)
    with suppress(MissingExtraError):  # a light install compares without them
        out["embeddings"] = embedding_scores(train, test)
    out["random"] = random_scores(len(train), len(test))
    return out
