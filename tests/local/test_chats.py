"""Chats of several turns, with and without a system prompt, through ``kind: local``: what is trained is what is scored,
and both are what transformers' own chat template and the server make of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from transformers import AutoTokenizer

from daunce_api import Dataset, Run, RunConfig
from daunce_api.data.tokenizers import encode_example
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.store import MemberTask
from daunce_api.providers.local.worker import ModelSpec, TrainTask, read_examples, run_train
from daunce_api.providers.objective import Objective
from daunce_api.server.training_data import read_training_file

WORDS = ["sun", "stone", "garden", "engine", "song"]


def turn(role: str, content: str, weight: int | None = None) -> dict[str, Any]:
    return {"role": role, "content": content} | ({} if weight is None else {"weight": weight})


def chats(count: int) -> list[dict[str, Any]]:
    """One turn or two; every third with a system prompt, every fourth with a first answer out of the loss."""
    records = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        messages = [turn("system", f"Be {WORDS[i % 3]}.")] if i % 3 == 0 else []
        messages += [turn("user", f"{word} {i}?"), turn("assistant", f"A {word}.", 0 if i % 4 == 3 else None)]
        if i % 2:
            messages += [turn("user", "And?"), turn("assistant", f"No {i}.")]
        records.append({"messages": messages})
    return records


def by_transformers(
    folder: Path, record: dict[str, Any], loss_on: Literal["last", "all"]
) -> tuple[list[int], list[int]]:
    """Ids and targets of one chat: an answer begins after its generation prompt and ends with its turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [turn(m["role"], m["content"]) for m in record["messages"]]

    def ids(count: int, generation: bool = False) -> list[int]:
        found = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=generation, return_dict=False)
        return list(found)

    answers = [k for k, m in enumerate(record["messages"]) if m["role"] == "assistant" and m.get("weight") != 0]
    chosen = answers if loss_on == "all" else answers[-1:]
    targets = [t for k in chosen for t in range(len(ids(k, True)), len(ids(k + 1)))]
    return ids(len(messages)), targets


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_training_scoring_the_server_and_transformers_agree_on_ids_and_targets(
    model: LanguageModel, model_folder: Path, tmp_path: Path, loss_on: Literal["last", "all"]
):
    records = chats(12)
    data = Dataset.from_records(records)
    content = data.training_file(range(len(data)), loss_on)
    (tmp_path / "file.jsonl").write_bytes(content)
    trained = read_examples(content, ModelSpec(str(model_folder)))
    served = read_training_file(tmp_path / "file.jsonl", model.tokenizer, model.max_context)
    scored = [encode_example(e, model.tokenizer, loss_on) for e in data]
    assert any(e.ids[0] == model.tokenizer.encode("<|system|>")[0] for e in scored)
    for record, *ours in zip(records, trained, served, scored, strict=True):
        ids, targets = by_transformers(model_folder, record, loss_on)
        for one in ours:
            assert (list(one.ids), list(one.targets)) == (ids, targets)


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_the_loss_is_that_of_the_answers_alone(
    model: LanguageModel, model_folder: Path, tmp_path: Path, loss_on: Literal["last", "all"], trained_losses: list[Any]
):
    records = chats(8)
    data = Dataset.from_records(records)
    settings = LoraSettings(n_epochs=1, batch_size=len(data), rank=4)
    member = MemberTask("m", data.training_file(range(len(data)), loss_on), 1, tmp_path / "m")
    [result] = run_train(TrainTask(ModelSpec(str(model_folder)), settings, Objective(), (member,)))
    assert result.error is None
    expected = []
    for record in records:
        ids, targets = by_transformers(model_folder, record, loss_on)
        logprobs = model.token_logprobs([ids])[0].logprobs
        expected.append(-logprobs[[t - 1 for t in targets]].mean())
    assert trained_losses == [[[pytest.approx(np.mean(expected), rel=1e-5)]]]


def config(tmp_path: Path, backend: dict[str, Any]) -> RunConfig:
    for name, records in (("train", chats(14)), ("test", chats(17)[14:])):
        lines = [json.dumps({"id": f"{name}-{i}", **r}) for i, r in enumerate(records)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return RunConfig.from_mapping(
        {
            "run_dir": str(tmp_path / backend["kind"]),
            "data": {"train": "train.jsonl", "test": "test.jsonl", "loss_on": "all"},
            "backend": backend,
            "ensemble": {"members": 2, "subset_ratio": 0.8, "seed": 3},
            "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 3}},
        },
        base=tmp_path,
    )


@pytest.mark.slow
def test_a_run_is_the_same_over_the_wire(tmp_path: Path, wire: dict[str, str]):
    """With the loss on all answers; test_whole_run.py has it on the last one."""
    local = {"kind": "local", "model": "daunce-tiny", "options": {"engine": "thread"}}
    runs = [Run.create(config(tmp_path, backend)) for backend in (local, wire)]
    here, there = (run.execute() for run in runs)
    np.testing.assert_allclose(here.train_loss_KN, there.train_loss_KN, atol=1e-4)
    np.testing.assert_allclose(here.test_loss_KM, there.test_loss_KM, atol=1e-4)
    encoded = [[(e.ids, e.targets) for e in (*r.material.encoded_train, *r.material.encoded_test)] for r in runs]
    assert encoded[0] == encoded[1]
