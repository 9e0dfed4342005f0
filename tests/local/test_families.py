"""Today's families as tiny random models: train, save, load in plain PEFT, and score as a transformers forward does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from plain_training import train_members, train_one
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import CapabilityError, ConfigurationError
from daunce_api.providers.local.adapters import _LIKE_LLAMA, _is_target, target_modules
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.models import model_class
from daunce_api.providers.local.train import Member, fine_tune

SHORT = LoraSettings(rank=2, alpha=4.0, n_epochs=1, batch_size=4, learning_rate=5e-3)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GEMMA_4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 300,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", MOE),
    "qwen3.5": ("qwen3_5_text", LINEAR),
    "qwen3.5-moe": ("qwen3_5_moe_text", {**LINEAR, **MOE, "shared_expert_intermediate_size": 8}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3", {"vision": {}}),
    "gemma3-text": ("gemma3_text", {"query_pre_attn_scalar": 8}),
    "gemma4": ("gemma4", {**GEMMA_4, "vision": {}}),
    "qwen3-vl": (
        "qwen3_vl",
        {
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "vision": {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "llama4": (
        "llama4",
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 24,
            "vision": {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        },
    ),
    "llava": ("llava", {"model_type": "llama", "vision": {"model_type": "clip_vision_model"}}),
    "mistral3": ("mistral3", {"model_type": "mistral", "vision": {"model_type": "pixtral"}}),
    "gemma4-text": ("gemma4_text", GEMMA_4),
    "mistral": ("mistral", {}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "phi4-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 48,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.1, 2.2, 2.3],
                "original_max_position_embeddings": 48,
            },
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
    ),
    "granite (scaled logits)": ("granite", {"logits_scaling": 3.0}),
    "mamba": ("mamba", {"state_size": 4}),
    "falcon-h1": (
        "falcon_h1",
        {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4},
    ),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96}),
}


def config_of(kind: str, extra: dict[str, Any], vocabulary: int) -> Any:
    text = {**TEXT, "vocab_size": vocabulary, "eos_token_id": 1, "bos_token_id": 1, **extra}
    if kind == "gpt2":
        return CONFIG_MAPPING[kind](vocab_size=vocabulary, eos_token_id=1, bos_token_id=1, **extra)
    if "vision" in text:
        return CONFIG_MAPPING[kind](vision_config={**VISION, **text.pop("vision")}, text_config=text)
    return CONFIG_MAPPING[kind](**text)


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    folder = tmp_path_factory.mktemp("families") / "model"
    torch.manual_seed(3)
    kind, extra = FAMILIES[request.param]
    auto = AutoModelForMultimodalLM if "vision" in extra else AutoModelForCausalLM
    auto.from_config(config_of(kind, extra, 300)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    return LanguageModel.load(folder)


def test_a_family_trains_saves_and_scores_as_transformers_does(
    family: LanguageModel, examples: list[EncodedExample], tmp_path: Path
):
    assert family.max_context == 96
    assert family.vocabulary == 300
    chosen = examples[:8]
    shapes = family.adapter_shapes(None)
    assert not [n for n in shapes if "vision" in n or "projector" in n]
    trainee = family.trainee([(chosen, 1), (chosen, 2)], SHORT)
    losses = fine_tune(family.adapted, trainee, SHORT)
    alone, single = train_members(family.adapted, [Member(chosen, 2)], shapes, SHORT)
    np.testing.assert_allclose(losses[1], single[0], rtol=1e-3)
    family.save(tmp_path / "a", trainee, 1)
    sequences = [(e.ids, e.targets) for e in examples[:6]]
    found = family.target_logprobs(sequences, adapter=tmp_path / "a")

    folder = family.tokenizer.folder
    base_model = type(family.adapted.model).from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base_model, tmp_path / "a")
    moved = 0.0
    base = family.target_logprobs(sequences)
    with torch.no_grad():
        for (ids, targets), ours, before in zip(sequences, found, base, strict=True):
            logprobs = plain(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = logprobs[[t - 1 for t in targets], [ids[t] for t in targets]].numpy()
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
            moved = max(moved, abs(expected - before).max())
    assert moved > 1e-3
    assert alone[0].keys() == shapes.keys()


def test_a_full_fine_tune_of_a_model_with_towers_changes_its_text_part_alone(
    model_folder: Path, examples: list[EncodedExample], tmp_path: Path
):
    from daunce_api.providers.local.options import FullSettings

    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config_of("gemma3", {"vision": {}}, 300)).save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((model_folder / name).read_bytes())
    model = LanguageModel.load(tmp_path / "m")
    chosen = FullSettings(n_epochs=1, batch_size=8, learning_rate=1e-2)
    train_one(model, examples[:8], settings=chosen, seed=1, out=tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, model.adapted.own_weights[n])}
    assert changed
    assert not [n for n in changed if "vision" in n or "projector" in n]
    sequences = [(e.ids, e.targets) for e in examples[:4]]
    here, there = model.target_logprobs(sequences, adapter=tmp_path / "tuned"), []
    with torch.no_grad():
        for ids, targets in sequences:
            logprobs = tuned(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            there.append(logprobs[[t - 1 for t in targets], [ids[t] for t in targets]].numpy())
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("q_proj",), {"q_proj"}),
        (("layers.1.mlp.up_proj",), {"up_proj"}),
        (r".*layers\.0.*\.(k|v)_proj", {"k_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("lm_head",), {"lm_head"}),
    ],
    ids=["name", "path", "regular expression", "all-linear", "head"],
)
def test_targets_are_read_as_peft_reads_them(model: LanguageModel, targets: Any, found: set[str]):
    from peft import LoraConfig, get_peft_model

    names = target_modules(model.adapted, targets)
    assert {n.rpartition(".")[2] for n in names} == found
    fresh = AutoModelForCausalLM.from_pretrained(model.tokenizer.folder)
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets), task_type="CAUSAL_LM")
    wrapped = get_peft_model(fresh, config)
    theirs = {n.removesuffix(".lora_A.default.weight") for n, _ in wrapped.named_parameters() if "lora_A" in n}
    assert {f"base_model.model.{n}" for n in names} == theirs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "no causal language model .*'t5'"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "Give a decoder-only model"),
        ({"model_type": "tomorrows"}, "install a transformers that knows this one"),
        ({"hidden_size": 8}, "model_type None"),
    ],
    ids=["encoder-decoder", "encoder-decoder with a decoder", "unknown", "without a kind"],
)
def test_what_is_no_causal_language_model_is_refused_by_its_configuration(
    config: dict[str, Any], message: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=message):
        model_class(tmp_path)


def test_an_encoder_is_refused(model_folder: Path, examples: list[EncodedExample], tmp_path: Path):
    """It has a head over the vocabulary, but its logits know the answer."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config_of("bert-generation", {}, 300)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(CapabilityError, match="bert-generation lets a token see those after it"):
        LanguageModel.load(tmp_path).target_logprobs([(examples[0].ids, examples[0].targets)])


