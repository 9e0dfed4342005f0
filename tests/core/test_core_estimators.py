from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api.core import ESTIMATORS, member_losses, scores
from daunce_api.core.rows import inclusion_dispersion
from daunce_api.errors import ConfigurationError, DataError, NotEnoughMembersError
from tests.core.problems import linear_problem, mean_correlation

A = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 1.0], [4.0, 0.0, 5.0], [1.0, 1.0, 2.0]])
B = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0], [0.0, 2.0]])
I = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 0], [1, 0, 0]], dtype=bool)  # noqa: E741
AC, BC, IC = A - A.mean(0), B - B.mean(0), I - I.mean(0)


def _of_the_spectrum(phi: object) -> np.ndarray:
    w, u = np.linalg.eigh(AC @ AC.T)
    w, u = w[1:], u[:, 1:]  # centring makes one direction empty
    return AC.T @ u @ np.diag(phi(w)) @ u.T @ BC  # type: ignore[operator]


def test_covariance_is_the_sample_covariance() -> None:
    expected = np.cov(A.T, B.T)[:3, 3:]
    assert np.allclose(scores(A, B, estimator="covariance"), expected)


def test_correlation_is_pearsons() -> None:
    assert np.allclose(scores(A, B, estimator="correlation"), np.corrcoef(A.T, B.T)[:3, 3:])


def test_inclusion_is_minus_the_covariance_with_membership() -> None:
    expected = -np.cov(I.T.astype(float), B.T)[:3, 3:]
    assert np.allclose(scores(A, B, I, "inclusion"), expected)


def test_whitened_is_ridge_in_member_space() -> None:
    g = AC @ AC.T
    ridge = np.trace(g) / 4
    expected = AC.T @ np.linalg.solve(g + ridge * np.eye(4), BC)
    assert np.allclose(scores(A, B, estimator="whitened"), expected)


def test_half_whitened_is_the_inverse_root() -> None:
    assert np.allclose(scores(A, B, estimator="half_whitened"), _of_the_spectrum(lambda w: w**-0.5))


def test_noise_is_taken_off_the_eigenvalues() -> None:
    noise = 0.8
    floor = 3 * noise**2

    def phi(w: np.ndarray) -> np.ndarray:
        s = np.maximum(w - floor, 0)
        return np.where(s > 0, (s / w) ** 2 / np.sqrt(np.where(s > 0, s, 1)), 0)

    assert np.allclose(scores(A, B, estimator="half_whitened", noise=noise), _of_the_spectrum(phi))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_positive_means_helpful(name: str) -> None:
    problem = linear_problem()
    score = scores(problem.train, problem.test, problem.inclusion, name, rho=0.5)
    assert mean_correlation(score, problem.influence) > 0.4


def test_half_whitening_recovers_influence_where_members_share_the_recipe() -> None:
    p = linear_problem(members=400)
    right = mean_correlation(scores(p.train, p.test, p.inclusion, "half_whitened"), p.influence)
    assert right > 0.995
    assert right > mean_correlation(scores(p.train, p.test, p.inclusion, "covariance"), p.influence) + 0.02


@pytest.mark.parametrize("name", ["auto", *ESTIMATORS])
def test_two_members_are_enough_and_one_is_not(name: str) -> None:
    assert scores(A[:2], B[:2], I[:2], name, rho=0.2).shape == (3, 2)
    with pytest.raises(NotEnoughMembersError, match="score more members"):
        scores(A[:1], B[:1], I[:1], name, rho=0.2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_single_precision_stays_single_and_agrees(name: str) -> None:
    p = linear_problem()
    single = scores(p.train.astype(np.float32), p.test.astype(np.float32), p.inclusion, name, rho=0.3)
    double = scores(p.train, p.test, p.inclusion, name, rho=0.3)
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert np.abs(single - double).max() < 2e-3 * np.abs(double).max()


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(sorted(ESTIMATORS)))
def test_no_estimator_sees_order_or_level(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(9, 7)), rng.normal(size=(9, 4))
    inclusion = rng.random((9, 7)) < 0.5
    inclusion[0, 0], inclusion[1, 0] = True, False
    base = scores(train, test, inclusion, name, rho=0.3)
    order = rng.permutation(9)
    assert np.allclose(scores(train[order], test[order], inclusion[order], name, rho=0.3), base)
    assert np.allclose(scores(train + 5, test - 1, inclusion, name, rho=0.3), base)
    swap = rng.permutation(7)
    assert np.allclose(scores(train[:, swap], test, inclusion[:, swap], name, rho=0.3), base[swap])


def test_what_is_asked_for_without_its_arguments_is_refused() -> None:
    for name, arguments in {"inclusion": {}, "nothing": {}}.items():
        with pytest.raises(ConfigurationError):
            scores(A, B, None, name, **arguments)
    for bad in ({"noise": -1.0}, {"rho": 0.0}, {"noise": float("nan")}):
        with pytest.raises(ConfigurationError):
            scores(A, B, I, "whitened", **bad)


def test_noise_above_everything_is_said_and_not_computed() -> None:
    with pytest.raises(DataError, match="Scoring noise"):
        scores(A, B, estimator="half_whitened", noise=100.0)


def test_shapes_and_infinities_are_refused() -> None:
    with pytest.raises(DataError, match="same K members"):
        scores(A, B[:3])
    with pytest.raises(DataError, match="Inclusion has shape"):
        scores(A, B, I[:, :2])
    spoiled = A.copy()
    spoiled[1, 1] = np.inf
    with pytest.raises(DataError, match="Member 1"):
        scores(spoiled, B)
    with pytest.raises(DataError, match="same loss"):
        scores(np.ones((4, 3)), B, estimator="whitened")
    with pytest.raises(DataError, match="Every member was trained on every example"):
        scores(A, B, np.ones_like(I), "whitened")


def test_members_without_losses_are_left_out() -> None:
    train, test = A.copy(), B.copy()
    train[3] = np.nan
    members = member_losses(train, test, I)
    assert members.kept_K.tolist() == [0, 1, 2]
    assert np.allclose(scores(train, test, I, "covariance"), scores(A[:3], B[:3], I[:3], "covariance"))


def test_the_dispersion_of_a_design_is_relative_to_the_share_that_takes_part() -> None:
    counts = np.array([[1, 0, 1, 0], [0, 1, 0, 1]])
    assert inclusion_dispersion(counts.astype(bool)) == inclusion_dispersion(counts.astype(float)) == 1.0
    assert inclusion_dispersion(np.array([[2, 0, 1, 1]])) == 0.5, "bootstrap subsets: counts, over their mean"
    noise = np.array([[0.5, -0.5, 0.0, 0.0]])
    assert inclusion_dispersion(noise) == 0.125 / 0.5**2, "the mean of noise is no ratio"
    with pytest.raises(DataError, match="subset is empty"):
        inclusion_dispersion(np.zeros((2, 3)))
