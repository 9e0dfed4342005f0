"""The tokenizer of a config's model, where the kind of backend does not know better."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..config import RunConfig
from ..data.tokenizers import LocalTokenizer, TiktokenTokenizer, Tokenizer, tiktoken_encoding_name
from ..errors import ConfigurationError

EMBEDDED_MODEL = "daunce-tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def embedded_folder() -> Path:
    """Where the model that ships with the package lies."""
    return Path(str(files("daunce_api") / "server" / "model"))


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """``backend.tokenizer`` (a folder with tokenizer.json, a Hugging Face model id or an OpenAI model's name), else
    what the model's name says.

    Raises ConfigurationError where neither is known.
    """
    name, day = config.backend.tokenizer or config.backend.model, config.backend.template_date
    if name == EMBEDDED_MODEL:
        return LocalTokenizer(embedded_folder(), day=day)
    if (Path(name).expanduser() / "tokenizer.json").is_file():
        return LocalTokenizer(Path(name).expanduser(), day=day)
    if tiktoken_encoding_name(name) is not None:
        return TiktokenTokenizer(name, day=day)
    if _HUB_ID.fullmatch(name):
        return LocalTokenizer(_of_hub(name), day=day)
    if config.backend.tokenizer is not None:
        raise ConfigurationError(
            f"backend.tokenizer {name!r} is no folder with tokenizer.json, no Hugging Face model id (owner/name), and "
            "no OpenAI model whose encoding is known."
        )
    raise ConfigurationError(
        f"the tokenizer of model {name!r} is not known. Set backend.tokenizer to the model's folder with "
        "tokenizer.json (save_pretrained() of its tokenizer writes one), or, for a model of OpenAI, to the name of "
        "one with the same tokenizer."
    )


def hub_folder(name: str, patterns: Sequence[str], what: str, advice: str) -> Path:
    """The folder with some files of a model on the Hugging Face Hub: the local cache's, or downloaded.

    Raises ConfigurationError where ``what`` of the model is in neither, with ``advice``.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = "HF_HUB_OFFLINE forbids it" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise ConfigurationError(
            f"{what} {name} is not in the cache of Hugging Face models ({constants.HF_HUB_CACHE}) and could not be "
            f"downloaded ({why}). {advice}"
        ) from error


def _of_hub(name: str) -> Path:
    """The folder with the tokenizer of a model on the Hub (a few MB)."""
    name = name.removesuffix("-Reference")  # Together names some of its copies so
    folder = hub_folder(
        name,
        ["tokenizer*.json", "special_tokens_map.json", "*.jinja", "additional_chat_templates/*"],
        "the tokenizer of",
        f"Run `hf download {name} --include 'tokenizer*' '*.jinja'` where there is a network (a gated model needs "
        "`hf auth login`), or set backend.tokenizer to a folder with tokenizer.json.",
    )
    if not (folder / "tokenizer.json").is_file():
        raise ConfigurationError(
            f"the model {name} on the Hugging Face Hub has no tokenizer.json. Save its tokenizer with "
            "save_pretrained() and set backend.tokenizer to that folder."
        )
    return folder


def chat_template(folder: str | None) -> str | None:
    """The chat template of a model folder, as it is written there; None where there is no folder or no template."""
    if folder is None or not Path(folder).is_dir():
        return None
    own, settings = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    try:
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError):
        return None
    return template if isinstance(template, str) else None
