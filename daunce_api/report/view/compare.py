"""Two runs side by side: the same question, how the ranks changed, and what is significant in both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ... import core
from ...attribution import Attribution
from ...attribution.texts import conversation
from ...data.dataset import Example

_ROWS = 100
_BRIEF = 400
_FIRST = 10


def _by_content(examples: Iterable[Example]) -> dict[str, int]:
    """Position of the first example with each content: ids of two runs need not mean the same."""
    places: dict[str, int] = {}
    for position, example in enumerate(examples):
        places.setdefault(example.content_hash, position)
    return places


def side_by_side(one: Attribution, other: Attribution, test: str | None) -> dict[str, Any]:
    """Scores and ranks of the training examples that both runs have, for one question that both have.

    Args:
        test: id of the question in the first run; None = the first that both have.

    Returns:
        plain data: ``questions`` in both; ``common``, ``only`` (training examples in both, and in one of them);
        ``spearman`` of the scores; ``shared`` of the first ten proponents; and ``rows`` by the better of both ranks,
        each with id, texts, and by run rank, score, half of its 95 % interval and whether it is significant (5 %, per
        pair). ``problem`` where nothing can be compared.
    """
    tests = [_by_content(side.test) for side in (one, other)]
    shared = [(i, tests[1][content]) for content, i in tests[0].items() if content in tests[1]]
    questions = [{"id": one.test[i].id, "answer": conversation(one.test[i]).answer[:_BRIEF]} for i, _ in shared]
    if not shared:
        return {"problem": "The two runs have no question in common.", "questions": []}
    column = next(((i, j) for i, j in shared if one.test[i].id == test), shared[0])
    trains = [_by_content(side.train) for side in (one, other)]
    pairs = [(i, trains[1][content]) for content, i in trains[0].items() if content in trains[1]]
    if len(pairs) < 2:
        return {"problem": "The two runs have fewer than two training examples in common.", "questions": questions}
    sides = []
    for side, position, places in zip((one, other), column, zip(*pairs, strict=True), strict=True):
        sides.append(_side(side, position, np.array(places)))
    rank = np.minimum(sides[0]["rank"], sides[1]["rank"])
    spearman = stats.spearmanr(sides[0]["score"], sides[1]["score"]).statistic
    first = [set(np.flatnonzero(side["rank"] <= _FIRST).tolist()) for side in sides]
    question = conversation(one.test[column[0]])
    return {
        "questions": questions,
        "test": one.test[column[0]].id,
        "question": question.question,
        "answer": question.answer,
        "common": len(pairs),
        "only": [len(one.train) - len(pairs), len(other.train) - len(pairs)],
        "spearman": None if np.isnan(spearman) else float(spearman),
        "shared": len(first[0] & first[1]),
        "of": min(_FIRST, len(pairs)),
        "both": int((sides[0]["significant"] & sides[1]["significant"]).sum()),
        "rows": [
            {
                "id": one.train[pairs[n][0]].id,
                "answer": conversation(one.train[pairs[n][0]]).answer[:_BRIEF],
                "question": conversation(one.train[pairs[n][0]]).question[:_BRIEF],
                "runs": [
                    {
                        "rank": int(side["rank"][n]),
                        "score": _plain(side["score"][n]),
                        "half": _plain(side["half"][n]),
                        "significant": bool(side["significant"][n]),
                    }
                    for side in sides
                ],
            }
            for n in np.argsort(rank, kind="stable")[:_ROWS]
        ],
    }


def _side(attribution: Attribution, column: int, places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Scores of one run for the common examples; ranks are among these."""
    count = len(attribution.train)
    ranking = attribution.ranking(count, columns=[column])
    listed = ranking.index_Mk[0] >= 0
    order = ranking.index_Mk[0][listed]
    score_k = ranking.score_Mk[0][listed]
    assert ranking.stderr_Mk is not None
    assert ranking.distinguishable_Mk is not None
    correlation = ranking.estimator == "correlation"
    low_k, high_k = core.confidence_interval(
        score_k, ranking.stderr_Mk[0][listed], ranking.members, correlation=correlation
    )
    score, half = np.full(count, np.nan), np.full(count, np.nan)
    significant = np.zeros(count, np.bool_)
    score[order], half[order] = score_k, (high_k - low_k) / 2
    significant[order] = ranking.distinguishable_Mk[0][listed]
    score, half, significant = score[places], half[places], significant[places]
    rank = np.empty(len(places), dtype=np.int64)
    rank[np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")] = np.arange(1, len(places) + 1)
    return {"score": score, "half": half, "rank": rank, "significant": significant}


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
