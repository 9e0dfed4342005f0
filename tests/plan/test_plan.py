"""Plans: exact tokens and dollars, every reason not to start, and what is not known said to be so."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.subsets import plan_ensemble
from daunce_api.data.tokenizers import Encode, encode_dataset, encode_example
from daunce_api.errors import BudgetError, CapabilityError, ConfigurationError, DataError
from daunce_api.plan import Plan, make_plan
from daunce_api.plan.prices import prices_of
from daunce_api.plan.tokens import epochs_of
from daunce_api.providers.base import ModelInfo, ScorerCapabilities, TrainerCapabilities
from daunce_api.providers.registry import open_tokenizer

TODAY = date(2026, 11, 22)
TRAINER = TrainerCapabilities(
    "OpenAI", max_concurrent_jobs=3, min_examples=10, hyperparameters=frozenset({"n_epochs", "batch_size"})
)
ECHO = ScorerCapabilities("echo", "any", max_context_tokens=64)
ONE_TOKEN = ScorerCapabilities("one-token chat", "one_token")


@pytest.fixture(autouse=True)
def _bytes_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiktoken encoding of one token a byte, so that counts can be done by hand and nothing is downloaded."""
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r".|\n", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: encoding)


def chats(n: int, answer: str = "yn") -> Dataset:
    return Dataset.from_records(
        [
            {
                "messages": [
                    {"role": "user", "content": f"{i:03}"},
                    {"role": "assistant", "content": answer[i % len(answer)] if len(answer) == 2 else answer},
                ]
            }
            for i in range(n)
        ],
        name="train.jsonl",
    )


