"""Scores, standard errors, rankings and groups on recorded inputs: a change of the core keeps them, or says why not.

``python -m tests.core.test_core_recorded`` records again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import core
from tests.core.problems import group_scores, linear_problem, top, with_checkpoints

FILE = Path(__file__).with_name("recorded") / "core.npz"
NAMES = ("auto", "covariance", "correlation", "inclusion", "whitened", "half_whitened")


def conditions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Inputs by name: members that choose and few of them, noise, checkpoints (with gaps), weights, missing columns."""
    rng = np.random.default_rng(3)
    p = linear_problem(members=26, train=18, test=4, rank=9)
    train, test = (x + 0.02 * rng.normal(size=x.shape) for x in (p.train, p.test))
    plain = {"train_loss_KN": train, "test_loss_KM": test, "inclusion_KN": p.inclusion}
    earlier = with_checkpoints(p, 2)
    gaps = [earlier.train_loss_SKN.copy(), earlier.test_loss_SKM.copy()]
    gaps[0][0, [3, 8]] = np.nan
    holes = [train.copy(), test.copy()]
    holes[0][:, [4, 15]], holes[1][:, 2] = np.nan, np.nan
    holes[0][7] = np.nan
    yield "plain", plain
    yield "noise", {**plain, "noise": 0.02}
    yield "short", {**plain, "rho": 0.02}
    yield "checkpoints", {**plain, "noise": 0.02, "earlier": core.Checkpoints(*gaps)}
    yield "weights", {**plain, "inclusion_KN": p.inclusion * rng.uniform(0.5, 1.5, p.inclusion.shape)}
    yield "missing", {**plain, "train_loss_KN": holes[0], "test_loss_KM": holes[1]}
    few = {name: value[:9] for name, value in plain.items()}
    yield "few", few
    yield "few short", {**few, "rho": 0.1, "noise": 0.02}
    yield "single precision", {**plain, "train_loss_KN": train.astype(np.float32), "test_loss_KM": test.astype("f4")}


def measure(name: str, known: dict[str, Any]) -> dict[str, np.ndarray]:
    """Everything that callers read of one estimator."""
    ranking = top(k=4, estimator=name, **known)
    per_train = top(k=2, estimator=name, per="train", opponents=True, **known)
    labels = [i % 5 for i in range(known["train_loss_KN"].shape[1])]
    groups = group_scores(train_labels_N=labels, estimator=name, **known)
    both = group_scores(
        train_labels_N=labels,
        test_labels_M=[j % 2 for j in range(known["test_loss_KM"].shape[1])],
        estimator=name,
        **known,
    )
    return {
        "score_NM": core.scores(estimator=name, **known),
        "index": ranking.index_Mk,
        "score": ranking.score_Mk,
        "stderr": ranking.stderr_Mk,
        "z": ranking.z_Mk,
        "per_train": per_train.score_Mk,
        "per_train_stderr": per_train.stderr_Mk,
        "group": groups.score_GH,
        "group_stderr": groups.stderr_GH,
        "both": both.score_GH,
        "both_stderr": both.stderr_GH,
    }


CASES = {f"{condition}/{name}": (name, known) for condition, known in conditions() for name in NAMES}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(FILE) as stored:
        return dict(stored)


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_the_recorded_ones(case: str, recorded: dict[str, np.ndarray]) -> None:
    single = case.startswith("single")
    for key, value in measure(*CASES[case]).items():
        expected = recorded[f"{case}/{key}"]
        scale = np.nanmax(np.abs(expected), initial=1e-12)
        np.testing.assert_allclose(
            value, expected, rtol=1e-3 if single else 1e-10, atol=(1e-4 if single else 1e-10) * scale, err_msg=key
        )


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    every = {f"{case}/{key}": value for case, given in CASES.items() for key, value in measure(*given).items()}
    np.savez_compressed(FILE, **every)  # type: ignore[arg-type]
