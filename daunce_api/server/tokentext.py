"""Token ids to bytes, exactly: a token need not be whole UTF-8, and answers carry tokens, bytes and offsets."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(0x100)) - set(_PRINTABLE))
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)}
"""The bytes that characters stand for in the vocabulary of a byte-level BPE (Radford et al., 2019)."""


_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token of a SentencePiece vocabulary that is one byte."""


class TokenText:
    """Bytes and printable forms of the tokens of one tokenizer folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(path))
        description = json.loads(path.read_text(encoding="utf-8"))
        decoder = json.dumps(description.get("decoder"))
        self._byte_level, self._byte_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
        self._literal = {t["id"]: t["content"].encode() for t in description.get("added_tokens", [])}
        self._bytes: dict[int, bytes] = {}
        self._labels: dict[int, str] = {}

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; added tokens stand for their own name."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._literal.get(token) or self._decode(token)
        return known

    def _decode(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(c in _BYTES for c in piece):
            return bytes(_BYTES[c] for c in piece)
        if self._byte_fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        # Some decoders take a space off the beginning of a text: the second of two equal tokens keeps it.
        once, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :].encode()

    def label(self, token: int) -> str:
        """The token as OpenAI's completions print it: its text, or ``bytes:\\xe2\\x82`` where that is not UTF-8."""
        known = self._labels.get(token)
        if known is None:
            raw = self.token_bytes(token)
            try:
                known = raw.decode()
            except UnicodeDecodeError:
                known = "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
            self._labels[token] = known
        return known

    def text(self, ids: Sequence[int]) -> str:
        """The ids as text; what is not UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """For every token the number of whole characters before it."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        offsets, position = [], 0
        for token in ids:
            offsets.append(position)
            position += len(decoder.decode(self.token_bytes(token)))
        return offsets
