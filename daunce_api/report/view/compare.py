"""Two runs side by side: the same question, how the ranks changed, and what is significant in both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...attribution import Attribution
from ...attribution.texts import conversation
from ...data.dataset import Dataset

_ROWS = 100
_BRIEF = 400
_FIRST = 10


def _by_content(examples: Dataset) -> dict[str, int]:
    """Position of the first example with each content: ids of two runs need not mean the same."""
    places: dict[str, int] = {}
    for position, content in enumerate(examples.content_hashes):
        places.setdefault(content, position)
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
    ids = attribution.train.ids
    table = attribution.top(attribution.test.ids[column], len(ids)).set_index("id").reindex([ids[i] for i in places])
    rank = table["score"].rank(ascending=False, method="first", na_option="bottom").astype(int)
    half, significant = (table["high"] - table["low"]) / 2, table["distinguishable"].eq(True)
    columns = {"score": table["score"], "half": half, "rank": rank, "significant": significant}
    return {name: values.to_numpy() for name, values in columns.items()}


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