def config(**sections: Any) -> RunConfig:
    content: dict[str, Any] = {
        "data": {"train": "a", "test": "b"},
        "backend": {"kind": "openai", "model": "gpt-4.1-mini"},
        "ensemble": {"members": 4},
        "training": {"hyperparameters": {"n_epochs": 2}},
        "scoring": {"noise_probe": 0},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return RunConfig.from_mapping(content)


def encoder(settings: RunConfig) -> Encode:
    return partial(encode_dataset, tokenizer=open_tokenizer(settings), loss_on=settings.data.loss_on)


def plan_of(
    settings: RunConfig | None = None,
    train: Dataset | None = None,
    trainer: TrainerCapabilities = TRAINER,
    scorer: ScorerCapabilities = ONE_TOKEN,
    **options: Any,
) -> Plan:
    settings = settings or config()
    options.setdefault("today", TODAY)
    return make_plan(settings, train or chats(40), chats(2), encoder(settings), trainer, scorer, **options)


# One of these chats: 3 for the reply, 3 a message, "user" and "assistant", three digits and one letter.
CHAT = 3 + (3 + 4 + 3) + (3 + 9 + 1)
PROMPT = 3 + (3 + 4 + 3)


def test_tokens_and_dollars_of_an_openai_run_by_hand() -> None:
    plan = plan_of()
    assert plan.training_tokens == dict.fromkeys(range(4), 2 * 20 * CHAT)
    assert plan.training_usd == pytest.approx(4 * 2 * 20 * CHAT * 5.0 / 1e6)
    # The two test chats are also training chats: scored once.
    assert (plan.scoring_input_tokens, plan.scoring_output_tokens) == (40 * PROMPT, 40)
    assert plan.scoring_usd_per_model == pytest.approx((40 * PROMPT * 0.8 + 40 * 3.2) / 1e6)
    assert plan.usd == pytest.approx(plan.training_usd + 4 * plan.scoring_usd_per_model)
    assert plan.costs is not None
    assert plan.costs.estimate(0) == pytest.approx(2 * 20 * CHAT * 5.0 / 1e6)
    assert plan.costs.billed(1_000_000) == pytest.approx(5.0)
    assert plan.costs_money
    plan.check()


def test_the_noise_probe_is_paid_for() -> None:
    plan = plan_of(config(scoring={"noise_probe": 4}))
    assert plan.again_tokens == (4 * PROMPT, 4)
    assert plan.scoring_tokens == (4 * 44 * PROMPT, 4 * 44)
    assert plan.scoring_usd == pytest.approx(4 * (44 * PROMPT * 0.8 + 44 * 3.2) / 1e6)


def test_a_batch_discount_is_taken_off_scoring_alone() -> None:
    full, half = plan_of(), plan_of(scorer=replace(ONE_TOKEN, price_factor=0.5))
    assert half.scoring_usd == pytest.approx((full.scoring_usd or 0) / 2)
    assert half.training_usd == full.training_usd


def test_a_target_model_is_a_job_on_all_examples() -> None:
    plan = plan_of(
        config(
            ensemble={"start_from": "target"},
            training={"target_hyperparameters": {"n_epochs": 3}},
            scoring={"target": True},
        )
    )
    assert plan.training_tokens[-1] == 3 * 40 * CHAT
    assert (plan.jobs, plan.scored_models) == (5, 5)
    given = plan_of(config(ensemble={"start_from": "target", "target_model": "ft:mine"}))
    assert -1 not in given.training_tokens
    assert (given.jobs, given.scored_models) == (4, 4)


@given(n=st.integers(20, 60), members=st.integers(2, 6), ratio=st.floats(0.5, 0.9), epochs=st.integers(1, 5))
@settings(max_examples=15)
def test_embedded_tokens_are_those_of_the_ids_that_are_trained_on(
    n: int, members: int, ratio: float, epochs: int
) -> None:
    settings = config(
        backend={"kind": "embedded", "model": "daunce-tiny"},
        ensemble={"members": members, "subset_ratio": ratio},
        training={"hyperparameters": {"n_epochs": epochs}},
    )
    train = Dataset.from_records(
        [{"prompt": f"What is {i}? ", "completion": "a number " * (i % 5 + 1)} for i in range(n)]
    )
    plan = make_plan(settings, train, train, encoder(settings), TRAINER, ECHO, today=TODAY)
    tokenizer = open_tokenizer(settings)
    lengths = [len(encode_example(e, tokenizer).ids) for e in train]
    ensemble = plan_ensemble(n, members, ratio, 0)
    assert plan.training_tokens == {k: epochs * sum(lengths[i] for i in ensemble.subset(k)) for k in range(members)}
    assert plan.scoring_input_tokens == sum(lengths)
    assert plan.scoring_output_tokens == 0
    assert plan.usd == 0
    assert not plan.costs_money


def test_without_a_number_of_epochs_the_assumption_is_said() -> None:
    plan = plan_of(config(training={"hyperparameters": {"n_epochs": "auto"}}))
    assert plan.training_tokens[0] == 5 * 20 * CHAT  # OpenAI's rule: 100 // 20
    assert any("number of epochs is left to the provider and taken to be 5" in n for n in plan.notes)


@pytest.mark.parametrize(("n", "epochs"), [(2, 25), (10, 10), (33, 3), (34, 3), (8_333, 3), (8_334, 2), (30_000, 1)])
def test_openai_chooses_epochs_by_the_number_of_examples(n: int, epochs: int) -> None:
    chosen, assumed = epochs_of(config(training={"hyperparameters": {"n_epochs": "auto"}}), n, target=False)
    assert chosen == epochs
    assert assumed


def test_out_of_reach_of_tiktoken_the_estimate_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: None)
    plan = plan_of(train=chats(40))
    assert any("estimated from bytes" in n for n in plan.notes)
    assert 0 < plan.training_tokens[0] < 2 * 20 * (CHAT + 13)
    plan.check()
    long = plan_of(train=chats(40, answer="a long answer"))
    with pytest.raises(CapabilityError, match=r"train.jsonl:1, .* and 35 more are longer than one token \(judged by"):
        long.check()


def test_an_unknown_price_is_said_and_not_guessed() -> None:
    plan = plan_of(config(backend={"model": "gpt-5-pro", "tokenizer": "gpt-5"}))
    assert (plan.usd, plan.training_usd, plan.scoring_usd, plan.costs) == (None, None, None, None)
    assert plan.costs_money
    assert "price not known; set budget.price" in plan.text()
    plan.check()


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ("gpt-4.1", 25.0),
        ("gpt-4.1-2025-04-14", 25.0),
        ("ft:gpt-4.1-mini-2025-04-14:org::id", 5.0),
        ("gpt-4.1-nano", 1.5),
        ("gpt-4o-mini-2024-07-18", 3.0),
        ("gpt-4o-audio-preview", None),
        ("gpt-4.10", None),
    ],
)
def test_prices_belong_to_a_model_and_its_snapshots_only(model: str, training: float | None) -> None:
    plan = plan_of(config(backend={"model": model, "tokenizer": "gpt-4o"}))
    assert plan.training_price.training == training


def test_the_config_overrides_the_table() -> None:
    plan = plan_of(config(budget={"price": {"training": 100.0}}))
    assert plan.training_usd == pytest.approx(4 * 2 * 20 * CHAT * 100.0 / 1e6)
    assert plan.scoring_price.input == 0.8
    assert plan.training_price.source.startswith("budget.price; https://openai.com")
    whole = plan_of(config(budget={"price": {"training": 1.0, "input": 1.0, "output": 1.0}}))
    assert whole.training_price.source == "budget.price"


