"""The tokenizer of a config's model, where the kind of backend does not know better."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..config import RunConfig
from ..errors import ConfigurationError
from ..tokens import LocalTokenizer, TiktokenTokenizer, Tokenizer, tiktoken_encoding_name

EMBEDDED_MODEL = "daunce-tiny"


def embedded_folder() -> Path:
    """Where the model that ships with the package lies."""
    return Path(str(files("daunce_api") / "embedded" / "model"))


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """``backend.tokenizer`` (a folder with tokenizer.json, or an OpenAI model's name), else what the model's name says.

    Raises ConfigurationError where neither is known.
    """
    name = config.backend.tokenizer or config.backend.model
    if name == EMBEDDED_MODEL:
        return LocalTokenizer(embedded_folder())
    if (Path(name) / "tokenizer.json").is_file():
        return LocalTokenizer(name)
    if tiktoken_encoding_name(name) is not None:
        return TiktokenTokenizer(name)
    if config.backend.tokenizer is not None:
        raise ConfigurationError(
            f"backend.tokenizer {name!r} is neither a folder with tokenizer.json nor an OpenAI model whose encoding "
            "is known."
        )
    raise ConfigurationError(
        f"the tokenizer of model {name!r} is not known. Set backend.tokenizer to the model's folder with "
        "tokenizer.json (save_pretrained() of its tokenizer writes one)."
    )
