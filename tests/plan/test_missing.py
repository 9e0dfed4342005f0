"""The plan of a run that was started is of what is missing."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from test_plan import TODAY, TRAINER, _bytes_for_tokens, config, plan_of  # noqa: F401 - a fixture

from daunce_api.config import RunConfig
from daunce_api.errors import BudgetError, CapabilityError, ConfigurationError
from daunce_api.plan import Missing, Plan, plan_of_missing

NOTHING = Missing(frozenset(), frozenset(), 0, spent_usd=2.0)


def priced(**budget: object) -> RunConfig:
    return config(budget={"price": {"training": 5.0, "input": 1.0, "output": 1.0}, **budget})


def missing(settings: RunConfig, what: Missing, whole: Plan | None = None) -> Plan:
    return plan_of_missing(settings, whole or plan_of(settings), what)


def test_jobs_tokens_and_money_are_of_what_is_missing() -> None:
    settings = priced()
    whole = plan_of(settings)
    plan = missing(settings, Missing(frozenset({2}), frozenset({2, 3}), 3, spent_usd=0.5))
    assert (plan.jobs, plan.models, plan.members) == (1, 3, 4)
    assert plan.training_usd == pytest.approx(whole.training_tokens[2] * 5 / 1e6)
    assert plan.scoring_usd == pytest.approx(3 * (whole.scoring_usd_per_model or 0))
    assert plan.costs is not None
    assert plan.costs.estimate(0) > 0  # a member whose model is gone is trained again
    assert plan.to_json()["spent_usd"] == 0.5
    assert "1 fine-tune of gpt-4.1-mini at OpenAI" in plan.text()
    assert "$0.50 spent or reserved before" in plan.text()
    assert "; the other 3 members have a job" in plan.text()
    everything = frozenset(range(4))
    assert "other" not in dict(missing(settings, Missing(everything, everything, 4)).rows())["Jobs"]


def test_live_jobs_take_time_and_no_money() -> None:
    settings = config(backend={"minutes_per_job": 60})
    plan = missing(settings, Missing(frozenset(), frozenset({0, 1, 2, 3}), 4))
    assert (plan.jobs, plan.training_usd, plan.hours) == (0, 0.0, 2.0)
    assert "4 of 4 members are being trained" in plan.text()


def test_a_finished_run_is_refused_for_nothing_and_costs_nothing() -> None:
    settings = priced(max_usd=1.0)
    whole = replace(plan_of(settings, today=date(2027, 6, 1)), about_jobs=(ConfigurationError("x"),))
    plan = missing(settings, NOTHING, whole)
    plan.check()
    assert (plan.usd, plan.costs_money) == (0.0, False)
    assert "nothing is missing: all 4 members" in plan.text()


def test_the_cap_holds_for_what_was_spent_and_what_is_missing() -> None:
    settings = priced(max_usd=2.0)
    what = Missing(frozenset({3}), frozenset({3}), 1, spent_usd=1.999)
    with pytest.raises(BudgetError, match=r"after \$2\.00 that are spent or reserved"):
        missing(settings, what).check()
    missing(settings, replace(what, spent_usd=0.5)).check()


def test_a_closing_concerns_only_what_is_missing() -> None:
    """OpenAI takes no jobs from 6 January 2027; models of the table live until the 14th or longer."""
    settings = config()
    whole = plan_of(settings, today=date(2027, 1, 7))
    scoring = Missing(frozenset(), frozenset(), 2)
    with pytest.raises(CapabilityError, match="no new fine-tuning jobs"):
        missing(settings, Missing(frozenset({1}), frozenset({1}), 1), whole).check()
    missing(settings, Missing(frozenset(), frozenset({1}), 1), whole).check()  # submitted before the day
    missing(settings, scoring, whole).check()


def test_what_the_trainer_cannot_do_does_not_stop_the_scoring() -> None:
    settings = config(training={"hyperparameters": {"n_epochs": 2, "warmup": 3}})
    whole = plan_of(settings)
    with pytest.raises(ConfigurationError, match="warmup"):
        whole.check()
    missing(settings, Missing(frozenset(), frozenset(), 2), whole).check()


def test_a_model_that_is_gone_is_named_for_what_it_is():
    from daunce_api.plan.asking import gone_text
    from daunce_api.store import BASE, TARGET

    assert gone_text([BASE, TARGET, 3]) == "The models of the base model, the target model, member 3 are gone."
