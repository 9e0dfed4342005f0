"""Prices and closing dates as data: how old they are, and which model at which provider they are about."""

from __future__ import annotations

import json
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from daunce_api.config import RunConfig
from daunce_api.plan.prices import Hosting, Price, closing_of, hosting_of, price_notes, prices_of
from daunce_api.providers.base import JobStatus
from daunce_api.providers.registry import BACKENDS, capabilities_of
from daunce_api.status import _models_until
from daunce_api.store import RunStore

NOVEMBER = date(2026, 11, 28)


def config(kind: str, model: str, **changes: Any) -> RunConfig:
    backend = {"kind": kind, "model": model, "base_url": changes.pop("base_url", None)}
    return RunConfig.from_mapping({"data": {"train": "a", "test": "b"}, "backend": backend, **changes})


def test_every_figure_has_a_source_and_a_date_of_a_provider_that_there_is() -> None:
    table = json.loads((files("daunce_api.plan") / "prices.json").read_text())
    entries = [e for section in ("prices", "hosting", "storage", "closings") for e in table[section]]
    assert all(e["source"].startswith("https://") for e in entries)
    assert all(date.fromisoformat(f"{e['as_of']}-01" if "-" in e["as_of"] else f"{e['as_of']}-01-01") for e in entries)
    assert {e["backend"] for e in entries} <= BACKENDS.keys()


@pytest.mark.parametrize(
    ("as_of", "today", "stale"),
    [
        ("2026-09", NOVEMBER, False),
        ("2026-08", date(2026, 11, 26), False),
        ("2026-08", date(2026, 11, 27), True),
        ("2025", NOVEMBER, True),
        (None, NOVEMBER, False),
    ],
)
def test_a_plan_warns_of_prices_that_are_older_than_90_days(as_of: str | None, today: date, stale: bool) -> None:
    given = config("together", "Qwen/Qwen3.5-9B")
    for priced in (Price(1.0, as_of=as_of), Hosting(1.0, 1.0, "x", as_of)):
        notes = price_notes(given, today, priced, None)
        assert any("older than 90 days" in note and str(as_of) in note for note in notes) is stale


def test_what_the_config_prices_is_not_old() -> None:
    price = {"training": 1.0, "input": 1.0, "output": 1.0, "hosting": 2.0}
    given = config("openai", "gpt-4.1-mini", budget={"price": price})
    assert all(p.as_of is None for p in prices_of(given))
    assert prices_of(config("openai", "gpt-4.1-mini"))[0].as_of == "2025"
    fireworks = config("fireworks", "accounts/fireworks/models/qwen3-8b", budget={"price": {"hosting": 2.0}})
    hosting = hosting_of(fireworks, capabilities_of(fireworks)[1])
    assert hosting is not None
    assert hosting.as_of is None


@pytest.mark.parametrize(
    ("kind", "model", "jobs", "end"),
    [
        ("openai", "gpt-4.1-mini-2025-04-14", "2027-01-06", "2027-01-14"),
        ("openai", "gpt-4.1-nano", "2026-10-23", "2026-10-23"),
        ("openai", "some-new-model", "2027-01-06", None),
        ("azure", "gpt-4.1-nano", "2027-04-14", "2027-10-14"),
        ("azure", "gpt-4o-2024-08-06", "2027-04-01", "2027-10-01"),
    ],
)
def test_closing_dates_are_the_providers_own(kind: str, model: str, jobs: str, end: str | None) -> None:
    closing = closing_of(config(kind, model, base_url="https://x.openai.azure.com" if kind == "azure" else None))
    assert closing is not None
    assert (closing["no_new_jobs_from"], closing["models_end"]) == (jobs, end)


def test_open_models_at_azure_have_no_closing_date() -> None:
    assert closing_of(config("azure", "gpt-oss-20b", base_url="https://x.openai.azure.com")) is None


def test_what_saved_models_cost_by_the_month_is_in_the_plan() -> None:
    (note,) = price_notes(config("tinker", "Qwen/Qwen3-8B"), NOVEMBER)
    assert "$0.10 per GB and month" in note
    assert "daunce clean" in note
    (note,) = price_notes(config("tinker", "Qwen/Qwen3-8B", ensemble={"keep_days": 30}), NOVEMBER)
    assert "for 30 days" in note
    # 32 members and 2 checkpoints each: .42 GB at the default rank of 32, a quarter of it at rank 8.
    (note,) = price_notes(config("tinker", "Qwen/Qwen3-8B", ensemble={"checkpoints": 2}), NOVEMBER)
    assert "about $2.70 a month for 64 models of some 0.42 GB" in note
    small = {"training": {"hyperparameters": {"rank": 8}}, "ensemble": {"start_from": "target"}}
    (note,) = price_notes(config("tinker", "Qwen/Qwen3-8B", **small), NOVEMBER)
    assert "about $0.35 a month for 33 models of some 0.11 GB" in note
    (note,) = price_notes(config("tinker", "thinkingmachines/Inkling"), NOVEMBER)
    assert "models are kept until `daunce clean`; ensemble.keep_days limits that: $0.10 per GB and month" in note
    assert price_notes(config("tinker", "m", base_url="http://127.0.0.1:8411"), NOVEMBER) == []


def test_status_names_the_day_on_which_the_first_kept_model_goes(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as store:
        for member in (0, 1):
            key = f"abc-m{member}-a1"
            store.jobs.intent(key, member, 1, "{}")
            store.jobs.submitted(key, f"job-{member}")
            store.jobs.state(key, JobStatus.SUCCEEDED, f"tinker://{member}", trained_tokens=7)
        ended = min(str(row.ended_at) for row in store.jobs.rows() if row.model)
        day = date.fromisoformat(ended[:10]) + timedelta(days=30)
        kept = config("tinker", "Qwen/Qwen3-8B", ensemble={"keep_days": 30})
        assert _models_until(store, kept) == day.isoformat()
        assert _models_until(store, config("tinker", "Qwen/Qwen3-8B")) is None
