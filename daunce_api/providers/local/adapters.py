"""LoRA adapters as standard PEFT folders (``adapter_model.safetensors``, ``adapter_config.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from .jobs import whole_folder
from .recipes import LoraSettings

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter in memory: ``weights[module] = (A, B)``, A (rank, in), B (out, rank), float32."""

    weights: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float


def target_modules(model: PreTrainedModel, targets: tuple[str, ...] | None) -> list[str]:
    """Full names of the modules that get an adapter, in the model's order.

    Raises ConfigurationError where ``targets`` match no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    if targets is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        known = KNOWN.get(str(model.config.model_type), ())
        found = [n for n in linear if _matches(n, known)]
        return found or list(linear)
    found = [n for n in linear if _matches(n, targets)]
    if not found:
        names = sorted({n.rpartition(".")[2] for n in linear})
        raise ConfigurationError(
            f"no linear layer of {model.config.model_type} is named {', '.join(targets)}. "
            f"Its layers: {', '.join(names)}"
        )
    return found


def _matches(name: str, targets: tuple[str, ...] | list[str]) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)


def save_adapter(
    out: Path, weights: Mapping[str, tuple[Tensor, Tensor]], settings: LoraSettings, base_model: str
) -> None:
    """Write a PEFT adapter folder. It appears whole (written under another name, then renamed) and replaces an old one.

    The same weights give the same bytes.
    """
    from peft import LoraConfig

    tensors = {}
    for name, (a, b) in weights.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().to("cpu", torch.float32).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().to("cpu", torch.float32).contiguous()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # PEFT computes with it as a float
        lora_dropout=settings.dropout,
        target_modules=list(weights),
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).to_dict()
    # PEFT holds the names as a set, whose order changes from one process to the next.
    config["target_modules"] = sorted(weights)
    with whole_folder(out) as part:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(getattr(value, "value", value))


def load_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder. Raises ConfigurationError where it is not one, or uses more than plain LoRA."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"{folder} is no PEFT adapter folder: {error}") from error
    beyond = [
        k for k in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(k)
    ]
    if config.get("peft_type") != "LORA" or beyond or config.get("bias", "none") != "none":
        raise ConfigurationError(
            f"{folder} is not a plain LoRA adapter ({', '.join(beyond) or config.get('peft_type')})"
        )
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted(tensors):
        if not (key.startswith(_PREFIX) and key.endswith(".lora_A.weight")):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        other = f"{_PREFIX}{name}.lora_B.weight"
        if other not in tensors:
            raise ConfigurationError(f"{folder}: {other} is missing")
        # Cloned: loaded tensors may lie at any address, and the address decides which kernel computes with them.
        weights[name] = (tensors[key].float().clone(), tensors[other].float().clone())
    return Adapter(weights, float(config["lora_alpha"]) / int(config["r"]))
