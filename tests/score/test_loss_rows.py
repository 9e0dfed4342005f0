"""Losses that were kept are those of the log-probabilities, to the last bit, in whatever order they arrived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api.attribution import matrices
from daunce_api.attribution.matrices import finish, loss_matrix
from daunce_api.core.losses import Reduction, segment_losses
from daunce_api.errors import StoreCorruptError
from daunce_api.providers.base import TokenScores
from daunce_api.store import LossRow, RunStore
from tests.store_rows import by_key, put

KEYS = [f"k{i}" for i in range(40)]


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    rng = np.random.default_rng(0)
    store = RunStore.create_or_open(tmp_path / "run", {"config": {}})
    store.scores.register(dict.fromkeys(KEYS, 5))
    for member in range(3):
        for part in np.array_split(rng.permutation(KEYS), 4):
            answers = {}
            for key in part:
                values = tuple((-rng.exponential(2.0, int(key[1:]) % 70 + 1)).tolist())
                censored = tuple((np.arange(len(values)) == 0).tolist()) if key in KEYS[:7] else ()
                answers[key] = TokenScores(values, censored)
            put(store, member, 0, "f", answers)
    return store


@pytest.mark.parametrize("reduction", ["mean", "sum", "margin"])
@pytest.mark.parametrize("kept", ["nothing", "everything", "another kind", "a part"])
def test_rows_give_the_bits_of_the_log_probabilities(run: RunStore, reduction: Reduction, kept: str) -> None:
    ids = run.scores.register(dict.fromkeys(KEYS, 5))
    wanted = np.concatenate([ids[::-1], ids[3:5]])
    for member in range(3):
        if kept == "everything":
            finish(run, ids, member, 0, reduction)
        elif kept == "another kind":
            finish(run, ids, member, 0, "margin" if reduction != "margin" else "mean")
        elif kept == "a part" and member != 1:
            finish(run, ids[:9], member, 0, reduction)
            finish(run, ids[20:], member, 0, reduction)
    loss_KN, censored_KN = loss_matrix(run, [(k, 0) for k in range(3)], wanted, reduction)
    for member in range(3):
        answers = by_key(run, member)
        keys = [*KEYS[::-1], *KEYS[3:5]]
        rows = [answers[key].logprobs for key in keys]
        expected = segment_losses(np.concatenate(rows), [len(row) for row in rows], reduction)
        assert loss_KN[member].tobytes() == expected.tobytes()
        assert censored_KN[member].tolist() == [answers[key].any_censored for key in keys]
    run.close()


def test_a_model_that_lacks_a_score_has_no_row(run: RunStore) -> None:
    more = run.scores.register({**dict.fromkeys(KEYS, 5), "late": 5})
    with pytest.raises(StoreCorruptError, match="lacks scores"):
        finish(run, more, 0, 0, "mean")
    with pytest.raises(StoreCorruptError, match="lacks scores"):
        loss_matrix(run, [(0, 0)], more, "mean")
    run.close()


def test_tokens_are_not_read_where_rows_are_kept(run: RunStore) -> None:
    ids = run.scores.register(dict.fromkeys(KEYS, 5))
    finish(run, ids, 0, 0, "mean")
    expected, _ = loss_matrix(run, [(0, 0)], ids, "mean")
    run._db.execute("UPDATE blobs SET logprobs = x'00'")
    again, _ = loss_matrix(run, [(0, 0)], ids, "mean")
    assert again.tobytes() == expected.tobytes()
    run.close()


def test_a_row_of_measurements_that_were_set_aside_meanwhile_is_not_kept(
    run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are computed in a thread, which goes on when the run is being ended because its members are alike."""
    ids = run.scores.register(dict.fromkeys(KEYS, 5))
    compute = matrices._row

    def slow(*given: Any) -> LossRow:
        row = compute(*given)
        run.scores.set_aside([1], "the base model answered", suspect=True)
        return row

    monkeypatch.setattr(matrices, "_row", slow)
    finish(run, ids, 1, 0, "mean")
    assert not run.scores.has_row(ids, 1, 0)
    assert (1, 0) not in run.scores.complete(ids)
