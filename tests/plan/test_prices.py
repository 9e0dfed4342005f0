"""The price table: every record has a source, the rest is not known, and hours are paid for where they are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any

import pytest

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import LocalTokenizer, encode_dataset
from daunce_api.errors import BudgetError
from daunce_api.plan import Hosting, Plan, make_plan
from daunce_api.plan.prices import hosting_of, prices_of
from daunce_api.providers.base import ScorerCapabilities, TrainerCapabilities
from daunce_api.providers.registry import capabilities_of
from daunce_api.providers.tokenizers import embedded_folder

TODAY = "2026-11-22"
HOURLY = ScorerCapabilities("Fireworks", "any", hourly=True)
LLAMA = "accounts/fireworks/models/llama-v3p1-8b-instruct"
TABLE: dict[str, Any] = json.loads((files("daunce_api.plan") / "prices.json").read_text())


def config(kind: str, model: str, scorer: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    backend: dict[str, Any] = {"kind": kind, "model": model, "tokenizer": "gpt-4o", "scorer": scorer or {}}
    if kind == "azure":
        backend["base_url"] = "https://mine.openai.azure.com"
    return RunConfig.from_mapping(
        {"data": {"train": "a", "test": "b"}, "backend": backend, "ensemble": {"members": 4}, **sections}
    )


def plan_of(settings: RunConfig, scorer: ScorerCapabilities = HOURLY) -> Plan:
    data = Dataset.from_records([{"prompt": f"{i:02}", "completion": "y"} for i in range(20)], name="train.jsonl")
    encode = partial(encode_dataset, tokenizer=LocalTokenizer(embedded_folder()), loss_on=settings.data.loss_on)
    trainer = TrainerCapabilities("Fireworks", max_concurrent_jobs=4)
    return make_plan(settings, data, data[:2], encode, trainer, scorer)


def test_every_record_has_a_date_and_a_source() -> None:
    for entry in [*TABLE["prices"], *TABLE["hosting"]]:
        assert entry["source"].startswith("https://")
        assert re.fullmatch(r"\d{4}(-\d\d)?", entry["as_of"])
        assert entry["as_of"] <= TODAY
        assert all(entry.get(kind) is None or entry[kind] > 0 for kind in ("training", "input", "output", "hour"))
    for entry in TABLE["prices"]:
        assert any(entry.get(kind) for kind in ("training", "input", "output"))
        assert ("model" in entry) != ("billions" in entry)
    names = [(e["backend"], e.get("model"), tuple(e.get("billions", ()))) for e in TABLE["prices"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("kind", "model", "training", "scoring"),
    [
        ("tinker", "Qwen/Qwen3-8B", 0.44, 0.195),
        ("tinker", "Qwen/Qwen3.8-27B", None, 1.86),
        ("tinker", "Qwen/Qwen3-8B-Base", None, None),
        ("together", "Qwen/Qwen3.5-9B", 0.34, 0.0),
        ("together", "meta-llama/Llama-3.3-70B", None, 0.0),
        ("fireworks", LLAMA, 0.5, 0.0),
        ("fireworks", "accounts/fireworks/models/qwen2p5-0p5b-instruct", 0.5, 0.0),
        ("fireworks", "accounts/fireworks/models/qwen3-30b-a3b", 3.0, 0.0),
        ("fireworks", "accounts/fireworks/models/llama-v3p1-405b-instruct", 10.0, 0.0),
        ("fireworks", "accounts/fireworks/models/gpt-oss-120b", 6.0, 0.0),
        ("fireworks", "accounts/fireworks/models/mixtral-8x7b", None, 0.0),
        ("fireworks", "accounts/fireworks/models/deepseek-v3", None, 0.0),
        ("azure", "gpt-4.1-mini", None, None),
    ],
)
def test_prices_of_other_providers(kind: str, model: str, training: float | None, scoring: float | None) -> None:
    trained, scored = prices_of(config(kind, model))
    assert (trained.training, scored.input) == (training, scoring)


@pytest.mark.parametrize(
    ("kind", "model", "given"),
    [("together", "Qwen/Qwen3.5-9B", {"lora": 0}), ("fireworks", LLAMA, {"lora_rank": 0})],
)
def test_the_price_of_an_adapter_is_not_that_of_all_weights(kind: str, model: str, given: dict[str, int]) -> None:
    assert prices_of(config(kind, model, training={"hyperparameters": given}))[0].training is None


def test_who_is_paid_by_the_hour() -> None:
    found = {
        kind: capabilities_of(config(kind, "m"))[1].hourly for kind in ("together", "fireworks", "azure", "tinker")
    }
    assert found == {"together": True, "fireworks": True, "azure": True, "tinker": False}
    cheap = config("azure", "m", {"options": {"sku": "DeveloperTier"}})
    assert not capabilities_of(cheap)[1].hourly


def test_hours_are_known_by_provider_and_never_guessed() -> None:
    fireworks = hosting_of(config("fireworks", LLAMA), HOURLY)
    assert fireworks is not None
    assert (fireworks.usd_per_hour, fireworks.hours, fireworks.usd) == (8.0, None, None)
    assert fireworks.text.startswith("$8.00 an hour (one H100 or H200 GPU")
    assert fireworks.text.endswith("as of 2026-10); set budget.hosting_hours to see it")
    together = hosting_of(config("together", "m", budget={"hosting_hours": 2}), HOURLY)
    assert together is not None
    assert (together.usd_per_hour, together.usd) == (None, None)
    assert together.text.endswith("; set budget.price.hosting to see it")
    given = hosting_of(config("together", "m", budget={"hosting_hours": 2, "price": {"hosting": 5}}), HOURLY)
    assert given == Hosting(5.0, 2.0, "budget.price")
    assert given.usd == 10.0
    azure = hosting_of(config("azure", "m", budget={"hosting_hours": 10}), HOURLY)
    assert azure is not None
    assert azure.usd == pytest.approx(17.0)


def test_an_endpoint_on_this_machine_or_paid_by_the_token_has_no_hours() -> None:
    here = config("local", "daunce-tiny", {"kind": "together", "base_url": "http://127.0.0.1:9/v1"})
    assert hosting_of(here, HOURLY) is None
    assert hosting_of(config("fireworks", LLAMA), replace(HOURLY, hourly=False)) is None


def test_a_plan_adds_the_hours_to_scoring() -> None:
    plan = plan_of(config("fireworks", LLAMA, budget={"hosting_hours": 3}))
    assert plan.scoring_usd == pytest.approx(24.0)
    assert plan.scoring_usd_per_model == pytest.approx(6.0)
    assert plan.usd == pytest.approx((plan.training_usd or 0) + 24.0)
    content = plan.to_json()
    assert (content["hosting_usd"], content["hosting_usd_per_hour"], content["hosting_hours"]) == (24.0, 8.0, 3.0)
    assert "Scoring cost:    $24.00 (tokens: its hours are paid for, not its tokens; endpoint: 3 hours at $8.00" in (
        plan.text()
    )


def test_a_plan_without_hours_says_what_to_set_and_a_cap_is_a_refusal() -> None:
    plan = plan_of(config("fireworks", LLAMA))
    assert plan.usd is None
    assert plan.training_usd is not None
    assert "set budget.hosting_hours to see it" in plan.text()
    capped = plan_of(config("fireworks", LLAMA, budget={"max_usd": 100}))
    with pytest.raises(BudgetError, match=r"price of scoring .* paid for by the hour: .*set budget\.hosting_hours"):
        capped.check()
    with pytest.raises(BudgetError, match=r"about \$24\.00"):
        plan_of(config("fireworks", LLAMA, budget={"max_usd": 20, "hosting_hours": 3})).check()


def test_a_price_per_hour_alone_leaves_the_prices_of_tokens() -> None:
    trained, scored = prices_of(config("tinker", "Qwen/Qwen3-8B", budget={"price": {"hosting": 1}}))
    assert trained.source == scored.source == "https://tinker-docs.thinkingmachines.ai/tinker/models/, as of 2026-10"


def test_tokens_of_together_without_packing_are_said_to_be_more() -> None:
    packed, unpacked = (
        capabilities_of(config("together", "m", training={"hyperparameters": {"packing": value}}))[0].notes
        for value in (1, 0)
    )
    assert len(unpacked) == len(packed) + 1
    assert "max_seq_length" in unpacked[-1]
