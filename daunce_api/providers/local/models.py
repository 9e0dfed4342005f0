"""Where a model's folder is, what its configuration says, how it is loaded, and full fine-tunes as model folders."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError, MissingExtraError
from ..tokenizers import EMBEDDED_MODEL, embedded_folder, hub_folder
from .options import LocalOptions
from .store import whole_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_CONFIGS = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = "*.safetensors"


def resolve_model(path: str | Path, *, weights: bool = True) -> tuple[str, Path]:
    """(name, folder) of a model: ``daunce-tiny`` (embedded), a Hugging Face model folder, or a Hugging Face id
    (downloaded unless it is in that library's cache; without ``weights``, its configuration and tokenizer alone).

    Raises ConfigurationError where there is no such model.
    """
    name = str(path)
    if name == EMBEDDED_MODEL:
        return name, embedded_folder()
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve().name, folder.resolve()
    if folder.is_dir() or isinstance(path, Path) or name.count("/") != 1 or name.startswith((".", "~")):
        raise ConfigurationError(
            f"{name} is no Hugging Face model folder (config.json is missing). Give such a folder, an id of the "
            f"form owner/name, or {EMBEDDED_MODEL!r}."
        )
    get = f"`hf download {name}` where there is a network, or give a folder or {EMBEDDED_MODEL!r}."
    of_weights = (_WEIGHTS,) if weights else ()
    folder = hub_folder(name, (*_CONFIGS, *of_weights), "the model", f"Check the name; run {get}")
    if missing := [what for what in ("config.json", *of_weights) if not any(folder.glob(what))]:
        raise ConfigurationError(
            f"the model {name} has no {' and no '.join(missing)} in the cache of Hugging Face models; weights in other "
            f"formats are not read. Where the model has such files, run {get}"
        )
    return name, folder


@lru_cache(maxsize=8)
def context_of(path: str) -> int | None:
    """Longest sequence of a model in tokens, from its configuration alone; None where that does not say."""
    folder = resolve_model(path, weights=False)[1]
    content = _config(folder)
    try:
        found = longest_context(SimpleNamespace(**content.get("text_config", content)))
        if found is None:  # the family's own default, which costs importing PyTorch
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            found = longest_context(config.get_text_config(decoder=True))
    except (AttributeError, OSError, TypeError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"{folder.name}: config.json cannot be read: {error}") from error
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{folder.name}: config.json cannot be read: {error}") from error


def model_class(folder: Path) -> Any:
    """What loads the model of a folder, by its configuration: a language model, or one with images or sound beside its
    text. Raises ConfigurationError for any other kind."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    content = _config(folder)
    kind = content.get("model_type")
    if not content.get("is_encoder_decoder"):
        if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return AutoModelForCausalLM
        if kind in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
            return AutoModelForMultimodalLM
    raise ConfigurationError(
        f"{folder.name} is no causal language model for the installed transformers (model_type {kind!r}). "
        "Give a decoder-only model, or install a transformers that knows this one."
    )


def longest_context(config: Any) -> int | None:
    """Of the text part's configuration."""
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def text_part(model: PreTrainedModel) -> str:
    """Prefix of the module names of the text decoder; '' where the model has no other part."""
    decoder = None if model.config.get_text_config(decoder=True) is model.config else model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def check_device(name: str) -> None:
    """Raises ConfigurationError, with those that there are, where torch has no device of this name here."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if name not in available:
        raise ConfigurationError(
            f"device {name!r} is not available; torch has: {', '.join(available)}. Set device to one of them."
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of ``device`` under a seed inside, as they were afterwards; no other device is
    opened for it."""
    import torch

    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def load_causal_lm(folder: Path, options: LocalOptions) -> PreTrainedModel:
    """The frozen causal language model of a folder in evaluation mode, held as ``options`` say and loaded straight to
    its device; weights from safetensors only (never a pickle).

    Raises ConfigurationError where the folder holds no causal language model, or for a device that is not here.
    """
    import torch
    from transformers.utils import logging as bars

    check_device(options.device)
    dtype = getattr(torch, options.precision)
    held = {"dtype": dtype, "quantization_config": _quantised(options.quantisation, dtype)}
    if options.device_map or options.quantisation or options.device != "cpu":
        held["device_map"] = options.device_map or {"": options.device}
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        kind = model_class(folder)
        model: PreTrainedModel = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **held)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(too_large(folder.name)) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    for module in model.modules():
        # What bitsandbytes repacks a layer's weights for on some CPUs has no gradient; without it both ways work.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ConfigurationError(too_large(folder.name))
    model.eval()
    model.requires_grad_(False)
    return model


def too_large(name: str) -> str:
    """What to do about a model that is larger than the memory here."""
    return (
        f"{name} does not fit into the memory of the devices here, and parts that wait on the CPU or on disk cannot be "
        "trained. Use quantisation: 8bit or 4bit, a smaller dtype, or engine: thread with device_map: auto for several "
        "GPUs. A model that is larger than one machine is not a job for kind: local; kind: tinker works with any "
        "Tinker-compatible server, which shards it."
    )


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
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep activations at layer boundaries only and compute the rest again in the backward pass.

    Layers do so in training mode only, so the model's own dropout is taken out: the base is the same in both modes.
    """
    import torch

    # The name changes with transformers 6; the newer one is in 5.x already.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def is_full(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    return (folder / "config.json").is_file() and any(folder.glob(_WEIGHTS))


def save_full(out: Path, model: PreTrainedModel, tokenizer: Path) -> None:
    """Write a model folder, which transformers and vLLM load by its path, with the weights that ``model`` has now and
    the tokenizer of the folder ``tokenizer``. It appears whole and replaces an old one."""
    with whole_folder(out) as part:
        model.save_pretrained(part)
        for path in (p for pattern in _CONFIGS for p in tokenizer.glob(pattern)):
            if not (part / path.name).exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, part / path.name)


def load_full(folder: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model folder by the names, and at the places, of a model's ``own``.

    Raises ConfigurationError where it is no model folder or a model of another shape.
    """
    dtypes = {t.dtype for t in own.values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise ConfigurationError("a full fine-tune cannot take the place of quantised weights; set no quantisation.")
    dtype = str(next(iter(dtypes))).removeprefix("torch.")
    other = load_causal_lm(folder, LocalOptions.model_validate({"dtype": dtype}))
    found = {n: p.data for n, p in other.named_parameters()}
    if found.keys() != own.keys() or any(found[n].shape != own[n].shape for n in own):
        raise ConfigurationError(f"{folder.name} is a model of another shape than the base model")
    # Cloned: loaded tensors may lie at any address, and the address decides which kernel computes with them.
    return {n: found[n].to(own[n].device, own[n].dtype, copy=True) for n in own}
