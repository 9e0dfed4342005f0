"""rho of members that start from the target, from their recipes alone."""

from __future__ import annotations

from typing import Any

import pytest

from daunce_api import RunConfig
from daunce_api.attribution.from_store import learning_time_ratio

PLAIN = {"n_epochs": 2, "batch_size": 4, "learning_rate": 0.1}


def ratio(
    member: dict[str, Any], target: dict[str, Any], options: dict[str, Any] | None = None, **ensemble: Any
) -> float | None:
    config = RunConfig.from_mapping(
        {
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "backend": {"kind": "local", "model": "fresh", "options": options or {}},
            "ensemble": {"members": 4, "subset_ratio": 0.5, "start_from": "target", **ensemble},
            "training": {"hyperparameters": member, "target_hyperparameters": target},
        }
    )
    return learning_time_ratio(config, 40)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ({}, 0.5),
        ({"n_epochs": 1}, 0.25),
        ({"learning_rate": 0.05}, 0.25),
        ({"batch_size": 8}, 0.25),
        ({"schedule": "cosine"}, 0.25),
        ({"schedule": "linear", "momentum": 0.5}, 0.5),
        ({"momentum": 0.9}, 5.0),
        ({"optimizer": "adamw"}, None),
        ({"schedule": "auto"}, None),
        ({"momentum": "auto"}, None),
        ({"n_epochs": "auto"}, None),
    ],
)
def test_the_ratio_of_learning_times(member: dict[str, Any], expected: float | None) -> None:
    found = ratio(PLAIN | member, PLAIN)
    assert found == (None if expected is None else pytest.approx(expected))


def test_equal_recipes_of_any_kind_differ_by_the_subset_alone() -> None:
    recipe = PLAIN | {"momentum": 0.9, "schedule": "cosine", "optimizer": "sgd"}
    assert ratio(recipe, recipe) == pytest.approx(0.5)


def test_members_of_squared_margins_are_not_short() -> None:
    assert ratio(PLAIN, PLAIN, {"objective": "influence"}) == 0.5
    assert ratio(PLAIN, PLAIN, {"objective": "fisher"}) is None


def test_members_from_the_base_have_none() -> None:
    assert ratio(PLAIN, PLAIN, start_from="base") is None