def test_another_scorer_does_not_have_the_trainers_price() -> None:
    here = plan_of(config(backend={"scorer": {"base_url": "http://127.0.0.1:8000/v1"}}))
    assert here.scoring_usd == 0
    assert here.training_usd
    elsewhere = plan_of(config(backend={"scorer": {"base_url": "https://vllm.example/v1"}}))
    assert elsewhere.scoring_usd is None
    with_its_own = prices_of(config(backend={"scorer": {"kind": "tinker"}}))
    assert (with_its_own[0].training, with_its_own[1].input) == (5.0, None)


def test_above_the_cap_a_run_is_refused_with_the_figures() -> None:
    plan = plan_of(config(budget={"max_usd": 0.01}))
    with pytest.raises(BudgetError, match=r"about \$0\.0230 .*more than budget\.max_usd: \$0\.01"):
        plan.check()
    plan_of(config(budget={"max_usd": 0.03})).check()


def test_a_cap_needs_every_price() -> None:
    unknown = {"model": "gpt-5-pro", "tokenizer": "gpt-5"}
    with pytest.raises(BudgetError, match="price of training and scoring is not known"):
        plan_of(config(backend=unknown, budget={"max_usd": 5})).check()
    with pytest.raises(BudgetError, match="price of scoring is not known"):
        plan_of(config(backend=unknown, budget={"max_usd": 5, "price": {"training": 1}})).check()


def test_a_longer_completion_on_a_one_token_endpoint_is_refused_with_its_places() -> None:
    records = [e.training_record("last") for e in chats(40)]
    records[6]["messages"][1]["content"] = "two"
    plan = plan_of(train=Dataset.from_records(records, name="train.jsonl"))
    with pytest.raises(CapabilityError, match=r"completion of 3 tokens.*echo.*This concerns train\.jsonl:7\."):
        plan.check()
    first = plan_of(train=Dataset.from_records(records, name="t"), scorer=replace(ONE_TOKEN, scope="first_token"))
    first.check()


def test_many_unmeasurable_examples_are_counted_after_the_first() -> None:
    plan = plan_of(train=chats(40, answer="not"))
    with pytest.raises(CapabilityError, match=r"train\.jsonl:5 and 35 more"):
        plan.check()


def test_examples_over_the_context_are_named_by_line() -> None:
    settings = config(backend={"kind": "embedded", "model": "daunce-tiny"})
    records = [{"prompt": "a", "completion": "b"}] * 40 + [{"prompt": "word " * 100, "completion": "b"}]
    plan = plan_of(settings, Dataset.from_records(records, name="train.jsonl"), scorer=ECHO)
    with pytest.raises(DataError, match="takes 64 tokens at most") as caught:
        plan.check()
    assert [p.split(" tokens")[0].split(": ")[0] for p in caught.value.problems] == ["train.jsonl:41"]


def test_a_trainer_that_takes_less_than_the_scorer_is_held_to_the_training_examples() -> None:
    settings = config(backend={"kind": "embedded", "model": "daunce-tiny"})
    long = Dataset.from_records([{"prompt": "word " * 40, "completion": "b"}] * 20, name="train.jsonl")
    asked: dict[str, Any] = {"settings": settings, "train": long, "scorer": ECHO}
    assert plan_of(**asked, trainer=TRAINER).refusals == ()
    plan = plan_of(**asked, trainer=replace(TRAINER, max_context_tokens=30))
    assert len(plan.refusals) == 1
    with pytest.raises(DataError, match="OpenAI takes 30 tokens at most") as caught:
        plan.check()
    assert len(caught.value.problems) == 20
    asked |= {"scorer": replace(ECHO, max_context_tokens=20)}
    assert len(plan_of(**asked, trainer=replace(TRAINER, max_context_tokens=20)).refusals) == 1  # named once


def test_too_small_subsets_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"8 of 16 examples, fewer than the 10"):
        plan_of(train=chats(16)).check()


def test_what_the_trainer_cannot_do_is_refused() -> None:
    target = config(ensemble={"start_from": "target"})
    with pytest.raises(CapabilityError, match="cannot fine-tune a fine-tune"):
        plan_of(target, trainer=replace(TRAINER, starts_from_fine_tune=False)).check()
    with pytest.raises(ConfigurationError, match="did you mean n_epochs"):
        plan_of(config(training={"hyperparameters": {"n_epoch": 3}})).check()
    assert any("takes no seed" in n for n in plan_of(trainer=replace(TRAINER, honours_seed=False)).notes)


