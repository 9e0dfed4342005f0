"""An answer of which a retrained model gives only a lower bound is not part of the truth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from daunce_api.evaluation.truth import Truth
from daunce_api.providers.base import TokenScores


def test_bounds_are_not_measurements() -> None:
    answers = [
        {0: TokenScores((-1.0,), (False,)), 1: TokenScores((-5.0,), (True,))},
        {0: TokenScores((-2.0,), (False,)), 1: TokenScores((-3.0,), (False,))},
    ]
    scores = SimpleNamespace(
        find_ids=lambda examples: np.arange(2), load=lambda k: SimpleNamespace(scores=lambda: answers[k])
    )
    truth: Any = SimpleNamespace(
        _complete=lambda store: [0, 1],
        _run=SimpleNamespace(material=SimpleNamespace(encoded_test=())),
        config=SimpleNamespace(attribution=SimpleNamespace(loss="mean")),
        ensemble=SimpleNamespace(inclusion_KN=np.eye(2, dtype=bool)),
    )
    found = Truth._losses(truth, SimpleNamespace(scores=scores))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.loss_SM, [[1.0, np.nan], [2.0, np.nan]])
