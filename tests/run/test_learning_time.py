"""rho of members that start from the target, from their recipes alone."""

from __future__ import annotations

from typing import Any

import pytest

from daunce_api import RunConfig
from daunce_api.providers.learning_time import Rho, rho_of

PLAIN = {"n_epochs": 2, "batch_size": 4, "learning_rate": 0.1}


def ratio(member: dict[str, Any], target: dict[str, Any] | None, kind: str = "local", **ensemble: Any) -> Rho:
    options = ensemble.pop("options", {"task": "tasks.py:digits"} if kind == "local" else {})
    url = {"base_url": "http://127.0.0.1:1/v1"} if kind in ("azure", "openai_wire") else {}
    config = RunConfig.from_mapping(
        {
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "backend": {"kind": kind, "model": "fresh", "options": options, **url},
            "ensemble": {"members": 4, "subset_ratio": 0.5, "start_from": "target", **ensemble},
            "training": {"hyperparameters": member, "target_hyperparameters": target},
        }
    )
    return rho_of(config, 40)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ({}, 0.5),
        ({"n_epochs": 1}, 0.25),
        ({"learning_rate": 0.05}, 0.25),
        ({"batch_size": 8}, 0.3),  # three steps of 8 against ten of 4
        ({"schedule": "cosine"}, 0.25),
        ({"schedule": "linear", "momentum": 0.5}, 0.5),
        ({"momentum": 0.9}, 5.0),
        ({"schedule": "auto"}, 0.5),
        ({"n_epochs": "auto"}, 0.25),
        ({"optimizer": "adamw"}, "unknown"),
        ({"weight_decay": 0.1}, "unknown"),
    ],
)
def test_a_classifier(member: dict[str, Any], expected: Rho) -> None:
    assert ratio(PLAIN | member, PLAIN) == (expected if isinstance(expected, str) else pytest.approx(expected))


TOGETHER = {"n_epochs": 4, "batch_size": 8, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("kind", "member", "target", "expected"),
    [
        ("together", {}, TOGETHER | {"gradient_accumulation_steps": 8}, 4.0),
        ("together", {"gradient_accumulation_steps": 8}, TOGETHER, 0.0625),
        ("together", {"lr_scheduler_type": "linear"}, TOGETHER | {"lr_scheduler_type": "cosine"}, 0.5),
        (
            "together",
            {"lr_scheduler_type": "linear", "min_lr_ratio": 0.5},
            TOGETHER | {"lr_scheduler_type": "cosine"},
            0.75,
        ),
        ("together", {"lora": 0}, TOGETHER | {"lora": 1}, "unknown"),
        ("together", {"lora": 0}, TOGETHER, "unknown"),
        ("together", {"scheduler_num_cycles": 2}, TOGETHER, "unknown"),
        ("fireworks", {"epochs": 1}, {"epochs": 4}, 0.125),
        ("fireworks", {"epochs": 1, "learning_rate": 1e-4}, {"epochs": 4}, "unknown"),
        ("fireworks", {"epochs": 1, "gradient_accumulation_steps": 2}, {"epochs": 4}, 0.0625),
        ("fireworks", {"epochs": 1, "learning_rate_warmup_steps": 10}, {"epochs": 4}, "unknown"),
        ("fireworks", {}, {}, "unknown"),
        ("tinker", {"n_epochs": 1}, {}, 1 / 5),  # three steps of 8 against five, of one and of three epochs
        ("tinker", {"n_epochs": 1, "rank": 8}, {}, "unknown"),
        ("embedded", {"n_epochs": 1}, {}, 1 / 5),
        ("embedded", {"n_epochs": 1, "learning_rate_multiplier": 0.5}, {"batch_size": "auto"}, 1 / 10),
        ("openai", {"n_epochs": 1}, {"n_epochs": 4}, "unknown"),  # batch size and rate follow the file
        ("openai", {"n_epochs": 1, "batch_size": 4}, {"n_epochs": 4, "batch_size": 4}, "unknown"),
        ("openai_wire", {"n_epochs": 1, "batch_size": 4}, {"n_epochs": 4, "batch_size": 4}, "unknown"),
    ],
)
def test_providers_by_their_own_names(kind: str, member: dict[str, Any], target: dict[str, Any], expected: Rho) -> None:
    found = ratio((TOGETHER | member) if kind == "together" else member, target, kind)
    assert found == (expected if isinstance(expected, str) else pytest.approx(expected))


def test_what_is_sent_to_together_where_nothing_is_given_is_known() -> None:
    assert rho_of(RunConfig.from_mapping(together({})), 40) == pytest.approx(0.5)
    assert rho_of(RunConfig.from_mapping(together({"n_epochs": 6})), 40) == pytest.approx(0.25)


def together(target: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "backend": {"kind": "together", "model": "fresh"},
        "ensemble": {"members": 4, "subset_ratio": 0.5, "start_from": "target"},
        "training": {"target_hyperparameters": target},
    }


def test_openai_says_all_three_or_nothing_is_known() -> None:
    whole = {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2}
    assert ratio(whole, whole | {"n_epochs": 4}, "openai") == pytest.approx(0.125)


def test_a_language_model_on_this_machine() -> None:
    lora: dict[str, Any] = {"options": {}}
    assert ratio({"n_epochs": 1}, {"n_epochs": 4}, **lora) == pytest.approx(0.15)
    assert ratio({"n_epochs": 1, "learning_rate": 5e-4}, {"n_epochs": 4}, **lora) == pytest.approx(0.075)
    assert ratio({"n_epochs": 1, "lora_rank": 4}, {"n_epochs": 4}, **lora) == "unknown"


def test_members_that_are_trained_like_the_target() -> None:
    assert ratio(PLAIN, None, start_from="base") == "base"
    assert ratio(PLAIN, PLAIN, options={"task": "tasks.py:digits", "objective": "fisher"}) == "base"
    assert ratio(PLAIN, PLAIN, options={"task": "tasks.py:digits", "objective": "influence"}) == pytest.approx(0.5)


def test_a_target_from_elsewhere_is_unknown() -> None:
    assert ratio(PLAIN, PLAIN, target_model="ft:mine") == "unknown"
