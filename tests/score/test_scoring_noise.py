"""Noise is estimated from pairs, and models that cannot be told apart are refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from daunce_api.attribution.matrices import measure_noise
from daunce_api.core import segment_losses
from daunce_api.errors import ContractError
from daunce_api.providers.base import TokenScores
from daunce_api.score.health import check_members_differ, like_base, likeness
from daunce_api.store import RunStore
from tests.store_rows import put


def test_noise_of_known_pairs(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        put(store, 0, 0, "f", {"a": TokenScores((-1.0, -2.0)), "b": TokenScores((-1.0,))})
        put(store, 0, 1, "f", {"a": TokenScores((-1.2, -2.2)), "c": TokenScores((-5.0,))})  # c: the second time alone
        put(store, 1, 0, "f", {"a": TokenScores((-3.0, -3.0))})
        assert measure_noise(store, [0, 1]) == pytest.approx(math.sqrt(0.04 / 2))
        put(store, 1, 1, "f", {"a": TokenScores((-3.3, -2.7))})
        assert measure_noise(store, [0, 1]) == pytest.approx(math.sqrt((0.04 + 0.0) / 2 / 2))


def test_noise_is_that_of_the_loss_that_is_measured(tmp_path: Path) -> None:
    first, again = (-0.05, -0.2), (-0.06, -0.25)
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        for replicate, logprobs in enumerate((first, again)):
            put(store, 0, replicate, "f", {"a": TokenScores(logprobs)})
        margins, means, sums = (measure_noise(store, [0], reduction) for reduction in ("margin", "mean", "sum"))
    away = [segment_losses(x, [len(x)], "margin")[0] for x in (first, again)]
    assert margins == pytest.approx(abs(away[0] - away[1]) / math.sqrt(2))
    assert means is not None
    assert margins is not None
    assert margins > 1.5 * means
    assert sums == pytest.approx(2 * means)


def test_noise_recovers_a_planted_sigma(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        for replicate in (0, 1):
            scores = {str(i): TokenScores(tuple(-3.0 + rng.normal(0, 0.05, 4))) for i in range(500)}
            put(store, 0, replicate, "f", scores)
        assert measure_noise(store, [0]) == pytest.approx(0.025, rel=0.1)


def test_no_pairs_is_not_zero_noise(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        put(store, 0, 0, "f", {"a": TokenScores((-4.0,), (True,))})
        put(store, 0, 1, "f", {"a": TokenScores((-4.5,), (True,))})
        assert measure_noise(store, [0, 5]) is None


MODELS = ["ft-0", "ft-1", "ft-2"]


def test_a_server_of_the_base_model_is_found_out() -> None:
    loss_KN = np.tile([1.0, 2.0, 3.0], (3, 1))
    with pytest.raises(ContractError, match="base model"):
        check_members_differ(loss_KN, MODELS)
    assert check_members_differ(loss_KN + np.arange(3)[:, None], MODELS) == "differ"


def test_one_adapter_under_two_names_is_found_out() -> None:
    loss_KN = np.random.default_rng(2).normal(2, 0.5, (3, 4))
    check_members_differ(loss_KN, MODELS)
    loss_KN[2] = loss_KN[0]
    with pytest.raises(ContractError, match="'ft-0' and 'ft-2'"):
        check_members_differ(loss_KN, MODELS)


Case = tuple[int, int, int, float]


def looks(case: Case, signal: float, runs: int, seed: int, heavy: bool = False) -> list[str]:
    """What the looks of a run say in the end, for ``runs`` simulated ones."""
    members, examples, repeats, sigma = case
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(runs):
        level_N = rng.normal(3, 1, examples)
        true_KN = level_N + sigma * np.sqrt(signal) * rng.normal(0, 1, (members, examples))

        def measured(true_KN: np.ndarray) -> np.ndarray:
            noise = rng.standard_t(5, true_KN.shape) * np.sqrt(3 / 5) if heavy else rng.normal(0, 1, true_KN.shape)
            return true_KN + sigma * noise

        first_KN = measured(true_KN)
        again_KN = measured(true_KN[:, :repeats])
        verdict, count = "open", 2
        while verdict == "open" and count <= members:
            verdict = likeness(first_KN[:count, :repeats], again_KN[:count], first_KN[:count]).verdict
            count *= 2
        found.append(verdict)
    return found


REAL: list[tuple[Case, float, bool]] = [
    ((2, 1500, 1200, 0.05), 0.2, False),
    ((2, 1500, 1200, 1.0), 0.4, True),
    ((8, 200, 200, 0.3), 0.2, False),
    ((16, 100, 4, 0.1), 0.2, False),
    ((64, 100, 4, 0.1), 0.4, True),
    ((64, 430, 50, 2.0), 0.2, False),
]


@pytest.mark.parametrize(("case", "signal", "heavy"), REAL)
def test_noisy_but_real_members_are_stopped_in_fewer_than_one_of_a_thousand_runs(
    case: Case, signal: float, heavy: bool
) -> None:
    assert looks(case, signal, 2000 if case[0] <= 16 else 500, 1, heavy).count("alike") == 0


@pytest.mark.parametrize("case", [(2, 1500, 1200, 0.05), (2, 1500, 1200, 3.0), (8, 200, 200, 0.3)])
def test_identical_models_are_found_with_the_first_members(case: Case) -> None:
    found = looks(case, 0.0, 400, 2)
    assert found.count("alike") >= 380
    assert found.count("differ") <= 1


def test_a_few_repeats_settle_what_is_clear_and_leave_open_what_is_not() -> None:
    """Without a further measurement: models that differ by ten times the noise, and identical ones."""
    assert set(looks((2, 430, 4, 0.02), 100.0, 200, 3)) == {"differ"}
    assert looks((2, 430, 4, 0.02), 0.0, 400, 4).count("open") >= 398


def test_unmeasured_losses_say_nothing() -> None:
    check_members_differ(np.full((3, 2), np.nan), MODELS)
    check_members_differ(np.ones((1, 5)), MODELS[:1])
    check_members_differ(np.ones((3, 0)), MODELS)
    loss_KN = np.tile([1.0, 2.0, 3.0], (3, 1))
    loss_KN[1, 0] = np.nan
    with pytest.raises(ContractError):
        check_members_differ(loss_KN, MODELS)


def test_one_model_that_answers_in_other_batches_is_found_out() -> None:
    """Values of one model differ by rounding where its batches differ, also where both measurements of it do not."""
    rng = np.random.default_rng(0)
    losses = rng.exponential(2.0, 40)
    again = np.tile(losses[:4], (3, 1))
    rounded = losses + rng.normal(0, 1e-7, (3, 40))
    with pytest.raises(ContractError, match="base model"):
        check_members_differ(rounded, ["a", "b", "c"], again, again)
    others = rounded + rng.normal(0, 0.1, (3, 40))
    assert check_members_differ(others, ["a", "b", "c"], again, again) == "differ"
    others[2] = others[1] + rng.normal(0, 1e-7, 40)
    with pytest.raises(ContractError, match="'b' and 'c' give the same losses"):
        check_members_differ(others, ["a", "b", "c"], again, again)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.003, 0.05])
def test_a_member_is_taken_for_the_base_model_only_where_it_is(noise: float) -> None:
    """2,000 runs of 3 to 12 members that training moved by .05 to 1 nats; in half of them the base answers for one."""
    rng, wrong, found, hidden = np.random.default_rng(int(noise * 1e4)), 0, 0, 0
    for run in range(2000):
        members, moved = int(rng.integers(3, 13)), float(10 ** rng.uniform(-1.3, 0))
        base_N = rng.uniform(1, 5, 16)
        true_KN = base_N + rng.normal(0, moved, 16) + rng.normal(0, moved / 3, (members, 16))
        if run % 2:
            true_KN[0] = base_N
        measured_KN, measured_N = (x + rng.normal(0, noise, x.shape) for x in (true_KN, base_N))
        first, again = (rng.normal(0, noise, (members, 8)) for _ in range(2))
        rows = like_base(measured_KN, measured_N, first, again)
        wrong += rows not in ([], [0] * (run % 2))
        found += rows == [0] and run % 2
        hidden += bool(run % 2) and moved < 60 * noise
    assert wrong == 0
    assert found >= 0.99 * (1000 - hidden)
