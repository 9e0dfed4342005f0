"""A question of which a retrained model gives only a lower bound is not part of the truth."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daunce_api.evaluation import retraining
from daunce_api.providers.base import TokenScores


def test_bounds_are_not_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        {0: TokenScores((-1.0,), (False,)), 1: TokenScores((-5.0,), (True,))},
        {0: TokenScores((-2.0,), (False,)), 1: TokenScores((-3.0,), (False,))},
        {0: TokenScores((-4.0,), (False,)), 1: TokenScores((-3.0,), (False,))},
    ]
    scores = SimpleNamespace(
        find_ids=lambda examples: np.arange(2), load=lambda k: SimpleNamespace(scores=lambda: answers[k])
    )
    store = SimpleNamespace(scores=scores)
    monkeypatch.setattr(retraining.RunStore, "open", lambda *_, **__: nullcontext(store))
    run: Any = SimpleNamespace(
        run_dir="unused",
        trained_members=lambda store: [0, 1, 2],
        material=SimpleNamespace(encoded_test=(), ensemble=SimpleNamespace(inclusion_KN=np.eye(3, dtype=bool))),
        config=SimpleNamespace(attribution=SimpleNamespace(loss="mean")),
    )
    found = retraining.question_losses(run)
    np.testing.assert_array_equal(found.loss_SM, [[1.0, np.nan], [2.0, np.nan], [4.0, np.nan]])
