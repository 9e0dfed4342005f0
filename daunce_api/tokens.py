"""Tokenizers, and the one place that decides which tokens of an example carry its loss.

The ids and the boundary are fixed once per example and used for training, for every member's scoring and for
counting. A prompt and its completion are encoded together, because encoding them apart and joining the ids gives
other tokens (``"def f" + "oo"``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from .dataset import Example, LossOn, Message
from .errors import ConfigurationError, DataError


class Tokenizer(Protocol):
    """Text to token ids, for one model family."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, none are added."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One printable string a token, for display only."""
        ...

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """A chat as the text that the model sees."""
        ...

    @property
    def end(self) -> str:
        """The text that ends a plain completion ('' where the model family has none)."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as token ids.

    ``targets`` are the positions (>= 1, ascending) whose log-probability given all ids before them is measured:
    the completion tokens. ``boundary_moved`` says that the tokenizer merged the end of the prompt with the start of
    the completion, so that the merged token counts as completion.
    """

    example: Example
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    boundary_moved: bool = False

    @property
    def key(self) -> str:
        """SHA-256 of ids and targets: equal keys are scored once."""
        return hashlib.sha256(json.dumps([self.ids, self.targets]).encode()).hexdigest()


def encode_example(example: Example, tokenizer: Tokenizer, loss_on: LossOn = "last") -> EncodedExample:
    """Token ids and completion positions of one example.

    The whole text is encoded at once. A span's first token is the first one at which the encoding of the text
    before the span and the encoding of the whole part ways; so a token that covers both prompt and completion
    belongs to the completion.

    Raises DataError where the chat template does not extend its own prefix, or where nothing is left to measure.
    """
    if example.is_chat:
        whole = tokenizer.render(example.messages)
        spans = [_turn_span(example, turn, whole, tokenizer) for turn in example.trained_turns(loss_on)]
    else:
        whole = example.prompt + example.completion + tokenizer.end
        spans = [(example.prompt, whole)]
    ids = tokenizer.encode(whole)
    targets: set[int] = set()
    moved = False
    for before, through in spans:
        start, start_moved = _boundary(tokenizer.encode(before), ids)
        # The end of a span needs no healing: a token that runs past it started inside it.
        stop = len(ids) if through == whole else len(tokenizer.encode(through))
        targets.update(range(max(start, 1), min(stop, len(ids))))
        moved = moved or start_moved
    if not targets:
        raise DataError(f"example {example.id!r} has no completion token that a model could predict")
    return EncodedExample(example, tuple(ids), tuple(sorted(targets)), moved)


def _turn_span(example: Example, turn: int, whole: str, tokenizer: Tokenizer) -> tuple[str, str]:
    before = tokenizer.render(example.messages[:turn], generation_prompt=True)
    through = tokenizer.render(example.messages[: turn + 1])
    if not (whole.startswith(through) and through.startswith(before)):
        raise DataError(
            f"example {example.id!r}: the chat template of {tokenizer.name} rewrites earlier turns, so the tokens of "
            f"messages[{turn}] cannot be found in the whole. Use loss_on: last, or prompt/completion records."
        )
    return before, through


def _boundary(prefix: Sequence[int], ids: Sequence[int]) -> tuple[int, bool]:
    for position, (a, b) in enumerate(zip(prefix, ids, strict=False)):
        if a != b:
            return position, True
    return len(prefix), False


class LocalTokenizer:
    """A Hugging Face tokenizer folder (``tokenizer.json`` and ``tokenizer_config.json``), without transformers."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigurationError where the folder holds no fast tokenizer."""
        from tokenizers import Tokenizer as Backend

        self.folder = Path(folder)
        self.name = self.folder.name
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigurationError(
                f"{self.folder} holds no tokenizer.json. Point to a Hugging Face model folder, "
                "or save the tokenizer there with save_pretrained()."
            )
        raw = path.read_bytes()
        self._backend = Backend.from_str(raw.decode())
        settings_path = self.folder / "tokenizer_config.json"
        settings = json.loads(settings_path.read_text()) if settings_path.is_file() else {}
        template_path = self.folder / "chat_template.jinja"
        self._template: str | None = (
            template_path.read_text() if template_path.is_file() else settings.get("chat_template")
        )
        self._special = {
            k: v["content"] if isinstance(v, dict) else v
            for k, v in settings.items()
            if k in ("bos_token", "eos_token") and v
        }
        self._fingerprint = hashlib.sha256(raw + (self._template or "").encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def end(self) -> str:
        return str(self._special.get("eos_token", ""))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._backend.decode([i], skip_special_tokens=False) for i in ids]

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        if not self._template:
            raise ConfigurationError(
                f"{self.name} has no chat template. Use prompt/completion records, or add chat_template.jinja to it."
            )
        records = [{"role": m.role, "content": m.content} for m in messages]
        rendered: str = _compile(self._template).render(
            messages=records, add_generation_prompt=generation_prompt, **self._special
        )
        return rendered


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise DataError(f"the chat template refuses the messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


# Longest prefix wins. tiktoken's own table maps ``ft:gpt-4.1-mini`` to cl100k_base, which is wrong.
_TIKTOKEN_ENCODINGS = {
    "gpt-5": "o200k_base",
    "gpt-4.1": "o200k_base",
    "gpt-4o": "o200k_base",
    "o1": "o200k_base",
    "o3": "o200k_base",
    "o4": "o200k_base",
    "gpt-oss": "o200k_harmony",
    "gpt-4": "cl100k_base",
    "gpt-3.5": "cl100k_base",
    "babbage-002": "cl100k_base",
    "davinci-002": "cl100k_base",
}


def tiktoken_encoding_name(model: str) -> str | None:
    """tiktoken encoding of an OpenAI model or of a fine-tune of one (``ft:BASE:org:suffix:id``); None if unknown."""
    base = model.removeprefix("ft:").split(":")[0]
    matches = [prefix for prefix in _TIKTOKEN_ENCODINGS if base.startswith(prefix)]
    return _TIKTOKEN_ENCODINGS[max(matches, key=len)] if matches else None


class TiktokenTokenizer:
    """tiktoken's encodings, for counting and for finding one-token completions of OpenAI models.

    Where the rank file can be neither found (``TIKTOKEN_CACHE_DIR``) nor downloaded, ``exact`` is False and a token
    is taken to be four bytes of UTF-8: good enough for a price, and said wherever a figure rests on it.
    """

    BYTES_PER_TOKEN = 4

    def __init__(self, model: str) -> None:
        """Raises ConfigurationError where the model's encoding is not known."""
        encoding = tiktoken_encoding_name(model)
        if encoding is None:
            raise ConfigurationError(
                f"the tokenizer of {model!r} is not known. Set backend.tokenizer to a tiktoken encoding's model name "
                "or to a folder with tokenizer.json."
            )
        self.name = encoding
        self._encoding = _load_tiktoken(encoding)
        self.exact = self._encoding is not None

    @property
    def fingerprint(self) -> str:
        return self.name if self.exact else f"estimate:{self.name}"

    @property
    def end(self) -> str:
        return ""

    def encode(self, text: str) -> list[int]:
        if self._encoding is None:
            return [0] * -(-len(text.encode()) // self.BYTES_PER_TOKEN)
        return list(self._encoding.encode(text, disallowed_special=()))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        if self._encoding is None:
            return [""] * len(ids)
        return [self._encoding.decode([i]) for i in ids]

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        raise ConfigurationError(
            f"OpenAI does not publish the chat template behind {self.name}, so a chat cannot be rendered to token ids. "
            "Score through a chat endpoint, or use a model whose template is public."
        )

    def count(self, example: Example) -> int:
        """Tokens that training on the example bills for an epoch: contents, plus OpenAI's published overhead of
        three tokens a message and three for the reply."""
        if not example.is_chat:
            return len(self.encode(example.prompt + example.completion))
        return 3 + sum(3 + len(self.encode(m.role)) + len(self.encode(m.content)) for m in example.messages)


@lru_cache(maxsize=4)
def _load_tiktoken(encoding: str) -> Any | None:
    import tiktoken

    try:
        return tiktoken.get_encoding(encoding)
    except Exception:  # the download can fail in any way that requests, proxies and file systems know
        return None
