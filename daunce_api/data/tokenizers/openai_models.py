"""tiktoken's encodings for OpenAI models: exact where the rank files are available, a stated estimate otherwise."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from ...errors import ConfigurationError, DataError
from ..example import Example, Message, canonical
from ..literal import SpecialTokenGuard
from ..rendering import Span
from .chat_template import DEFAULT_DATE
from .harmony import harmony

# Longest prefix wins. tiktoken's own table maps ``ft:gpt-4.1-mini`` to cl100k_base, which is wrong.
_ENCODINGS = {
    "gpt-5": "o200k_base",
    "gpt-4.1": "o200k_base",
    "gpt-4.5": "o200k_base",
    "gpt-4o": "o200k_base",
    "chatgpt-4o": "o200k_base",
    "o1": "o200k_base",
    "o3": "o200k_base",
    "o4": "o200k_base",
    "gpt-oss": "o200k_harmony",
    "gpt-4": "cl100k_base",
    "gpt-3.5": "cl100k_base",
    "babbage-002": "cl100k_base",
    "davinci-002": "cl100k_base",
}

LOAD_SECONDS = 20.0
"""How long a download of a rank file may take; a proxy that swallows requests must not hold up a plan."""

HARMONY = "o200k_harmony"

_PIECE = 100_000


def tiktoken_encoding_name(model: str) -> str | None:
    """tiktoken encoding of an OpenAI model or of a fine-tune of one (``ft:BASE:org:suffix:id``), or the encoding's
    own name; None if unknown."""
    base = model.removeprefix("ft:").split(":")[0].removeprefix("openai/")
    if base in _ENCODINGS.values():
        return base
    matches = [prefix for prefix in _ENCODINGS if base.startswith(prefix)]
    return _ENCODINGS[max(matches, key=len)] if matches else None


class TiktokenTokenizer:
    """tiktoken's encodings, for counting and for finding one-token completions of OpenAI models.

    Where the rank file can be neither found (``TIKTOKEN_CACHE_DIR``) nor downloaded, ``exact`` is False: counts take
    a token to be four bytes of UTF-8 (good enough for a price, to be said wherever a figure rests on it), and
    encoding is refused, because made-up ids would pass for real ones.

    Chats are rendered for gpt-oss only, in the harmony format with the date ``day``: other templates of OpenAI are not
    public.
    """

    BYTES_PER_TOKEN = 4
    begin = end = ""

    def __init__(self, model: str, *, day: date | None = None) -> None:
        """Raises ConfigurationError where the model's encoding is not known."""
        encoding = tiktoken_encoding_name(model)
        if encoding is None:
            raise ConfigurationError(
                f"the tokenizer of {model!r} is not known. Set backend.tokenizer to an OpenAI model that shares it, "
                "to a tiktoken encoding (o200k_base, ...), or to a folder with tokenizer.json."
            )
        self.name = encoding
        self._encoding = _load(encoding)
        self.exact = self._encoding is not None
        self._day = day or DEFAULT_DATE
        dated = f"{encoding} {self._day}" if encoding == HARMONY else encoding
        self.fingerprint = dated if self.exact else f"estimate:{dated}"
        self.shapes: dict[Any, Any] | None = None
        special = self._encoding.special_tokens_set if self.name == HARMONY and self._encoding is not None else ()
        self._guard = SpecialTokenGuard(special)
        self._special = frozenset(special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens spelled in it are ordinary characters.

        Raises ConfigurationError where only estimates can be given (``exact`` is False), DataError where tiktoken
        gives up on the text.
        """
        ranks, text = self._ranks(), _utf8(text)
        try:
            if self.name == HARMONY:
                return [i for part in self._parts(text) for i in part[0]]
            return list(ranks.encode(text, disallowed_special=()))
        except ValueError as error:
            raise DataError(
                f"a text of {len(text):,} characters is more than tiktoken can split (a long run of white space?). "
                "Shorten it."
            ) from error

    def _parts(self, text: str) -> Iterator[tuple[list[int], str, Sequence[int]]]:
        """A text in harmony as ids, with their text and its places: special tokens of the format, and what stands
        between them, where what spells one is ordinary."""
        ranks = self._ranks()
        pattern = "|".join(re.escape(t) for t in sorted(self._special, key=len, reverse=True))
        done = 0
        for found in [*re.finditer(pattern, text), None]:
            stop = len(text) if found is None else found.start()
            if done < stop:
                plain, origin = self._guard.remove(text[done:stop])
                yield list(ranks.encode(plain, disallowed_special=())), plain, [done + i for i in origin]
            if found is not None:
                yield [ranks.encode_single_token(found[0])], found[0], range(found.start(), found.end() + 1)
                done = found.end()

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        if self.name == HARMONY:
            return self._harmony_offsets(text)
        return self._offsets(text, self.encode(text))

    def _harmony_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        offsets: list[Span] = []
        for part, plain, origin in self._parts(_utf8(text)):
            ids += part
            offsets += [(origin[a], origin[b - 1] + 1) for a, b in self._offsets(plain, part)[1]]
        return ids, offsets

    def _offsets(self, text: str, ids: list[int]) -> tuple[list[int], list[Span]]:
        lengths = [len(token) for token in self._ranks().decode_tokens_bytes(ids)]
        if text.isascii():
            return ids, list(pairwise(accumulate(lengths, initial=0)))
        character = [i for i, c in enumerate(text) for _ in range(len(c.encode()))]
        bytes_of = pairwise(accumulate(lengths, initial=0))
        return ids, [(character[a], character[b - 1] + 1) for a, b in bytes_of]

    def _ranks(self) -> Any:
        if self._encoding is None:
            raise ConfigurationError(
                f"the rank file of {self.name} is not here and could not be downloaded, so no token ids can be given. "
                "Connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds it."
            )
        return self._encoding

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._ranks().decode([i]) for i in ids]

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        return [bytes(token) for token in self._ranks().decode_tokens_bytes(list(ids))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self._ranks().decode(list(ids)))

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat in the harmony format for gpt-oss; raises ConfigurationError for OpenAI's other models."""
        if self.name != HARMONY:
            raise ConfigurationError(
                f"OpenAI does not publish the chat template behind {self.name}, so a chat cannot be rendered to token "
                "ids. Score through a chat endpoint, or use a model whose template is public."
            )
        self._ranks()
        effort = str((options or {}).get("reasoning_effort") or "medium")
        return harmony(
            messages,
            day=self._day,
            generation_prompt=generation_prompt,
            tools=tools,
            effort=effort,
            protect=self._guard.protect,
        )

    def count_text(self, text: str) -> int:
        """Tokens of a text; an estimate where ``exact`` is False. Texts beyond 100,000 characters are counted in
        pieces, which adds at most one token a piece."""
        if self._encoding is None:
            return -(-len(_utf8(text).encode()) // self.BYTES_PER_TOKEN)
        return sum(len(self.encode(text[i : i + _PIECE])) for i in range(0, len(text), _PIECE))

    def count(self, example: Example) -> int:
        """Tokens that training on the example bills for an epoch: contents, plus OpenAI's published overhead of
        three tokens a message and three for the reply."""
        if not example.is_chat:
            return self.count_text(example.prompt + example.completion)
        more = self.count_text(canonical(dict(example.fields))) if example.fields else 0
        return 3 + more + sum(3 + self.count_text(m.role) + self._count_message(m) for m in example.messages)

    def _count_message(self, message: Message) -> int:
        fields = {k: v for k, v in message.fields.items() if k != "content"}
        return sum(map(self.count_text, message.texts)) + (self.count_text(canonical(fields)) if fields else 0)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("a text holds half of a surrogate pair, which UTF-8 cannot carry. Remove it.") from error
    return text


@lru_cache(maxsize=4)
def _load(encoding: str) -> Any | None:
    import tiktoken

    found: list[Any] = []

    def load() -> None:
        # A download fails in any way that requests, proxies and file systems know.
        with contextlib.suppress(Exception):
            found.append(tiktoken.get_encoding(encoding))

    # A daemon thread: the request behind it has no time limit of its own.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(LOAD_SECONDS)
    return found[0] if found else None