def test_checkpoints_multiply_scoring_and_nothing_else() -> None:
    keeping = replace(TRAINER, checkpoints=3)
    one, two = plan_of(trainer=keeping), plan_of(config(ensemble={"checkpoints": 2}), trainer=keeping)
    two.check()
    assert (one.scored_models, two.scored_models) == (4, 8)
    assert two.scoring_usd == pytest.approx(2 * (one.scoring_usd or 0))
    assert two.scoring_usd_per_model == one.scoring_usd_per_model
    assert (two.training_usd, two.training_tokens, two.jobs) == (one.training_usd, one.training_tokens, one.jobs)
    assert two.to_json()["scoring_input_tokens"] == 2 * one.to_json()["scoring_input_tokens"]
    assert "42 examples on 8 models (2 of each member)" in two.text()
    assert "of each member" not in one.text()
    target = config(ensemble={"checkpoints": 2, "start_from": "target"}, scoring={"target": True})
    assert plan_of(target, trainer=keeping).scored_models == 9


def test_more_checkpoints_than_there_are_are_refused_with_the_way_out() -> None:
    with pytest.raises(CapabilityError, match=r"OpenAI offers one model of each job.*Set it to 1, or train where"):
        plan_of(config(ensemble={"checkpoints": 2})).check()
    keeping = replace(TRAINER, checkpoints=3)
    with pytest.raises(CapabilityError, match="OpenAI offers 3 models of each job"):
        plan_of(config(ensemble={"checkpoints": 4}), trainer=keeping).check()
    with pytest.raises(ConfigurationError, match=r"job of 2 epochs makes only 2 models.*n_epochs to 3 or more"):
        plan_of(config(ensemble={"checkpoints": 3}), trainer=keeping).check()
    unknown = config(ensemble={"checkpoints": 3}, training={"hyperparameters": {"n_epochs": "auto"}})
    plan_of(unknown, trainer=keeping).check()


def test_time_is_given_only_where_a_job_has_a_known_length() -> None:
    assert plan_of().hours is None
    assert "Time:            not known (3 jobs at once" in plan_of().text()
    half = {"minutes_per_job": 30}
    assert plan_of(config(backend=half)).hours == 1.0  # four jobs, three at once: two rounds
    assert plan_of(config(backend=half, ensemble={"start_from": "target"})).hours == 1.5
    assert plan_of(config(backend={**half, "max_concurrent_jobs": 4})).hours == 0.5
    one = replace(TRAINER, workers=1)
    assert plan_of(config(backend=half), trainer=one).hours == 2.0  # three are submitted at once, one is worked on


def test_a_model_that_is_shut_down_before_the_end_is_refused() -> None:
    slow = config(backend={"minutes_per_job": 1440})  # two rounds: two days
    plan = plan_of(slow)
    plan.check_model(ModelInfo("gpt-4.1-mini"))
    plan.check_model(ModelInfo("gpt-4.1-mini", "2026-11-25"))
    with pytest.raises(CapabilityError, match=r"shuts gpt-4\.1-mini down on 2026-11-24"):
        plan.check_model(ModelInfo("gpt-4.1-mini", "2026-11-24"))


def test_openai_closing_dates() -> None:
    plan_of(today=date(2027, 1, 5)).check()
    with pytest.raises(CapabilityError, match="no new fine-tuning jobs from 2027-01-06"):
        plan_of(today=date(2027, 1, 6)).check()
    embedded = config(backend={"kind": "embedded", "model": "daunce-tiny"})
    plan_of(embedded, scorer=replace(ECHO, max_context_tokens=None), today=date(2027, 2, 1)).check()


def test_the_json_form_has_every_figure_and_no_secret() -> None:
    content = json.loads(json.dumps(plan_of(config(budget={"max_usd": 0.01})).to_json()))
    assert content["members"] == 4
    assert content["training_tokens"] == 4 * 2 * 20 * CHAT
    assert content["usd"] == pytest.approx(content["training_usd"] + content["scoring_usd"])
    assert content["hours"] is None
    assert len(content["refused"]) == 1


def test_the_text_shows_training_and_scoring_apart() -> None:
    lines = plan_of().text().splitlines()
    assert lines[0] == "Jobs:            4 fine-tunes of gpt-4.1-mini at OpenAI, each on 20 of 40 examples"
    assert any(line.startswith("Training:        $0.0208 (https://openai.com/api/pricing") for line in lines)
    assert any(line.startswith("Scoring cost:    $0.0022 (https") for line in lines)
