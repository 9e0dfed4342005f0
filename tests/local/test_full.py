"""Full fine-tunes: against a plain PyTorch loop over transformers' own model, and through a whole run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_records import records
from plain_training import train_one, train_plainly
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from daunce_api import Dataset, Run, RunConfig
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import ConfigurationError, RejectedError
from daunce_api.providers.local.language import FullSettings, LanguageModel, LoraSettings
from daunce_api.providers.local.lora import AdaptedModel
from daunce_api.providers.local.models import load_full
from daunce_api.providers.local.options import options_of, settings_of
from daunce_api.providers.local.store import MemberTask
from daunce_api.providers.local.train import FullTrainee, Member, batches_of, fine_tune
from daunce_api.providers.local.worker import ModelSpec, TrainTask, run_score, run_train
from daunce_api.providers.objective import Objective, noise

SHORT = FullSettings(n_epochs=2, batch_size=5, learning_rate=1e-3)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not request.param:
        return model_folder
    folder = tmp_path_factory.mktemp("models") / "tied-llama"
    torch.manual_seed(6)
    config = LlamaConfig.from_pretrained(model_folder)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model_folder / name).exists():
            (folder / name).write_bytes((model_folder / name).read_bytes())
    return folder


def plain_training(
    folder: Path, examples: list[EncodedExample], chosen: FullSettings, seed: int
) -> tuple[Any, list[float]]:
    """The same fine-tune with transformers' model alone: one example at a time, plain AdamW over all its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, train_plainly(model, examples, chosen, seed)


