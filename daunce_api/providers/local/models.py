"""Where a model's folder is: the embedded model, SmolLM2 from its package, a folder, or a Hugging Face id."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...errors import ConfigurationError, MissingExtraError
from .progress import without_bars
from .smollm2 import SMOLLM2, converted_smollm2

EMBEDDED = "daunce-tiny"


def resolve_model(path: str | Path) -> tuple[str, Path]:
    """(name, folder) of a model: ``daunce-tiny`` (embedded), ``smollm2-135m`` (converted once into the user's cache
    folder), a Hugging Face model folder, or a Hugging Face id (downloaded unless it is in that library's cache).

    Raises ConfigurationError where there is no such model.
    """
    name = str(path)
    if name == EMBEDDED:
        return name, Path(str(files("daunce_api.server") / "model"))
    if name == SMOLLM2:
        return name, converted_smollm2()
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve().name, folder.resolve()
    if folder.is_dir() or isinstance(path, Path) or name.count("/") != 1 or name.startswith((".", "~")):
        raise ConfigurationError(
            f"{name} is no Hugging Face model folder (config.json is not there). Give such a folder, an id of the "
            f"form owner/name, {EMBEDDED!r} or {SMOLLM2!r}."
        )
    return name, _of_hub(name)


def _of_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    here = f"the cache of Hugging Face models ({constants.HF_HUB_CACHE})"
    get = f"run `hf download {name}`" + (" without HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "")
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = "HF_HUB_OFFLINE forbids to download it" if constants.HF_HUB_OFFLINE else "it could not be downloaded"
        raise ConfigurationError(
            f"the model {name} is neither a folder here nor in {here}, and {why} ({type(error).__name__}). Check the "
            f"name; {get}, or give a folder, {EMBEDDED!r} or {SMOLLM2!r}."
        ) from error
    missing = [what for what in ("config.json", "*.safetensors") if not any(folder.glob(what))]
    if missing:
        raise ConfigurationError(
            f"the model {name} has no {' and no '.join(missing)} in {here}. Where the model has such files, {get}; "
            "weights in other formats are not read."
        )
    return folder


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str,
    device_map: str | Mapping[str, int | str] | None = None,
    quantisation: str | None = None,
) -> PreTrainedModel:
    """A frozen causal language model in evaluation mode; weights from safetensors only (never a pickle).

    ``device_map`` (accelerate's, for example ``auto``) spreads a model that is larger than one GPU; ``device`` is
    then not used. ``quantisation`` is ``8bit`` or ``4bit`` (NF4), computed with bitsandbytes in ``dtype``.
    Raises ConfigurationError where the folder holds no causal language model.
    """
    quantised = _quantised(quantisation, dtype)
    try:
        with without_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map=device_map or (device if quantisation else None),
                quantization_config=quantised,
                use_safetensors=True,
                local_files_only=True,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    if device_map is None and quantisation is None:
        model.to(device)
    for module in model.modules():
        # What bitsandbytes repacks a layer's weights for on some CPUs has no gradient; without it both ways work.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ConfigurationError(
            f"{folder.name} does not fit into the memory of the GPUs here, and parts that wait on the CPU or on disk "
            "cannot be trained. Use more GPUs, quantisation: 8bit or 4bit, or a smaller dtype."
        )
    model.eval()
    model.requires_grad_(False)
    return model


def _quantised(kind: str | None, dtype: torch.dtype) -> Any:
    if kind is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"a model in {kind}", "quantised")
    from transformers import BitsAndBytesConfig

    # At every product it says that the inputs are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    raise ConfigurationError(f"quantisation {kind!r} is not known; use 8bit or 4bit")


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep activations at layer boundaries only and compute the rest again in the backward pass.

    Layers do so in training mode only, so the model's own dropout is taken out: the base is the same in both modes.
    """
    # The name changes with transformers 6; the newer one is in 5.x already.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
