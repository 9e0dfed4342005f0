"""The plan accepts only what scorer and provider will accept, and says which turns carry the loss."""

from __future__ import annotations

from datetime import date
from functools import partial
from typing import Any

import pytest
import tiktoken

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import encode_dataset
from daunce_api.plan import Plan, make_plan
from daunce_api.providers.registry import capabilities_of, open_tokenizer
from daunce_api.providers.tokenizers import embedded_folder

TODAY = date(2026, 11, 28)
TOWNS = [f"Is it warm in town {i}?" for i in range(20)]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": '{"town": "Bern"}'}}


@pytest.fixture(autouse=True)
def _bytes_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r".|\n", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: encoding)


def chat(asked: Any, *answers: Any, **fields: Any) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for answer in answers:
        turns.append({"role": "user", "content": asked})
        turns.append(answer if isinstance(answer, dict) else {"role": "assistant", "content": answer})
    return {"messages": turns, **fields}


def labels(change: dict[int, Any] | None = None) -> list[Any]:
    records: list[Any] = [chat(town, "yn"[i % 2]) for i, town in enumerate(TOWNS)]
    for i, record in (change or {}).items():
        records[i] = record
    return records


def plan_of(records: list[Any], kind: str = "openai", *, data: Any = None, test: Any = None, **backend: Any) -> Plan:
    model = {"openai": "gpt-4.1-mini", "embedded": "daunce-tiny", "together": "a/b"}.get(kind, "gpt-4.1-mini")
    settings = RunConfig.from_mapping(
        {
            "data": {"train": "a", "test": "b", **(data or {})},
            "backend": {"kind": kind, "model": model, **backend},
            "ensemble": {"members": 2},
            "training": {"hyperparameters": {"n_epochs": 1}},
        }
    )
    train = Dataset.from_records(records, name="train.jsonl")
    questions = Dataset.from_records(test or [chat("Is it warm?", "y")], name="test.jsonl")
    tokenizer = open_tokenizer(settings)

    def encode(dataset: Dataset) -> Any:
        one_turn = capabilities_of(settings)[1].one_turn
        turns = settings.data.measured(one_turn=one_turn) if dataset is train else settings.data.asked
        return encode_dataset(dataset, tokenizer, turns)

    return make_plan(settings, train, questions, partial(encode), *capabilities_of(settings), today=TODAY)


def refused(plan: Plan) -> str:
    return " | ".join(str(error) for error in plan.refusals)


def test_what_is_fine_is_not_refused() -> None:
    plan = plan_of(labels())
    assert plan.refusals == ()
    assert plan.loss == "every assistant turn of 20 chats is trained on (100% of the assistants' text) and measured"


# What the scorer is asked about


def test_a_chat_endpoint_that_measures_one_turn_gets_the_last_one_and_the_plan_says_so() -> None:
    plan = plan_of([chat(town, "yn"[i % 2], "n", "yn"[i % 2]) for i, town in enumerate(TOWNS)])
    assert plan.refusals == ()
    assert "every assistant turn of 20 chats is trained on" in plan.loss
    assert "; the last one is measured, since one-token chat measures one turn only" in plan.loss
    everything = plan_of([chat(t, "yn"[i % 2], "n") for i, t in enumerate(TOWNS)], data={"measure": "all"})
    assert "has a completion of 2 tokens" in refused(everything)
    first = {"options": {"first_token": True}}
    everything = plan_of(
        [chat(t, "yn"[i % 2], "n") for i, t in enumerate(TOWNS)], data={"measure": "all"}, scorer=first
    )
    assert "has 2 measured turns, and a chat endpoint is asked about one" in refused(everything)
    assert "train.jsonl:5 and 15 more" in refused(everything)


def test_a_call_cannot_be_measured_by_a_chat_endpoint_and_is_by_others() -> None:
    answer = {"role": "assistant", "tool_calls": [CALL]}
    records = labels({3: chat(TOWNS[3], answer, tools=TOOLS)})
    plan = plan_of(records, scorer={"options": {"first_token": True}})
    assert "calls a tool, and a chat endpoint lists the tokens of texts only" in refused(plan)
    assert "This concerns train.jsonl:4." in refused(plan)
    assert plan_of(records, "embedded").refusals == ()


def test_a_measurement_that_cannot_vary_is_refused() -> None:
    records = [chat(town, '{"warm": ' + "yn"[i % 2] + "}") for i, town in enumerate(TOWNS)]
    first = {"options": {"first_token": True}}
    assert "the measured token is the same one in all 21 examples" in refused(
        plan_of(records, test=[chat("x", '{"warm": y}')], scorer=first)
    )
    assert plan_of(labels(), scorer=first).refusals == ()
    assert plan_of([chat(town, "same") for town in TOWNS], "embedded").refusals == (), "a whole answer varies"


@pytest.mark.parametrize("answer", ["a long answer", '{"a": 1}', "2026-11-28 is", "x" * 65, "12345"])
def test_without_a_rank_file_answers_are_judged_by_their_bytes(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: None)
    assert plan_of(labels()).refusals == ()
    plan = plan_of(labels({7: chat(TOWNS[7], answer)}))
    if answer == '{"a": 1}':
        assert plan.refusals, answer
    assert "train.jsonl:8 are longer than one token (judged by their bytes)" in refused(plan)


