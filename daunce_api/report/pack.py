"""Data and code inside one HTML file: compressed blocks, and a content-security policy of hashes.

Compressed bytes stand in the page as base64, which has no ``<``: whatever the texts contain, they cannot end their
block. The browser inflates them (DecompressionStream, in every browser since 2023).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES: dict[str, np.dtype[Any]] = {
    "f": np.dtype("<f4"),
    "i": np.dtype("<i4"),
    "h": np.dtype("<u2"),
    "b": np.dtype("i1"),
}


def deflate(content: bytes) -> str:
    """Gzip (no time stamp, so that the same content gives the same page) in base64."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def source_hash(text: str) -> str:
    """The content-security-policy source that allows exactly this inline script or style."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") + "'"


def policy(scripts: Iterable[str], styles: Iterable[str]) -> str:
    """A policy under which nothing is fetched and only the given inline scripts and styles count."""
    return "; ".join(
        [
            "default-src 'none'",
            "script-src " + " ".join(map(source_hash, scripts)),
            "style-src " + " ".join(map(source_hash, styles)),
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


@dataclass
class Arrays:
    """Numbers for the page, as one block of little-endian bytes with a directory."""

    directory: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, name: str, array: NDArray[Any], kind: str) -> None:
        """``kind``: f float32, i int32, h uint16, b int8."""
        content = np.ascontiguousarray(array, dtype=_TYPES[kind]).tobytes()
        content += bytes(-len(content) % 4)
        self.directory[name] = {"kind": kind, "at": self.size, "count": int(np.size(array)), "shape": list(array.shape)}
        self.parts.append(content)
        self.size += len(content)

    def block(self) -> str:
        return deflate(b"".join(self.parts))


def json_block(content: Mapping[str, Any]) -> str:
    """Plain data as compressed JSON; half a surrogate pair, which UTF-8 cannot carry, shows as a replacement mark."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return deflate(text.encode("utf-8", "surrogatepass"))


def fitting_block(content: Mapping[str, Any], columns: Sequence[list[str]], characters: int) -> tuple[str, int | None]:
    """``json_block`` of at most ``characters``; where it would be longer, the texts in ``columns`` are cut until it is
    not. Scripts differ in how well they compress, so this is found by trying.

    Returns:
        the block, and the bound that texts were cut to (None where they were not).
    """
    whole = [list(column) for column in columns]
    limit = sum(len(text) for column in whole for text in column)
    bound = None
    while len(block := json_block(content)) > characters and limit > 1:
        limit = int(limit * min(0.9, 0.95 * characters / len(block)))
        for column, texts in zip(columns, whole, strict=True):
            column[:] = texts
        bound = fit_texts(columns, limit)
    return block, bound


def fit_texts(columns: Sequence[list[str]], limit: int) -> int | None:
    """Cut texts in place so that all of them together keep within ``limit`` characters.

    Short texts stay whole: one bound is found for all, and what is longer is cut there with a mark.

    Returns:
        the bound in characters, or None where nothing was cut.
    """
    lengths = np.sort(np.array([len(t) for column in columns for t in column], dtype=np.int64))
    if lengths.sum() <= limit:
        return None
    # With the bound at lengths[n], all shorter texts count in full and the rest count the bound.
    shorter = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    rest = lengths.size - np.arange(lengths.size)
    fits = np.flatnonzero(shorter + lengths * rest <= limit)
    n = int(fits[-1]) + 1 if fits.size else 0
    bound = max(int((limit - shorter[n]) // rest[n]), 1)
    for column in columns:
        for i, text in enumerate(column):
            if len(text) > bound:
                column[i] = text[:bound] + f" … [+{len(text) - bound:,} characters]"
    return bound
