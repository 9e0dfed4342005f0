"""Language-model members trained together: the same numbers as one at a time, within the memory they were given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_records import records
from plain_training import memory_used, train_members, train_one
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import CapabilityError, ConfigurationError, MissingExtraError
from daunce_api.providers.local import memory, worker
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.memory import Limits, limits_of, token_bytes
from daunce_api.providers.local.store import MemberTask
from daunce_api.providers.local.train import LoraTrainee, Member, Weights
from daunce_api.providers.local.worker import ModelSpec, TrainTask, run_train
from daunce_api.providers.objective import Objective

SHORT = LoraSettings(rank=4, alpha=8.0, n_epochs=2, batch_size=5, learning_rate=5e-3)


def train(
    model: LanguageModel,
    members: list[Member],
    settings: LoraSettings,
    max_tokens: int,
    objective: Objective,
    start: Weights | None = None,
) -> tuple[list[Weights], np.ndarray]:
    weights, losses = train_members(
        model.adapted,
        members,
        model.adapter_shapes(settings.targets),
        settings,
        start,
        objective=objective,
        max_tokens=max_tokens,
    )
    return weights, np.array(losses)


def assert_close(one: list[Weights], other: list[Weights], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "dropout", "max_tokens"),
    [("subset", 0.0, 40), ("subset", 0.3, 4096), ("influence", 0.0, 4096), ("fisher", 0.3, 100)],
)
def test_members_together_are_members_alone(
    model: LanguageModel, examples: list[EncodedExample], kind: str, dropout: float, max_tokens: int
):
    settings, objective = replace(SHORT, dropout=dropout), Objective(kind, rho=2.0)
    starts, _ = train(model, [Member(examples, 0)], SHORT, 2048, Objective())
    members = [Member(examples[k : 18 + k], 10 + k) for k in range(3)]
    together, losses = train(model, members, settings, max_tokens, objective, starts[0])
    alone = [train(model, [m], settings, 2048, objective, starts[0]) for m in members]
    np.testing.assert_allclose(losses, np.concatenate([a[1] for a in alone]), rtol=1e-4)
    assert_close(together, [a[0][0] for a in alone], 2e-4)
    if dropout:
        undisturbed, _ = train(model, members[:1], SHORT, 2048, objective, starts[0])
        with pytest.raises(AssertionError):
            assert_close(undisturbed, together[:1], 2e-4)


@pytest.mark.parametrize(
    ("make", "projection"),
    [
        (
            lambda v: GPT2LMHeadModel(GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=2, n_positions=128)),
            "c_attn",
        ),
        (
            lambda v: GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    vocab_size=v,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=128,
                )
            ),
            "query_key_value",
        ),
    ],
    ids=["gpt2", "neox"],
)
def test_other_architectures(
    make: Callable[[int], Any],
    projection: str,
    model: LanguageModel,
    model_folder: Path,
    examples: list[EncodedExample],
    tmp_path: Path,
):
    torch.manual_seed(1)
    make(model.vocabulary).save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((model_folder / name).read_bytes())
    other = LanguageModel.load(tmp_path / "m")
    assert {n.rpartition(".")[2] for n in other.adapter_shapes(None)} == {projection}
    members = [Member(examples[k : 18 + k], k) for k in range(2)]
    together, losses = train(other, members, SHORT, 2048, Objective())
    assert_close(together, [train(other, [m], SHORT, 2048, Objective())[0][0] for m in members], 2e-4)
    assert (losses[:, -1] < losses[:, 0]).all()


def test_an_unknown_architecture_adapts_every_linear_layer_but_the_head(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model.adapted.model.config, "model_type", "something-new")
    names = {n.rpartition(".")[2] for n in model.adapter_shapes(None)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_checkpointed_activations_change_nothing(
    model: LanguageModel, model_folder: Path, examples: list[EncodedExample]
):
    frugal = LanguageModel.load(model_folder, gradient_checkpointing=True)
    members = [Member(examples, 1), Member(examples, 2)]
    plain, checkpointed = (train(m, members, SHORT, 2048, Objective())[0] for m in (model, frugal))
    assert_close(checkpointed, plain, 1e-6)
    assert not frugal.adapted.model.training
    kept = [token_bytes(m.adapted, 16) for m in (model, frugal)]
    assert kept[1] < 0.8 * kept[0]  # one of its two layers is held while it is computed again


def test_bfloat16_is_near_float32(model: LanguageModel, model_folder: Path, examples: list[EncodedExample]):
    half = LanguageModel.load(model_folder, dtype="bfloat16")
    members = [Member(examples, 1), Member(examples, 2)]
    losses = [train(m, members, SHORT, 2048, Objective())[1] for m in (model, half)]
    assert 0 < abs(losses[0] - losses[1]).max() < 0.1


@pytest.mark.parametrize(("quantisation", "near"), [("8bit", 0.2), ("4bit", 0.5)])
def test_a_quantised_base_trains_and_scores_near_the_plain_one(
    model: LanguageModel,
    model_folder: Path,
    examples: list[EncodedExample],
    quantisation: str,
    near: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    pytest.importorskip("bitsandbytes")
    small = LanguageModel.load(model_folder, quantisation=quantisation)
    kinds = {type(m).__name__ for m in small.adapted.modules.values()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    sequences = [(e.ids, e.targets) for e in examples]
    base = small.target_logprobs(sequences)  # what scoring does to the weights must not be in training's way
    members = [Member(examples, 1), Member(examples, 2)]
    for objective in (Objective(), Objective("influence", rho=2.0)):
        losses = [train(m, members, SHORT, 2048, objective)[1] for m in (model, small)]
        assert 0 < abs(losses[0] - losses[1]).max() < near
    again = small.target_logprobs(sequences)
    assert all(map(np.array_equal, base, again))
    outcome = train_one(small, examples, settings=SHORT, seed=1, out=tmp_path / "a")
    tuned, plain = (m.target_logprobs(sequences, adapter=outcome.adapter) for m in (small, model))
    means = [np.mean([a.mean() for a in answers]) for answers in (base, tuned, plain)]
    assert means[1] > means[0] + 0.05
    assert abs(means[1] - means[2]) < near
    assert "inputs will be cast" not in caplog.text


def test_a_quantised_model_without_its_package_names_the_extra(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("daunce_api.providers.local.models.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"daunce-api\[quantised\]"):
        LanguageModel.load(model_folder, quantisation="4bit")


def test_the_limits_keep_to_the_budget(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    limits = [
        limits_of(model.adapted, member_bytes=100_000, members=50, longest=60, budget=budget, tokens=None)
        for budget in (0, 1_000_000, 3_000_000, 1 << 30)
    ]
    assert [x.members for x in limits] == [1, 5, 15, 50]
    assert (limits[0].tokens, limits[3].tokens) == (60, 1024)
    assert all(100_000 * x.members + token_bytes(model.adapted, 60) * x.tokens <= 3_000_000 for x in limits[1:3])
    given = limits_of(model.adapted, member_bytes=1, members=1, longest=60, budget=1 << 30, tokens=100)
    assert given == Limits(1, 100)
    monkeypatch.setattr(memory, "CPU_PASS_BYTES", 200 * token_bytes(model.adapted, 60))
    for tokens, most in ((None, 200), (500, 500)):  # the user's own number stays
        sized = limits_of(model.adapted, member_bytes=1, members=1, longest=60, budget=1 << 30, tokens=tokens)
        assert sized == Limits(1, most)
    assert given.smaller(60) == Limits(1, 60)
    assert Limits(3, 100).smaller(60) == Limits(2, 100)
    assert Limits(1, 60).smaller(60) is None


@pytest.mark.slow
def test_memory_stays_within_the_limit():
    """The growth of a process of its own that trains 16 members within 64 MiB."""
    used = memory_used(64 << 20)
    assert 4 << 20 < used <= 80 << 20, used >> 20  # half the limit is left to what is only estimated


def test_members_are_split_by_memory_and_by_steps_and_keep_their_order(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_losses: list[Any]
):
    data = Dataset.from_records(records(24))
    monkeypatch.setattr(worker, "limits_of", lambda *_, members, **__: Limits(min(members, 3), 2048))
    counts = [20, 20, 9, 20, 20, 20]
    members = tuple(
        MemberTask(f"m{k}", data.training_file(range(n), "last"), k, tmp_path / str(k)) for k, n in enumerate(counts)
    )
    task = TrainTask(ModelSpec(str(model_folder)), SHORT, Objective(), members)
    results = run_train(task)
    assert [r.key for r in results] == [f"m{k}" for k in range(6)]
    assert [[len(losses) for losses in batch] for batch in trained_losses] == [[8, 8, 8], [8, 8], [4]]
    written = [sorted(p.name for p in (tmp_path / str(k)).iterdir()) for k in range(6)]
    assert written == [["adapter_config.json", "adapter_model.safetensors"]] * 6


def test_what_cannot_be_trained_together_is_trained_alone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_losses: list[Any]
):
    data = Dataset.from_records(records(24))
    sizes = []
    original = worker.fine_tune

    def only_one(model: Any, trainee: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(trainee.members))
        if len(trainee.members) > 1:
            raise CapabilityError("not together")
        return original(model, trainee, *rest, **options)

    members = tuple(
        MemberTask(f"m{k}", data.training_file(range(k, 20 + k), "last"), k, tmp_path / str(k)) for k in range(4)
    )
    task = TrainTask(ModelSpec(str(model_folder)), SHORT, Objective(), members)
    whole = run_train(task)
    monkeypatch.setattr(worker, "fine_tune", only_one)
    alone = run_train(task)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert whole == alone
    together, *singles = trained_losses
    np.testing.assert_allclose(together, np.concatenate(singles), rtol=1e-4)


def test_adapters_lie_where_their_modules_are(model: LanguageModel, examples: list[EncodedExample]):
    """Two GPUs, played by a CPU and by torch's device without storage."""
    shapes = model.adapter_shapes(None)
    first, *others = shapes
    elsewhere = copy.deepcopy(model.adapted.modules[first]).to("meta")
    adapted = copy.copy(model.adapted)
    adapted.modules = {**model.adapted.modules, first: elsewhere}
    trainee = LoraTrainee(adapted, [Member(examples, 1), Member(examples, 2)], shapes, SHORT)
    held = trainee.active([], 0).weights
    assert {t.device.type for t in held[first]} == {"meta"}
    assert {t.device.type for name in others for t in held[name]} == {"cpu"}


def test_a_model_that_does_not_fit_its_gpus_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def partly_loaded(*_: object, **__: object) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", partly_loaded)
    with pytest.raises(
        ConfigurationError, match=r"does not fit into the memory of the devices here.*Tinker-compatible"
    ):
        LanguageModel.load(model_folder, device_map="auto")
