"""What needs a GPU: skipped where there is none. Tolerances are those of float32 on other hardware, not of bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_training import train_members

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.local.adapters import save_adapter
from daunce_api.providers.local.classifier import Classifier, ClassifierSettings
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.memory import limits_of
from daunce_api.providers.local.train import Member
from daunce_api.providers.objective import Objective

SETTINGS = LoraSettings(n_epochs=1, batch_size=8, rank=4, learning_rate=1e-3)
OBJECTIVES = [Objective(), Objective("influence", rho=2.0), Objective("fisher")]

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs are here")


def trained(model: LanguageModel, examples: list[EncodedExample], objective: Objective = OBJECTIVES[0]) -> np.ndarray:
    """(2, steps) losses of two members."""
    shapes = model.adapter_shapes(None)
    members = [Member(examples, 1), Member(examples, 2)]
    _, losses = train_members(model.adapted, members, shapes, SETTINGS, objective=objective, max_tokens=2048)
    return np.array(losses)


@gpu
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_training_is_that_of_the_cpu(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample], objective: Objective
):
    on_gpu = LanguageModel.load(model_folder, device="cuda")
    np.testing.assert_allclose(
        trained(on_gpu, examples, objective), trained(model, examples, objective), rtol=1e-3, atol=1e-3
    )


@gpu
@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}, {"quantisation": "4bit"}], ids=str
)
def test_every_way_to_hold_the_model_trains_about_the_same(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample], options: dict[str, str | bool]
):
    if "quantisation" in options:
        pytest.importorskip("bitsandbytes")
    held = LanguageModel.load(model_folder, device="cuda", **options)
    exact = "gradient_checkpointing" in options
    assert abs(trained(held, examples) - trained(model, examples)).max() < (1e-3 if exact else 0.3)


@gpu
def test_scoring_is_that_of_the_cpu(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample], tmp_path: Path
):
    shapes = model.adapter_shapes(None)
    weights, _ = train_members(model.adapted, [Member(examples, 1)], shapes, SETTINGS, max_tokens=2048)
    save_adapter(tmp_path / "adapter", weights[0], SETTINGS, "model")
    sequences = [(e.ids, e.targets) for e in examples]
    on_gpu = LanguageModel.load(model_folder, device="cuda")
    answers = [m.target_logprobs(sequences, adapter=tmp_path / "adapter") for m in (model, on_gpu)]
    for here, there in zip(*answers, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-4)


@gpu
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 0.05), ("float16", 0.01)])
def test_several_sequences_a_pass_answer_as_one(
    model: LanguageModel,
    model_folder: Path,
    examples: list[EncodedExample],
    dtype: str,
    near: float,
):
    """Per example, against the same request one by one, against passes that do not pad, and against float32 on the
    CPU."""
    on_gpu = LanguageModel.load(model_folder, device="cuda", dtype=dtype)
    sequences = [(e.ids, e.targets) for e in examples]
    together = on_gpu.target_logprobs(sequences)
    alone = [on_gpu.target_logprobs([s])[0] for s in sequences]
    bare = on_gpu.token_logprobs([ids for ids, _ in sequences])
    unpadded = [a.logprobs[[t - 1 for t in targets]] for a, (_, targets) in zip(bare, sequences, strict=True)]
    means = [
        np.array([a.mean() for a in answers])
        for answers in (together, alone, unpadded, model.target_logprobs(sequences))
    ]
    for other in means[1:]:
        np.testing.assert_allclose(means[0], other, atol=near)


@gpu
def test_memory_stays_within_the_budget(model_folder: Path, examples: list[EncodedExample]):
    model = LanguageModel.load(model_folder, device="cuda")
    shapes = model.adapter_shapes(None)
    budget, longest = 64 << 20, max(len(e.ids) for e in examples)
    numbers = SETTINGS.rank * sum(n_in + n_out for n_in, n_out in shapes.values())
    limits = limits_of(
        model.adapted, member_bytes=20 * numbers, members=16, longest=longest, budget=budget, tokens=None
    )
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    group = [Member(examples, k) for k in range(limits.members)]
    train_members(model.adapted, group, shapes, SETTINGS, max_tokens=limits.tokens)
    assert torch.cuda.max_memory_allocated() - held <= budget


@gpu
def test_classifiers_are_those_of_the_cpu():
    inputs, labels = torch.randn(40, 6), torch.arange(40) % 4
    inclusion = np.random.default_rng(0).permuted(np.tile(np.arange(40) < 20, (5, 1)), axis=1)
    losses = []
    for device in ("cpu", "cuda"):
        classifier = Classifier(
            lambda: torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), device=device
        )
        members = classifier.train(inputs, labels, inclusion, range(5), ClassifierSettings(n_epochs=2, batch_size=8))
        losses.append(classifier.measure(members, inputs, labels))
    np.testing.assert_allclose(*losses, atol=1e-3)


@two_gpus
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_a_model_spread_over_two_gpus_trains_and_scores(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample], objective: Objective, tmp_path: Path
):
    spread = LanguageModel.load(model_folder, device="cuda", device_map="balanced")
    assert {p.device.index for p in spread.adapted.parameters.values()} == {0, 1}
    np.testing.assert_allclose(
        trained(spread, examples, objective), trained(model, examples, objective), rtol=1e-3, atol=1e-3
    )
    sequences = [(e.ids, e.targets) for e in examples]
    for here, there in zip(model.target_logprobs(sequences), spread.target_logprobs(sequences), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-4)
