"""LoRA adapters as standard PEFT folders (``adapter_model.safetensors``, ``adapter_config.json``)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import ConfigurationError
from .lora import ActiveLora, AdaptedModel
from .options import LoraSettings
from .store import whole_folder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"})
"""Kinds of model for which PEFT's table names the query and value projections. PEFT is asked about the others alone:
importing it takes seconds, more than a small model's whole job."""
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_config
    megatron_core peft_type peft_version qalora_group_size r revision runtime_config target_modules
    task_type use_rslora
    """.split()  # noqa: SIM905
)
"""Fields of a PEFT configuration that are computed, or that do not change what an adapter computes."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""``init_lora_weights`` that leave the base model's own weights as they are."""


def target_modules(model: AdaptedModel, targets: tuple[str, ...] | str | None) -> list[str]:
    """Full names of the modules that get an adapter, in the model's order; none in a tower for images or sound.

    ``targets`` are read as PEFT reads them (ends of names, one regular expression, ``all-linear``); None: PEFT's table
    for the architecture, and every linear layer but the output head where it has no entry or none that matches.
    Raises ConfigurationError where ``targets`` match no linear layer, or one that an adapter does not reach.
    """
    from transformers.pytorch_utils import Conv1D

    layers = {n: m for n, m in model.modules.items() if isinstance(m, (nn.Linear, Conv1D)) and model.is_text(n)}
    # A router that is a linear layer gives more than its product.
    linear = [n for n, m in layers.items() if not type(m).__name__.endswith("Router")]
    body = [n for n in linear if model.modules[n] is not model.head and not _bypassed(model, n)]
    if targets == "all-linear":
        return body
    wanted = _usual_targets(model.model.config.model_type, model.config.model_type) if targets is None else targets
    found = [n for n in (body if targets is None else linear) if _is_target(n, wanted)]
    if not found and targets is not None:
        names = sorted({n.rpartition(".")[2] for n in linear})
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        raise ConfigurationError(
            f"no linear layer of {model.config.model_type} is named {shown}. Its layers: {', '.join(names)}"
        )
    if bypassed := [n for n in found if _bypassed(model, n)]:
        raise ConfigurationError(
            f"{bypassed[0]} is the output of a state-space layer, whose kernels take its weight and would pass over an "
            "adapter; PEFT refuses it too. Leave it out of the target modules."
        )
    return found or body


def _bypassed(model: AdaptedModel, name: str) -> bool:
    """Whether this layer is the output of a state-space layer (Mamba), which has parameters ``A_log`` and ``D``."""
    owner, _, last = name.rpartition(".")
    return last == "out_proj" and all(hasattr(model.modules[owner], p) for p in ("A_log", "D"))


def _is_target(name: str, wanted: Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _usual_targets(*kinds: str) -> Sequence[str]:
    """PEFT's table for the first of these kinds of model that it has."""
    if kinds[0] in _LIKE_LLAMA:
        return ("q_proj", "v_proj")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets: Sequence[str] = next((KNOWN[kind] for kind in kinds if kind in KNOWN), ())
    return targets


def shapes_of(model: AdaptedModel, names: list[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of linear layers: plain, quantised, or transposed (``nx`` and ``nf``)."""

    def size(name: str, *attributes: str) -> int:
        return next(int(getattr(model.modules[name], a)) for a in attributes if hasattr(model.modules[name], a))

    return {name: (size(name, "in_features", "nx"), size(name, "out_features", "nf")) for name in names}


def save_adapter(
    out: Path, weights: Mapping[str, tuple[Tensor, Tensor]], settings: LoraSettings, base_model: str
) -> None:
    """Write a PEFT adapter folder. It appears whole (written under another name, then renamed) and replaces an old one.

    The same weights give the same bytes.
    """
    parts = {name + end: t for name, pair in weights.items() for end, t in zip((_A, _B), pair, strict=True)}
    tensors = {_PREFIX + key: t.detach().to("cpu", torch.float32).contiguous() for key, t in parts.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,  # PEFT computes with it as a float
        "lora_dropout": settings.dropout,
        "target_modules": sorted(weights),
        "bias": "none",
        "inference_mode": True,
    }
    with whole_folder(out) as part:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: Path) -> ActiveLora:
    """The update that a PEFT LoRA folder holds, in float32. Raises ConfigurationError, with the name of the part, where
    it is not one or has parts that are not computed here."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"{folder} is no PEFT adapter folder: {error}") from error
    names = sorted(k.removesuffix(_A) for k in tensors if k.endswith(_A) and k.startswith(_PREFIX))
    computed = {name + part for name in names for part in (_A, _B)}
    if beyond := [*_beyond(config), *sorted(tensors.keys() - computed)]:
        raise ConfigurationError(
            f"{folder} is not a plain LoRA adapter: {', '.join(beyond[:5])} would be left out, and a wrong model "
            "scored. Merge the adapter into its base model (PEFT's merge_and_unload) and give the folder of the result."
        )
    missing = sorted(computed - tensors.keys())
    if missing or not names:
        raise ConfigurationError(f"{folder}: {missing[0] if missing else 'a LoRA weight'} is missing")
    # Cloned: loaded tensors may lie at any address, and the address decides which kernel computes with them.
    parts = {key: tensor.float().clone() for key, tensor in tensors.items()}
    weights = {name.removeprefix(_PREFIX): (parts[name + _A], parts[name + _B]) for name in names}
    rank = int(config["r"])
    return ActiveLora(weights, float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _beyond(config: Mapping[str, Any]) -> list[str]:
    """What a configuration asks for beyond plain LoRA."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type {config.get('peft_type')}"]
    found = [k for k, v in sorted(config.items()) if v and k not in _HARMLESS and (k, v) != ("bias", "none")]
    start = config.get("init_lora_weights", True)
    return found if start in _PLAIN_STARTS else [*found, f"init_lora_weights {start}"]
