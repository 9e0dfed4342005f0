"""The tokenizer of a model that only its server knows, asked through vLLM's ``/tokenize`` and ``/detokenize``.

The server renders a chat to token ids; they are turned back into text, and the text must give the same ids again.
So the completion's span is found in the server's own rendering, by the same code as for any other tokenizer, and a
chat whose rendering cannot be written as a text is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import httpx2

from ..data.dataset import Message
from ..errors import ConfigurationError, DataError, TransientError
from .endpoint import ANONYMOUS, Endpoint
from .failures import Failures

_PROBE = "Daunce 123 äöü ✓ 漢字 \n\n\tx"
"""Its ids stand for the tokenizer in fingerprints."""


class ServerTokenizer:
    """Texts and chats as a server tokenizes them. Every new text costs a request."""

    begin = end = ""
    """Not known to a client: plain completions are measured without the token that ends them."""

    def __init__(self, endpoint: Endpoint, model: str, *, http_client: httpx2.Client | None = None) -> None:
        self.name = f"{model} at the server"
        self._model = model
        self._root = endpoint.base_url.rstrip("/").removesuffix("/v1")
        self._key = endpoint.api_key
        self._failures = Failures("the server", [endpoint.api_key] if endpoint.api_key != ANONYMOUS else [])
        self._http = http_client or httpx2.Client(timeout=60.0, trust_env=not endpoint.loopback)
        self._tokenize_text = lru_cache(maxsize=65_536)(self._ask_text)
        self._tokenize_chat = lru_cache(maxsize=65_536)(self._ask_chat)

    @property
    def fingerprint(self) -> str:
        ids = self.encode(_PROBE)
        return f"server:{self._model}:{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}"

    def encode(self, text: str) -> list[int]:
        return list(self._tokenize_text(text)[0])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Raises DataError where the server's tokens do not spell the text."""
        ids, spelled = self._tokenize_text(text)
        raw = text.encode()
        pieces = _pieces(spelled, raw)
        if pieces is None:
            raise DataError(
                f"the tokens of {self.name} do not spell the text that they stand for, so no completion can be found "
                "in it. Set backend.tokenizer to the model's folder with tokenizer.json."
            )
        # Characters by byte, and the end of the text for an empty token there.
        character = [*(i for i, c in enumerate(text) for _ in range(len(c.encode()))), len(text)]
        spans = pairwise(accumulate((len(p) for p in pieces), initial=0))
        return list(ids), [(character[a], character[b - 1] + 1 if b > a else character[a]) for a, b in spans]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._detokenize((i,)) for i in ids]

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The server's rendering of a chat as text. Raises DataError where the text does not give the same ids."""
        records = [{k: v for k, v in m.to_record().items() if k != "weight"} for m in messages]
        more: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if options:
            more["chat_template_kwargs"] = dict(options)
        ids = self._tokenize_chat(json.dumps(records), json.dumps(more), generation_prompt)
        text = self._detokenize(ids)
        if self.encode(text) != list(ids):
            raise DataError(
                "the server's rendering of the chat, written as a text, gives other tokens: its span cannot be "
                "found. Set backend.tokenizer to the model's folder with tokenizer.json."
            )
        return text

    def _ask_chat(self, records: str, more: str, generation_prompt: bool) -> tuple[int, ...]:
        body = {
            "model": self._model,
            "messages": json.loads(records),
            "add_generation_prompt": generation_prompt,
            "add_special_tokens": False,
            **json.loads(more),
        }
        return _ids(self._post("tokenize", body).get("tokens"))

    def _ask_text(self, text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False, "return_token_strs": True}
        answer = self._post("tokenize", body)
        ids, strings = _ids(answer.get("tokens")), answer.get("token_strs")
        if not isinstance(strings, list) or len(strings) != len(ids) or not all(isinstance(s, str) for s in strings):
            raise ConfigurationError(
                "the server does not spell its tokens (token_strs), so it cannot serve as a tokenizer. Set "
                "backend.tokenizer to the model's folder with tokenizer.json."
            )
        return ids, tuple(strings)

    def _detokenize(self, ids: tuple[int, ...]) -> str:
        return str(self._post("detokenize", {"model": self._model, "tokens": list(ids)}).get("prompt", ""))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            headers = {} if self._key == ANONYMOUS else {"Authorization": f"Bearer {self._key}"}
            response = self._http.post(f"{self._root}/{path}", json=body, headers=headers)
        except httpx2.TransportError as error:
            raise self._failures.unreachable(f"/{path}") from error
        if response.status_code == 404:
            raise ConfigurationError(
                f"{self._root} has no /{path} as vLLM has, so backend.tokenizer: server cannot be used there. Set "
                "it to the model's folder with tokenizer.json."
            )
        if response.status_code >= 400:
            raise self._failures.from_status(response.status_code, response, f"/{path}")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise TransientError(f"the server answered /{path} with a body that is not a JSON object.")
        return answer


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise TransientError("the server answered /tokenize without token ids.")
    return tuple(value)


def _pieces(spelled: Sequence[str], raw: bytes) -> list[bytes] | None:
    """The bytes of every token, in one of the two spellings that tokenizers use; None where they are not the text."""
    for spelling in (_byte_level, _sentence_piece):
        pieces = [spelling(s) for s in spelled]
        if all(p is not None for p in pieces):
            known = [p for p in pieces if p is not None]
            if b"".join(known) == raw:
                return known
    return None


def _byte_level(spelled: str) -> bytes | None:
    table = _byte_alphabet()
    return bytes(table[c] for c in spelled) if all(c in table for c in spelled) else None


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling: printable Latin-1 bytes as themselves, the others as characters from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _sentence_piece(spelled: str) -> bytes:
    if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
        try:
            return bytes([int(spelled[3:5], 16)])
        except ValueError:
            pass
    return spelled.replace("\u2581", " ").encode()
