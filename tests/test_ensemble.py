"""Subsets and seeds: exact sizes, independent of K, the same everywhere and for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api.data.subsets import plan_ensemble
from daunce_api.errors import ConfigurationError


def test_one_seed_gives_the_same_bits_everywhere() -> None:
    ensemble = plan_ensemble(10, 3, 0.5, 0)
    assert ensemble.digest == "37983ee4f2116c9a40cc03b8f12d533631f4762e57e1838eae319436c29afbd4"
    assert ensemble.seeds_K.tolist() == [1722792823, 1421746522, 1409566257]


@settings(max_examples=60)
@given(
    n=st.integers(2, 80),
    k=st.integers(1, 12),
    more=st.integers(1, 8),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_subset_has_the_same_size_and_members_do_not_depend_on_their_number(
    n: int, k: int, more: int, ratio: float, seed: int
) -> None:
    size = round(ratio * n)
    if not 1 <= size < n:
        with pytest.raises(ConfigurationError):
            plan_ensemble(n, k, ratio, seed)
        return
    small, large = plan_ensemble(n, k, ratio, seed), plan_ensemble(n, k + more, ratio, seed)
    assert small.inclusion_KN.sum(axis=1).tolist() == [size] * k
    assert np.array_equal(small.inclusion_KN, large.inclusion_KN[:k])
    assert np.array_equal(small.seeds_K, large.seeds_K[:k])
    assert small.target_seed == large.target_seed
    assert ((large.seeds_K >= 0) & (large.seeds_K < 2**31)).all()
    assert small.subset(0).tolist() == np.flatnonzero(small.inclusion_KN[0]).tolist()


def test_draws_are_uniform_and_independent() -> None:
    """Each example is in half of the subsets, each pair in (n/2)(n/2 - 1) / (n (n - 1)) of them, within 5 sigma."""
    draws, n = 4000, 10
    inclusion = plan_ensemble(n, draws, 0.5, 7).inclusion_KN.astype(float)
    assert np.abs(inclusion.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(draws)
    pairs = inclusion.T @ inclusion / draws
    expected = 5 * 4 / (10 * 9)
    off_diagonal = pairs[~np.eye(n, dtype=bool)]
    assert np.abs(off_diagonal - expected).max() < 5 * np.sqrt(expected * (1 - expected) / draws)
    # Neighbouring members share as many examples as chance gives them: 5 * 5 / 10.
    shared = (inclusion[:-1] * inclusion[1:]).sum(axis=1)
    assert abs(shared.mean() - 2.5) < 0.1


def test_another_seed_gives_another_design() -> None:
    assert plan_ensemble(10, 3, 0.5, 0).digest != plan_ensemble(10, 3, 0.5, 1).digest


def test_a_subset_below_the_provider_minimum_names_the_ratio_that_would_do() -> None:
    with pytest.raises(ConfigurationError, match=r"6 of 12 examples, fewer than the 10 .* at least 0\.833"):
        plan_ensemble(12, 2, 0.5, 0, min_subset=10)
    with pytest.raises(ConfigurationError, match=r"fewer than the 10 that a fine-tune needs\. Add examples\."):
        plan_ensemble(8, 2, 0.5, 0, min_subset=10)