def test_the_output_of_a_state_space_layer_gets_no_adapter(model_folder: Path, tmp_path: Path):
    kind, extra = FAMILIES["mamba"]
    AutoModelForCausalLM.from_config(config_of(kind, extra, 300)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    mamba = LanguageModel.load(tmp_path).adapted
    kinds = {n.rpartition(".")[2] for n in target_modules(mamba, "all-linear")}
    assert kinds == {"in_proj", "x_proj", "dt_proj"}
    with pytest.raises(ConfigurationError, match=r"layers\.0\.mixer\.out_proj is the output of a state-space layer"):
        target_modules(mamba, ("in_proj", "out_proj"))


def test_an_adapter_with_parts_that_are_not_computed_is_refused_by_name(
    model: LanguageModel, examples: list[EncodedExample], tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "a"
    trainee = model.trainee([(examples, 1)], SHORT)
    model.save(folder, trainee)
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    request = [(examples[0].ids, examples[0].targets)]
    for key, value in {
        "use_dora": True,
        "lora_bias": True,
        "trainable_token_indices": [1, 2],
        "layer_replication": [[0, 2], [1, 2]],
        "target_parameters": ["experts.gate_up_proj"],
        "modules_to_save": ["embed_tokens"],
        "rank_pattern": {"q_proj": 4},
        "init_lora_weights": "pissa",
        "bias": "all",
        "something_of_tomorrow": {"x": 1},
    }.items():
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ConfigurationError, match=rf"{key}.* would be left out"):
            model.target_logprobs(request, adapter=folder)
    path.write_text(json.dumps(config))
    for name in ("base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.weight"):
        save_file({**tensors, name: torch.zeros(2, 2)}, weights)
        with pytest.raises(ConfigurationError, match=rf"{name.rpartition('.')[2]} would be left out"):
            model.target_logprobs(request, adapter=folder)
    save_file(tensors, weights)
    path.write_text(json.dumps({**config, "use_rslora": True}))
    model.target_logprobs(request, adapter=folder)


def test_the_usual_targets_are_those_of_pefts_table() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    assert {kind: list(KNOWN[kind]) for kind in _LIKE_LLAMA} == {kind: ["q_proj", "v_proj"] for kind in _LIKE_LLAMA}


@pytest.mark.parametrize("wanted", [("q_proj", "1.mlp.up_proj"), r".*\.[01]\..*(q|v)_proj", ("proj",), "q_proj"])
def test_targets_match_as_pefts_own(wanted: tuple[str, ...] | str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [
        f"model.layers.{i}.{n}" for i in range(12) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    ]
    config = LoraConfig(target_modules=wanted if isinstance(wanted, str) else list(wanted))
    expected = [bool(check_target_module_exists(config, name)) for name in [*names, "q_proj"]]
    assert [_is_target(name, wanted) for name in [*names, "q_proj"]] == expected
