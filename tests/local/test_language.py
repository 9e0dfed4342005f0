"""Training and scoring of one LoRA adapter, against transformers and PEFT themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from plain_training import train_one, train_plainly
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import ConfigurationError, DataError, RejectedError
from daunce_api.providers.local.adapters import save_adapter
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.train import batches_of, fresh_weights

SHORT = LoraSettings(rank=4, alpha=8.0, n_epochs=2, batch_size=5, learning_rate=5e-3)


def reference_logprobs(model: torch.nn.Module, ids: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_scores_equal_a_plain_forward_pass(model: LanguageModel, model_folder: Path, examples: list[EncodedExample]):
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    answers = model.token_logprobs([e.ids for e in examples])
    for example, answer in zip(examples, answers, strict=True):
        assert answer.logprobs.dtype == np.float64
        np.testing.assert_allclose(answer.logprobs, reference_logprobs(plain, example.ids), atol=1e-5)


def test_top_lists_the_most_likely_tokens_in_order(model: LanguageModel, examples: list[EncodedExample]):
    ids = examples[0].ids
    answer = model.token_logprobs([ids], top=model.vocabulary)[0]
    assert answer.top_ids.shape == (len(ids) - 1, model.vocabulary)
    assert (np.diff(answer.top_logprobs, axis=1) <= 0).all()
    np.testing.assert_allclose(np.exp(answer.top_logprobs).sum(axis=1), 1, atol=1e-12)
    own = np.take_along_axis(answer.top_logprobs, np.argsort(answer.top_ids, axis=1), axis=1)
    np.testing.assert_array_equal(own[np.arange(len(ids) - 1), ids[1:]], answer.logprobs)


def test_an_answer_does_not_depend_on_the_batch(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    train_one(model, examples, settings=SHORT, seed=3, out=tmp_path / "a")
    ids = [e.ids for e in examples]
    together = model.token_logprobs(ids, adapter=tmp_path / "a")
    backwards = model.token_logprobs(ids[::-1], adapter=tmp_path / "a", top=3)[::-1]
    for sequence, one, other in zip(ids, together, backwards, strict=True):
        alone = model.token_logprobs([sequence], adapter=tmp_path / "a")[0]
        assert one.logprobs.tobytes() == other.logprobs.tobytes() == alone.logprobs.tobytes()


def peft_training(
    folder: Path, start: Path, examples: list[EncodedExample], chosen: LoraSettings, seed: int
) -> tuple[PeftModel, list[float]]:
    """The same fine-tune with PEFT's own layers, one example at a time, and a plain AdamW."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), start, is_trainable=True)
    return model, train_plainly(model, examples, chosen, seed)


@pytest.mark.parametrize("targets", [None, ("gate_proj", "down_proj")])
def test_training_equals_peft(
    model: LanguageModel,
    model_folder: Path,
    examples: list[EncodedExample],
    tmp_path: Path,
    targets: tuple[str, ...] | None,
):
    chosen = LoraSettings(rank=4, alpha=8.0, n_epochs=2, batch_size=5, learning_rate=5e-3, targets=targets)
    start = tmp_path / "start"
    save_adapter(start, fresh_weights(model.adapter_shapes(targets), 4, 7), chosen, "random-llama")
    reference, losses = peft_training(model_folder, start, examples, chosen, 7)
    outcome = train_one(model, examples, settings=chosen, seed=7, out=tmp_path / "out")
    np.testing.assert_allclose(outcome.losses, losses, rtol=2e-5)
    assert outcome.losses[-1] < outcome.losses[0] - 0.05
    reference.eval()
    answers = model.token_logprobs([e.ids for e in examples], adapter=tmp_path / "out")
    for example, answer in zip(examples, answers, strict=True):
        np.testing.assert_allclose(answer.logprobs, reference_logprobs(reference, example.ids), atol=1e-4)


