"""A random two-layer model with a byte-level tokenizer, made once a session, and encoded examples for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from local_records import records
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.providers.local import worker
from daunce_api.providers.local.language import LanguageModel
from daunce_api.server import EmbeddedServer

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save_tokenizer(folder: Path) -> int:
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return len(alphabet) + len(special)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random-llama"
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> LanguageModel:
    return LanguageModel.load(model_folder)


@pytest.fixture
def wire(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """``backend`` of a config for runs over the wire."""
    monkeypatch.setenv("DAUNCE_WIRE_KEY", server.api_key)
    return {
        "kind": "openai_wire",
        "model": "daunce-tiny",
        "base_url": server.base_url,
        "api_key_env": "DAUNCE_WIRE_KEY",
    }


@pytest.fixture(scope="session")
def examples(model: LanguageModel) -> list[EncodedExample]:
    return [encode_example(e, model.tokenizer) for e in Dataset.from_records(records(24))]


@pytest.fixture
def trained_losses(monkeypatch: pytest.MonkeyPatch) -> list[list[list[float]]]:
    """What a worker's members lost at each step, batch by batch as they are trained."""
    seen: list[list[list[float]]] = []
    original = worker.fine_tune

    def spy(*given: Any, **options: Any) -> list[list[float]]:
        seen.append(original(*given, **options))
        return seen[-1]

    monkeypatch.setattr(worker, "fine_tune", spy)
    return seen