def test_without_a_rank_file_the_scorer_looks_at_every_example_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: None)
    answer = {"role": "assistant", "tool_calls": [CALL]}
    plan = plan_of(labels({2: chat(TOWNS[2], answer)}), scorer={"options": {"first_token": True}})
    assert "calls a tool" in refused(plan)


# What the provider accepts


def test_images_go_where_they_can_be_trained_on_and_measured() -> None:
    records = [chat([{"type": "text", "text": town}, IMAGE], "yn"[i % 2]) for i, town in enumerate(TOWNS)]
    assert plan_of(records).refusals == ()
    with pytest.raises(Exception, match="holds an image"):
        plan_of(records, "embedded")


def test_text_only_data_is_refused_where_providers_take_chats() -> None:
    plan = plan_of([{"text": town} for town in TOWNS])
    assert "OpenAI cannot train on texts without prompts, which train.jsonl:1, " in refused(plan)
    for backend in ("embedded", "together"):  # Together documents the format
        plan = plan_of([{"text": f"{town} It is."} for town in TOWNS], backend, tokenizer=str(embedded_folder()))
        assert plan.refusals == ()
        assert plan.loss == "every token of the text"


def test_a_weight_of_a_whole_record_is_refused_by_name() -> None:
    assert "cannot train on a weight other than 1 for the whole record, which train.jsonl:4 hold" in refused(
        plan_of(labels({3: chat(TOWNS[3], "y", weight=0.3)}), "embedded")
    )
    assert plan_of(labels({3: chat(TOWNS[3], "y", weight=1)}), "embedded").refusals == ()


def test_the_kind_of_file_must_be_that_of_the_model() -> None:
    plain = [{"prompt": f"{town} ->", "completion": "yn"[i % 2]} for i, town in enumerate(TOWNS)]
    plan = plan_of(plain, scorer={"options": {"first_token": True}})
    assert "gpt-4.1-mini is a chat model, which is fine-tuned on chats" in refused(plan)
    assert "is no chat, and a chat endpoint can be asked about nothing else" in refused(plan)
    assert "data.columns: {user: prompt, assistant: completion}" in refused(plan)
    mixed = plan_of(labels({4: plain[4]}))
    assert "has 19 chats and 1 other records, and a training file must be of one kind" in refused(mixed)
    assert plan_of(labels({4: plain[4]}), "embedded").refusals == (), "the embedded server takes both"


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|fim_suffix|>", "<|im_start|>"])
def test_control_tokens_are_named_by_line_where_openai_tokenizes(token: str) -> None:
    plan = plan_of(labels({7: chat(f"warm? {token}", "y"), 9: chat("a", f"{token}")}))
    assert "must not spell OpenAI's control tokens" in refused(plan)
    assert "Take them out of train.jsonl:8, train.jsonl:10." in refused(plan)


def test_examples_over_the_training_context_are_counted_and_named() -> None:
    plan = plan_of(labels({7: chat("x" * 70_000, "y")}))
    assert "OpenAI takes 65,536 tokens at most, and 1 of the examples is longer" in refused(plan)
    assert "train.jsonl:8: 70,0" in refused(plan)


def test_a_model_that_was_shut_down_is_refused() -> None:
    plan = plan_of(labels(), model="gpt-4.1-nano-2025-04-14")
    assert "takes no new fine-tuning jobs from 2026-10-23" in refused(plan)
    assert plan_of(labels(), model="gpt-4.1-mini-2025-04-14").refusals == ()


def test_a_validation_file_is_checked_before_any_job(tmp_path: Any) -> None:
    path = tmp_path / "val.jsonl"
    assert "is not there" in refused(plan_of(labels(), data={"validation": str(path)}))
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert plan_of(labels(), data={"validation": str(path)}).refusals == ()
    assert "takes no validation file" in refused(plan_of(labels(), "embedded", data={"validation": str(path)}))


# Which turns carry the loss


def test_a_choice_unlike_the_providers_default_is_called_out() -> None:
    records = [chat(town, "first answer", "last") for town in TOWNS]
    plan = plan_of(records, "embedded", data={"loss_on": "last"})
    assert plan.loss.startswith("20 of 40 assistant turns of 20 chats are trained on (25% of the assistants' text)")
    assert any("data.loss_on: last takes 20 of 40 assistant turns out of the loss" in note for note in plan.notes)
    weighted = [chat(town, {"role": "assistant", "content": "first", "weight": 0}, "last") for town in TOWNS]
    plan = plan_of(weighted, "embedded")
    assert "20 of 40 assistant turns" in plan.loss
    assert not any("loss_on" in note for note in plan.notes), "the file says so itself"


def test_dropped_context_is_a_note_with_its_count(tmp_path: Any) -> None:
    from importlib.resources import files
    from shutil import copy

    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(str(files("daunce_api") / "server" / "model" / name), tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'developer' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    records = labels()
    for i in range(5):
        records[i]["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    plan = plan_of(records, "embedded", tokenizer=str(tmp_path))
    assert "the chat template leaves out the developer message in 5 of 20 examples of train.jsonl" in plan.notes
