"""Small real tokenizers of several families, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import daunce_api.data.tokenizers

GetTokenizer = Callable[[str], daunce_api.data.tokenizers.Tokenizer]
EMBEDDED = Path(str(files("daunce_api") / "server" / "model"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the answer to the question is that the sum of two numbers is a number",
    "def foo(bar): return bar + 1  # a function\n\tprint(foo(2))",
    "Straße, naïve café, żółw, 日本語の文章, 😀👍🏽",
    "  two  spaces,   three ; user assistant system start end im",
]


def tiktoken_files() -> Path | None:
    """The folder of tiktoken's rank files inside a package that ships them, or None."""
    spec = find_spec("llama_index")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "core" / "_static" / "tiktoken_cache"
        if (folder / "fb374d419588a4632f3f557e76b4b70aebbca790").is_file():
            return folder
    return None


def write_folder(folder: Path, tokenizer: Tokenizer, *, template: str | None = None, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level(special: list[str], *, normalizer: Any = None, vocabulary: int = 400) -> Tokenizer:
    """GPT-2's kind: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def chatml(folder: Path) -> Path:
    """Byte-level BPE without a split into words, so that merges cross every boundary, and ChatML's template."""
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC(), vocabulary=600)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return write_folder(folder, tokenizer, template=CHATML, eos_token="<|im_end|>")


def llama_like(folder: Path) -> Path:
    """Llama 2's kind: BPE over characters with byte fallback, a visible space, a BOS that the tokenizer adds; and
    a length limit left in the file."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    description = json.loads(tokenizer.to_str())
    # Bytes are vocabulary, not special tokens.
    description["added_tokens"] = [t for t in description["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(max_length=8)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return write_folder(
        folder, tokenizer, chat_template=template, bos_token={"content": "<s>"}, eos_token="</s>", unk_token="<unk>"
    )