def test_the_folder_is_a_peft_adapter(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample], tmp_path: Path
):
    train_one(model, examples, settings=SHORT, seed=1, out=tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "a").eval()
    answer = model.token_logprobs([examples[3].ids], adapter=tmp_path / "a")[0]
    np.testing.assert_allclose(answer.logprobs, reference_logprobs(peft, examples[3].ids), atol=1e-5)
    base = model.token_logprobs([examples[3].ids])[0]
    assert abs(answer.logprobs - base.logprobs).max() > 0.01
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == model.name


def test_training_is_deterministic(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_one(model, examples, settings=SHORT, seed=seed, out=tmp_path / name)
    content = {n: [p.read_bytes() for p in sorted((tmp_path / n).iterdir())] for n in "abc"}
    assert content["a"] == content["b"]
    assert content["a"][1] != content["c"][1]


def test_outcome_counts_steps_epochs_and_tokens(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    seen: list[Any] = []
    outcome = train_one(
        model, examples, settings=SHORT, seed=3, out=tmp_path / "a", on_step=lambda *step: seen.append(step)
    )
    assert seen == [(i + 1, 10, [loss]) for i, loss in enumerate(outcome.losses)]
    assert outcome.trained_tokens == 2 * sum(len(e.ids) for e in examples)
    assert outcome.adapter == tmp_path / "a"


def test_checkpoints_are_handed_over_after_each_epoch(
    model: LanguageModel, examples: list[EncodedExample], tmp_path: Path
):
    seen: list[tuple[int, Path]] = []
    train_one(model, examples, settings=SHORT, seed=3, out=tmp_path / "a", checkpoint=lambda *event: seen.append(event))
    assert [epoch for epoch, _ in seen] == [1, 2]
    weights = [(path / "adapter_model.safetensors").read_bytes() for _, path in seen]
    assert weights[1] == (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != weights[0]


def test_start_from_continues_the_weights(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    train_one(model, examples, settings=SHORT, seed=3, out=tmp_path / "a")
    whole = LoraSettings(rank=4, alpha=8.0, n_epochs=1, batch_size=len(examples), learning_rate=5e-3)
    second = train_one(model, examples, settings=whole, seed=3, out=tmp_path / "b", start_from=tmp_path / "a")
    answers = model.token_logprobs([e.ids for e in examples], adapter=tmp_path / "a")
    own = [-r.logprobs[[t - 1 for t in e.targets]].mean() for e, r in zip(examples, answers, strict=True)]
    np.testing.assert_allclose(second.losses[0], np.mean(own), rtol=1e-5)


def test_start_from_another_rank_is_refused(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    train_one(model, examples[:5], settings=SHORT, seed=3, out=tmp_path / "a")
    with pytest.raises(ConfigurationError, match="rank 4"):
        train_one(model, examples, settings=LoraSettings(rank=8), seed=3, out=tmp_path / "b", start_from=tmp_path / "a")


def test_a_replaced_adapter_is_read_again(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    ids = [examples[0].ids]
    train_one(model, examples, settings=SHORT, seed=3, out=tmp_path / "a")
    before = model.token_logprobs(ids, adapter=tmp_path / "a")[0].logprobs
    train_one(model, examples, settings=SHORT, seed=4, out=tmp_path / "a")
    after = model.token_logprobs(ids, adapter=tmp_path / "a")[0].logprobs
    assert not np.array_equal(before, after)


def test_greedy_generation_equals_transformers(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample]
):
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    prompt = examples[2].ids[:9]
    expected = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    made = model.generate(prompt, max_tokens=12, top=2)
    assert list(made.ids) == expected
    assert not made.finished
    np.testing.assert_array_equal(made.read.top_ids[:, 0], expected)
    scored = model.token_logprobs([[*prompt, *made.ids]])[0].logprobs[8:]
    np.testing.assert_allclose(made.read.logprobs, scored, atol=1e-5)
    cut = model.generate(prompt, max_tokens=12, stop_ids=[expected[3]])
    assert list(cut.ids) == expected[: expected.index(expected[3]) + 1]
    assert cut.finished
    [read] = model.token_logprobs([[*prompt, 0]], top=2)
    top_ids, top_logprobs = read.top_ids[-1], read.top_logprobs[-1]
    assert top_ids[0] == expected[0]
    np.testing.assert_allclose(top_logprobs[0], made.read.logprobs[0], atol=1e-5)


def test_what_a_checkpoint_says_of_generation_changes_nothing(
    model: LanguageModel, examples: list[EncodedExample], monkeypatch: pytest.MonkeyPatch
):
    prompt = examples[2].ids[:9]
    plain = [model.generate(prompt, max_tokens=12, temperature=t, seed=1).ids for t in (0.0, 1.0)]
    own = model.adapted.model.generation_config
    for name, value in {"repetition_penalty": 9.0, "top_k": 1, "do_sample": True, "min_new_tokens": 3}.items():
        monkeypatch.setattr(own, name, value)
    assert [model.generate(prompt, max_tokens=12, temperature=t, seed=1).ids for t in (0.0, 1.0)] == plain
    assert model.adapted.model.generation_config is own  # which a full fine-tune saves


def test_sampling_follows_the_seed_and_top_p(model: LanguageModel, examples: list[EncodedExample]):
    prompt = examples[2].ids[:9]
    draws = [model.generate(prompt, max_tokens=10, temperature=1.0, seed=s).ids for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    greedy = model.generate(prompt, max_tokens=10).ids
    assert model.generate(prompt, max_tokens=10, temperature=1.0, top_p=1e-9, seed=5).ids == greedy


def test_generation_stops_where_the_context_ends(model: LanguageModel):
    assert len(model.generate([7] * 126, max_tokens=10).ids) == 2


@pytest.mark.parametrize(
    ("ids", "problem"), [([], "no tokens"), ([1] * 129, "at most 128"), ([1, 10_000], "outside"), ([-1], "outside")]
)
def test_impossible_sequences_are_refused(model: LanguageModel, ids: list[int], problem: str):
    with pytest.raises(DataError, match=problem):
        model.token_logprobs([ids])


def test_diverging_training_is_said(model: LanguageModel, examples: list[EncodedExample], tmp_path: Path):
    wild = LoraSettings(rank=4, alpha=1e30, n_epochs=4, batch_size=5, learning_rate=1e30)
    with pytest.raises(RejectedError, match="smaller learning rate"):
        train_one(model, examples, settings=wild, seed=3, out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_unknown_models_dtypes_and_targets_are_refused(model: LanguageModel, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        LanguageModel.load(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="dtype"):
        LanguageModel.load("daunce-tiny", dtype="int3")
    with pytest.raises(ConfigurationError, match="q_proj"):
        model.adapter_shapes(("wrong",))
    with pytest.raises(ValidationError, match="dropout"):
        LoraSettings(dropout=1.0)


def test_learning_rate_warms_up_and_ends_near_zero():
    chosen = LoraSettings(learning_rate=1.0, warmup_ratio=0.1)
    rates = [chosen.rate(s, 100) for s in range(100)]
    np.testing.assert_allclose(rates[:11], [(i + 1) / 11 for i in range(10)] + [1.0])
    np.testing.assert_allclose(rates[55], 0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


@given(n=st.integers(1, 40), batch=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 2**31 - 1))
def test_every_epoch_sees_every_example_once(n: int, batch: int, epochs: int, seed: int):
    steps = batches_of(n, LoraSettings(n_epochs=epochs, batch_size=batch), seed)
    for epoch in range(1, epochs + 1):
        own = [b for e, b in steps if e == epoch]
        assert sorted(i for b in own for i in b) == list(range(n))
        assert len(own) == math.ceil(n / batch)
