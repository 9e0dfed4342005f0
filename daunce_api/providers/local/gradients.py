"""Gradients of the open base model: which examples pull its weights the same way, before anything is fine-tuned.

One backward pass an example. The gradient of every linear layer, out x in, is projected to 8 x 8 by two fixed random
matrices; an example's feature is all of these in a row, and two examples are compared by the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigurationError

if TYPE_CHECKING:
    from ...data.dataset import Example

_SIDE = 8
_MOST_TOKENS = 512


def gradient_cosine(model: str | Path, train: Sequence[Example], test: Sequence[Example]) -> NDArray[np.float64]:
    """(N, M) cosines of the examples' gradients under the base model in the folder ``model``.

    Raises:
        MissingExtraError: the extra `local` is not installed.
        ConfigurationError: the folder holds no language model with a chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(model).is_dir():
        raise ConfigurationError(f"attribution.prior_model: {model} is no folder with a model's weights.")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"attribution.prior_model: {model} cannot be read as a language model.") from error
    network.eval()
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    generator = torch.Generator().manual_seed(0)
    sides = [[torch.randn(_SIDE, n, generator=generator) for n in layer.weight.shape] for layer in layers]
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for layer in layers:
        layer.weight.requires_grad_(True)

    def feature(example: Example) -> NDArray[np.float64]:
        ids, start = _token_ids(tokenizer, example)
        logits = network(torch.tensor([ids])).logits[0, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers], allow_unused=True)
        parts = [
            (left @ g @ right.T).flatten() for (left, right), g in zip(sides, gradients, strict=True) if g is not None
        ]
        found = torch.cat(parts).double().numpy()
        return np.asarray(found / max(float(np.linalg.norm(found)), 1e-300))

    rows, columns = (np.stack([feature(e) for e in examples]) for examples in (train, test))
    return np.asarray(rows @ columns.T)


def _token_ids(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Ids of prompt and answer, and where the answer starts."""
    sides = ("user", example.prompt_text()), ("assistant", example.completion_text())
    messages = [{"role": role, "content": text} for role, text in sides]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"][:_MOST_TOKENS]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return list(ids), min(max(start, 1), len(ids) - 1)
