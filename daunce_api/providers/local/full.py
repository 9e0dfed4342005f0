"""Full fine-tunes as Hugging Face model folders, which transformers, vLLM and this package load by their path."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigurationError
from .jobs import whole_folder
from .lora import ActiveFull, AdaptedModel
from .models import load_causal_lm
from .trainees import FullWeights

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def is_full(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def save_full(out: Path, model: AdaptedModel, weights: Mapping[str, Tensor], tokenizer: Path) -> None:
    """Write a model folder with these weights and the tokenizer of the folder ``tokenizer``.

    It appears whole (written under another name, then renamed) and replaces an old one.
    """
    with whole_folder(out) as part:
        with model.using(ActiveFull(weights)):
            model.model.save_pretrained(part)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, part / name)


def load_full(folder: Path, model: AdaptedModel) -> FullWeights:
    """Weights of a model folder, where ``model`` holds its own.

    Raises ConfigurationError where it is no model folder or a model of another shape.
    """
    dtypes = {t.dtype for t in model.own_weights.values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise ConfigurationError("a full fine-tune cannot take the place of quantised weights; set no quantisation.")
    other = load_causal_lm(folder, dtype=next(iter(dtypes)), device="cpu")
    found = {n: p.data for n, p in other.named_parameters()}
    own = model.own_weights
    if found.keys() != own.keys() or any(found[n].shape != own[n].shape for n in own):
        raise ConfigurationError(f"{folder.name} is a model of another shape than {model.model.config.model_type} here")
    # Cloned: loaded tensors may lie at any address, and the address decides which kernel computes with them.
    return {n: found[n].to(own[n].device, own[n].dtype, copy=True) for n in own}


def check_trainable(model: AdaptedModel) -> None:
    """Raises ConfigurationError where not all weights of this model can be trained."""
    if any(t.dtype not in (torch.float32, torch.float64, torch.bfloat16) for t in model.own_weights.values()):
        raise ConfigurationError(
            "a full fine-tune needs weights in float32, float64 or bfloat16: set dtype, and no quantisation, or use "
            "fine_tuning: lora."
        )