def train_full(
    model: AdaptedModel, member: Member, start: dict[str, torch.Tensor] | None, chosen: FullSettings, **options: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    trainee = FullTrainee(model, member, start)
    losses = fine_tune(model, trainee, chosen, **options)
    return trainee.held.weights, losses[0]


def logprobs_of(model: torch.nn.Module, ids: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_training_equals_a_plain_loop_and_the_folder_is_a_model(
    folder: Path, examples: list[EncodedExample], tmp_path: Path
):
    model = LanguageModel.load(folder)
    before = model.token_logprobs([e.ids for e in examples])
    reference, losses = plain_training(folder, examples, SHORT, 7)
    outcome = train_one(model, examples, settings=SHORT, seed=7, out=tmp_path / "out")
    np.testing.assert_allclose(outcome.losses, losses, rtol=5e-5)
    assert outcome.losses[-1] < outcome.losses[0] - 0.05
    assert outcome.trained_tokens == 2 * sum(len(e.ids) for e in examples)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a") == [64]
    answers = model.token_logprobs([e.ids for e in examples], adapter=tmp_path / "out")
    for example, answer in zip(examples, answers, strict=True):
        np.testing.assert_allclose(answer.logprobs, logprobs_of(own, example.ids), atol=1e-5)
        np.testing.assert_allclose(answer.logprobs, logprobs_of(reference, example.ids), atol=2e-4)
    after = model.token_logprobs([e.ids for e in examples])
    assert all(a.logprobs.tobytes() == b.logprobs.tobytes() for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in model.adapted.parameters.values())


def test_how_rows_are_split_changes_nothing(folder: Path, examples: list[EncodedExample]):
    model = LanguageModel.load(folder)
    trained = [
        train_full(model.adapted, Member(examples, 3), None, SHORT, max_tokens=max_tokens)[0]
        for max_tokens in (40, 4096)
    ]
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["influence", "fisher"])
def test_a_perturbed_step_is_the_objectives_gradient(
    folder: Path, examples: list[EncodedExample], kind: str, tmp_path: Path
):
    """Two steps of AdamW from a start that is not the base, against the formula on whole logits in double precision."""
    model = LanguageModel.load(folder, dtype="float64")
    train_one(model, examples, settings=SHORT, seed=1, out=tmp_path / "target")
    objective = Objective(kind, rho=3.0, gamma=0.7)
    chosen = FullSettings(n_epochs=2, batch_size=6, learning_rate=1e-3)
    start = load_full(tmp_path / "target", model.adapted.own_weights)
    trained, _ = train_full(
        model.adapted,
        Member(examples[:6], 9),
        start,
        chosen,
        objective=objective,
        max_tokens=512,
    )
    live, fixed = (AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.AdamW(live.parameters(), weight_decay=0.0)
    xi = noise(6, 9)
    for step, (_, batch) in enumerate(batches_of(6, chosen, 9)):
        total = torch.zeros((), dtype=torch.float64)
        for i in batch:
            ids, at = torch.tensor([examples[i].ids]), [t - 1 for t in examples[i].targets]
            y = ids[0, [t + 1 for t in at]]
            z = live(ids).logits[0, at]
            with torch.no_grad():
                z_0 = fixed(ids).logits[0, at]
            p, p_0 = (v.softmax(1)[range(len(y)), y] for v in (z, z_0))
            onehot = torch.nn.functional.one_hot(y, z.shape[1])
            shift = ((z_0.softmax(1) - onehot) * (z - z_0)).sum(1).mean()
            signed = 3.0 * (2 * xi[i] - 1)
            if kind == "influence":
                value = 0.7 * (p_0.log() - p.log()).mean() - (1 + signed) * shift
            else:
                moved = ((p / (1 - p)).log() - (p_0 / (1 - p_0)).log()).mean()
                value = 0.7 * moved**2 - signed * shift
            total = total + value / len(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.param_groups[0]["lr"] = chosen.rate(step, 2)
        optimizer.step()
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(trained[name], parameter.data, rtol=0, atol=1e-9)


def test_bfloat16_weights_take_steps_that_they_cannot_resolve(folder: Path, examples: list[EncodedExample]):
    model = LanguageModel.load(folder, dtype="bfloat16")
    slow = FullSettings(n_epochs=40, batch_size=24, learning_rate=2e-5, warmup_ratio=0)
    trained, _ = train_full(model.adapted, Member(examples, 3), None, slow, max_tokens=4096)
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = (trained[name] - model.adapted.own_weights[name]).abs()
    assert trained[name].dtype is torch.bfloat16
    # One step moves a weight by 2e-5 at most; only weights below 1e-2 resolve that in bfloat16.
    large = model.adapted.own_weights[name].abs() > 0.03
    assert (moved[large] > 0).float().mean() > 0.2


def test_a_full_fine_tune_continues_one_and_nothing_else(
    model: LanguageModel, examples: list[EncodedExample], tmp_path: Path
):
    train_one(model, examples, settings=SHORT, seed=3, out=tmp_path / "a")
    whole = FullSettings(n_epochs=1, batch_size=len(examples), learning_rate=1e-4)
    second = train_one(model, examples, settings=whole, seed=3, out=tmp_path / "b", start_from=tmp_path / "a")
    answers = model.token_logprobs([e.ids for e in examples], adapter=tmp_path / "a")
    own = [-r.logprobs[[t - 1 for t in e.targets]].mean() for e, r in zip(examples, answers, strict=True)]
    np.testing.assert_allclose(second.losses[0], np.mean(own), rtol=1e-5)
    train_one(model, examples[:5], settings=LoraSettings(n_epochs=1), seed=3, out=tmp_path / "lora")
    with pytest.raises(ConfigurationError, match="not an adapter"):
        train_one(model, examples, settings=whole, seed=3, out=tmp_path / "c", start_from=tmp_path / "lora")
    with pytest.raises(ConfigurationError, match="no PEFT adapter folder"):
        train_one(model, examples, settings=LoraSettings(), seed=3, out=tmp_path / "c", start_from=tmp_path / "a")
    with pytest.raises(ConfigurationError, match="another shape"):
        load_full(tmp_path / "a", LanguageModel.load("daunce-tiny").adapted.own_weights)


def test_training_is_deterministic_and_checkpoints_are_models(
    model: LanguageModel, examples: list[EncodedExample], tmp_path: Path
):
    seen: list[tuple[int, Path]] = []
    for name in "ab":
        train_one(model, examples, settings=SHORT, seed=3, out=tmp_path / name, checkpoint=lambda *e: seen.append(e))
    content = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in "ab"}
    assert content["a"] == content["b"]
    assert [epoch for epoch, _ in seen] == [1, 2, 1, 2]
    assert (seen[1][1] / "model.safetensors").read_bytes() == content["a"]
    assert (seen[0][1] / "model.safetensors").read_bytes() != content["a"]


def test_a_task_writes_a_model_that_another_scores_and_continues(
    model_folder: Path, examples: list[EncodedExample], tmp_path: Path
):
    data = Dataset.from_records(records(24))
    spec = ModelSpec(str(model_folder))
    content = data.training_file(range(20), "last")
    broken = b'{"prompt": "a", "completion": "' + b"b" * 500 + b'"}\n'
    members = [MemberTask(name, c, 3, tmp_path / name) for name, c in (("m", content), ("bad", broken))]
    good, bad = run_train(task := TrainTask(spec, SHORT, Objective(), tuple(members)))
    assert good.error is None
    assert bad.error is not None
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    sequences = tuple((e.ids, e.targets) for e in examples[:4])
    tuned, base = (run_score(spec, given, sequences) for given in (tmp_path / "m", None))
    assert tuned != base
    following = MemberTask("next", content, 4, tmp_path / "next")
    task = replace(task, members=(following,), start=tmp_path / "m", objective=Objective("influence"))
    assert run_train(task)[0].error is None


@pytest.mark.parametrize("objective", ["subset", "influence"])
def test_a_whole_run(tmp_path: Path, model_folder: Path, objective: str):
    data = records(16)
    Dataset.from_records([{**r, "id": f"t{i}"} for i, r in enumerate(data)]).to_jsonl(tmp_path / "train.jsonl")
    Dataset.from_records([{**r, "id": f"q{i}"} for i, r in enumerate(data[:3])]).to_jsonl(tmp_path / "test.jsonl")
    content = {
        "run_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "backend": {
            "kind": "local",
            "model": str(model_folder),
            "options": {"engine": "thread", "fine_tuning": "full", "objective": objective},
        },
        "ensemble": {"members": 3, "subset_ratio": 0.7, "start_from": "target"},
        "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-3}},
    }
    run = Run.create(RunConfig.from_mapping(content))
    attribution = run.execute()
    assert attribution.train_loss_KN.shape == (3, 16)
    assert (attribution.train_loss_KN.std(axis=0) > 1e-5).all()
    models = list((tmp_path / "run" / "local" / "models").iterdir())
    assert len(models) == 4
    assert all((p / "model.safetensors").is_file() and (p / "tokenizer.json").is_file() for p in models)
    run.clean()
    assert not list((tmp_path / "run" / "local" / "models").iterdir())


def test_what_does_not_go_together_is_refused(model_folder: Path):
    def config(**options: Any) -> RunConfig:
        backend = {"kind": "local", "model": str(model_folder), "options": {"fine_tuning": "full", **options}}
        return RunConfig.from_mapping({"data": {"train": "t.jsonl", "test": "q.jsonl"}, "backend": backend})

    assert settings_of({"learning_rate_multiplier": 2}, FullSettings) == FullSettings(learning_rate=1e-4)
    with pytest.raises(RejectedError, match="lora_rank"):
        settings_of({"lora_rank": 8}, FullSettings)
    for options in ({"quantisation": "8bit"}, {"dtype": "float16"}):
        with pytest.raises(ConfigurationError, match="fine_tuning: full"):
            options_of(config(**options))
