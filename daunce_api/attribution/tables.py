"""Rankings of an attribution as tables for people, with what a row of scores needs beside them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..errors import ConfigurationError
from .labels import Labels

if TYPE_CHECKING:
    import pandas as pd

    from .measurements import Measurements

Floats = NDArray[Any]


def ranking_table(attribution: Measurements, ranking: core.Ranking) -> pd.DataFrame:
    """The examples of a ranking for one answer; see :meth:`Attribution.top`."""
    import pandas as pd

    assert ranking.stderr_Mk is not None
    assert ranking.z_Mk is not None
    assert ranking.distinguishable_Mk is not None
    known = ranking.index_Mk[0] >= 0
    examples = [attribution.train[int(i)] for i in ranking.index_Mk[0, known]]
    table = pd.DataFrame(
        {
            "rank": range(1, len(examples) + 1),
            "id": [e.id for e in examples],
            "source": [e.source for e in examples],
            **intervals(
                ranking.score_Mk[0, known],
                ranking.stderr_Mk[0, known],
                ranking.z_Mk[0, known],
                ranking.distinguishable_Mk[0, known],
                ranking.members,
                correlation=ranking.estimator == "correlation",
                prior=None if ranking.prior_Mk is None else ranking.prior_Mk[0, known],
            ),
            "prompt": [e.prompt_text() for e in examples],
            "completion": [e.completion_text() for e in examples],
        }
    )
    table.attrs.update(
        estimator=ranking.estimator,
        why=ranking.why,
        question=ranking.question,
        measured=attribution.measured,
        members=ranking.members,
    )
    return table


def top_folded(attribution: Measurements, test: str, k: int, **options: Any) -> pd.DataFrame:
    """:meth:`Attribution.top` for people: training examples with the same content share a row, and a column ``copies``
    says how many there are."""
    contents = attribution.train.content_hashes
    copies = Counter(contents)
    columns = [attribution.test.position(test)]
    ranking = attribution.ranking(k + len(contents) - len(copies), columns=columns, **options)
    firsts: dict[str, int] = {}
    for place, i in enumerate(ranking.index_Mk[0].tolist()):
        if i >= 0:
            firsts.setdefault(contents[i], place)
    shown = list(firsts)[:k]
    table = ranking_table(attribution, ranking.at(places=[firsts[content] for content in shown]))
    return table.assign(copies=[copies[content] for content in shown])


def why_no_scores(attribution: Measurements, test: str) -> str | None:
    """Why an answer has no scores, in a sentence; None where it has some."""
    if np.isfinite(attribution.test_loss_KM[:, attribution.test.position(test)]).sum() >= 2:
        return None
    if attribution.censored:
        return (
            f"{test} has no scores: in too many members its loss is only known as a lower bound, since the provider "
            "did not list the answer's token. A provider that measures any token gives scores."
        )
    return f"{test} has no scores: fewer than two members have scored it."


def row_name(by: Labels | None) -> str:
    """What one row is, as the name of its column."""
    if by is None:
        return "train"
    return "source" if isinstance(by, str) else "group"


def significant(z_GM: NDArray[Any], members: int, fdr: float | None) -> NDArray[np.bool_]:
    """Which sums are significant: each by itself at 5 %, or with a false-discovery rate over all of them
    (Benjamini and Hochberg 1995)."""
    size = np.abs(z_GM)
    if fdr is None:
        return np.asarray(size >= core.significance_threshold(members))
    if not 0 < fdr < 1:
        raise ConfigurationError(f"A false-discovery rate lies in (0, 1); got fdr={fdr}.")
    known = np.isfinite(size)
    marks = np.zeros(size.shape, dtype=np.bool_)
    if known.any():
        from scipy import stats  # slow to import

        p_value = 2 * stats.t.sf(size[known], members - 1)
        marks[known] = stats.false_discovery_control(p_value) <= fdr
    return marks


def intervals(
    score: Floats,
    stderr: Floats,
    z: Floats,
    marked: NDArray[np.bool_],
    members: int,
    *,
    correlation: bool = False,
    prior: Floats | None = None,
) -> dict[str, NDArray[Any]]:
    """Columns of scores, their parts where they have a prior, and standard errors, 95 % intervals, z and marks of their
    evidence."""
    evidence = score if prior is None else score - prior
    low, high = core.confidence_interval(evidence, stderr, members, correlation=correlation)
    columns = {"score": score, "stderr": stderr, "low": low, "high": high, "z": z}
    if prior is not None:
        columns = {"score": score, "evidence": evidence, "prior": prior, **columns}
    return {name: values.astype(np.float64) for name, values in columns.items()} | {"distinguishable": marked}
