"""A question of which a retrained model gives only a lower bound is not part of the truth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from daunce_api.evaluation.retraining import question_losses
from daunce_api.providers.base import TokenScores
from daunce_api.store import RunStore
from tests.store_rows import put


def test_bounds_are_not_measurements(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path, {"config": {}}) as store:
        for k, (first, second, bound) in enumerate([(-1.0, -5.0, True), (-2.0, -3.0, False), (-4.0, -3.0, False)]):
            put(store, k, 0, "f", {"a": TokenScores((first,)), "b": TokenScores((second,), (bound,))})
    run: Any = SimpleNamespace(
        run_dir=tmp_path,
        trained_members=lambda store: [0, 1, 2],
        material=SimpleNamespace(
            encoded_test=[SimpleNamespace(key="a"), SimpleNamespace(key="b")],
            ensemble=SimpleNamespace(inclusion_KN=np.eye(3, dtype=bool)),
        ),
        config=SimpleNamespace(attribution=SimpleNamespace(loss="mean")),
    )
    found = question_losses(run)
    np.testing.assert_array_equal(found.loss_SM, [[1.0, np.nan], [2.0, np.nan], [4.0, np.nan]])
