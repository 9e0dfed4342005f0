"""What is booked for scoring: what was asked for, within the cap, and not what the cache knew."""

from __future__ import annotations

from pathlib import Path

import pytest

from daunce_api.errors import BudgetError
from daunce_api.score.members import booked
from daunce_api.store import RunStore


def reserve(
    store: RunStore, usd: float, *, cached: int = 0, cap: float | None = None, end: BaseException | None = None
) -> None:
    with booked(store, "scoring of member 0", usd, 100, 0, cap=cap):
        if cached:
            store.scores.add_cached(0, 0, 1, cached)
        if end is not None:
            raise end


@pytest.mark.parametrize(("cached", "usd"), [(0, 2.0), (25, 1.5), (100, 0.0), (120, 0.0)])
def test_what_the_cache_answered_is_not_booked(tmp_path: Path, cached: int, usd: float) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        reserve(store, 2.0, cached=cached)
        assert store.ledger.spent() == pytest.approx(usd)
        assert store.scores.cached() == (cached > 0)


def test_the_cap_holds_before_anything_is_known_of_the_cache(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store, pytest.raises(BudgetError):
        reserve(store, 2.0, cached=100, cap=1.5)


def test_what_was_interrupted_is_booked_once_with_what_the_cache_saved_before(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        with pytest.raises(KeyboardInterrupt):
            reserve(store, 2.0, cached=25, end=KeyboardInterrupt())
        reserve(store, 2.0)
        assert store.ledger.spent() == pytest.approx(1.5)


def test_what_is_measured_anew_is_paid_for_again(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        reserve(store, 2.0, cached=50)
        store.scores.set_aside([0], "another model answered", suspect=False)
        assert store.scores.cached() == 0
        reserve(store, 2.0)
        assert store.ledger.spent() == pytest.approx(3.0)
