"""Tokenizers in the Hugging Face folder format, read without transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigurationError, DataError
from ..example import Message
from ..literal import SpecialTokenGuard
from ..rendering import Span
from .chat_template import ChatTemplate


class LocalTokenizer:
    """A Hugging Face tokenizer folder: ``tokenizer.json``, with ``tokenizer_config.json`` and a chat template.

    ``day`` is the date that the template writes where it wants today's (:class:`.chat_template.ChatTemplate`).
    """

    def __init__(self, folder: str | Path, *, day: date | None = None) -> None:
        """Raises ConfigurationError where the folder holds no usable fast tokenizer."""
        self.folder = Path(folder)
        self.shapes: dict[Any, Any] = {}
        self.name = self.folder.name
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigurationError(
                f"{self.folder} holds no tokenizer.json. Point to a Hugging Face model folder, "
                "or save the tokenizer there with save_pretrained()."
            )
        self._raw = self._read(path)
        self._backend = self._load_backend()
        settings = self._read_json("special_tokens_map.json") | self._read_json("tokenizer_config.json")
        special = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items()}
        self._special = {k: v for k, v in special.items() if k.endswith("_token") and isinstance(v, str)}
        bos = self._special.get("bos_token", "")
        adds_bos = settings.get("add_bos_token")
        if adds_bos is None:  # then the post-processor knows
            added = self._backend.encode("", add_special_tokens=True).ids
            adds_bos = bool(bos) and self._backend.token_to_id(bos) in added[:1]
        self.begin, self.end = bos if adds_bos else "", self._special.get("eos_token", "")
        # The post-processor adds what encode() must not, and cuts white space off the offsets.
        self._backend.post_processor = None
        names = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(names)
        self._guard = SpecialTokenGuard(names.values())
        text, tools_text = self._find_templates(settings.get("chat_template"))
        self._template = ChatTemplate(text, self._special, name=self.name, day=day) if text else None
        self._tools_template = (
            ChatTemplate(tools_text, self._special, name=self.name, day=day) if tools_text else self._template
        )
        dated = [str(self._template.day)] if self._template is not None and self._template.writes_date else []
        facts = json.dumps([self.begin, self.end, text, *dated], sort_keys=True)
        # A separate template for tools is not in it: earlier versions never used one, and their runs go on.
        self.fingerprint = hashlib.sha256(self._raw.encode() + facts.encode()).hexdigest()

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}. Save the tokenizer again.") from error

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(self._read(path))
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{path} is not JSON: {error}. Save the tokenizer again.") from error
        return content if isinstance(content, dict) else {}

    def _load_backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(self._raw)
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(
                f"{self.folder / 'tokenizer.json'} is not a tokenizer: {error}. Save the tokenizer again."
            ) from error
        # A length limit in the file would cut texts in silence.
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _find_templates(self, setting: Any) -> tuple[str, str]:
        """The folder's template, and the one for chats with tools where that is another."""
        named: dict[Any, Any] = {"default": setting} if isinstance(setting, str) else {}
        if isinstance(setting, list):
            named = {t.get("name"): t.get("template") for t in setting if isinstance(t, dict)}
        own, tools = self.folder / "chat_template.jinja", self.folder / "additional_chat_templates" / "tool_use.jinja"
        if own.is_file():
            named["default"] = self._read(own)
        if tools.is_file():
            named["tool_use"] = self._read(tools)
        default, tool_use = named.get("default"), named.get("tool_use")
        return default if isinstance(default, str) else "", tool_use if isinstance(tool_use, str) else ""

    @cached_property
    def _literal(self) -> Any:
        """The same tokenizer, blind to special tokens."""
        backend = self._load_backend()
        backend.post_processor = None
        backend.encode_special_tokens = True
        return backend

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens written in it are recognised, except in contents that :meth:`render` put
        there."""
        if self._guard.touches(text):
            return self.encode_with_offsets(text)[0]
        return list(_run(self._backend, text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = _run(self._backend, text)
        if not self._guard.touches(text):
            return encoding.ids, encoding.offsets
        ids: list[int] = []
        offsets: list[Span] = []
        done = 0  # everything before this character is encoded
        for token, (start, stop) in [*zip(encoding.ids, encoding.offsets, strict=True), (None, (len(text),) * 2)]:
            if token is not None and token not in self._special_ids:
                continue
            if done < start:
                plain, origin = self._guard.remove(text[done:start])
                inner = _run(self._literal, plain)
                if not self._special_ids.isdisjoint(inner.ids):
                    raise DataError(
                        f"the text spells a special token of {self.name} that this tokenizer cannot write as ordinary "
                        "characters. Change that text."
                    )
                ids += inner.ids
                for a, b in inner.offsets:
                    first = done + origin[a]
                    offsets.append((first, done + origin[b - 1] + 1 if b > a else first))
            if token is not None:
                ids.append(token)
                offsets.append((start, stop))
            done = stop
        return ids, offsets

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._backend.decode([i], skip_special_tokens=False) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat through the model's template, special tokens in every text of the user's guarded (:mod:`.literal`).

        Raises ConfigurationError where there is no template or it does not work, DataError where it refuses the
        messages.
        """
        called = tools or any(m.calls or m.role in ("tool", "function") for m in messages)
        template = self._tools_template if called else self._template
        if template is None:
            raise ConfigurationError(
                f"{self.name} has no chat template. Use prompt/completion records, or add chat_template.jinja to it."
            )
        texts: list[str] = []

        def protect(text: str) -> str:
            texts.append(text)
            return self._guard.protect(text)

        whole = template.render(
            messages, generation_prompt=generation_prompt, tools=tools, options=options, protect=protect
        )
        self._guard.refuse_halves(texts)
        return whole


def _run(backend: Any, text: str) -> Any:
    try:
        return backend.encode(text, add_special_tokens=False)
    except TypeError as error:
        raise DataError("a text holds half of a surrogate pair, which UTF-8 cannot carry. Remove it.") from error
