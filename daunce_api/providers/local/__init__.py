"""The local PyTorch backend: LoRA members of language models, and members of any classifier, trained many at a time.

Everything here needs the ``local`` extra; importing the package without it raises MissingExtraError.
"""

from __future__ import annotations

from importlib.util import find_spec

from ...errors import MissingExtraError

for _module in ("torch", "transformers", "peft", "safetensors"):
    if find_spec(_module) is None:
        raise MissingExtraError(f"the local PyTorch backend ({_module} is not installed)", "local")
