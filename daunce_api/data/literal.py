"""Keeping special tokens that a content merely spells apart from those that a chat template writes.

A template and the contents in it become one string before anything is encoded. So that ``<|end|>`` in a content
does not end the turn, a mark is set behind its first character before rendering; the tokenizer then no longer finds
the special token, and the mark is taken out again where the characters are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import DataError

MARK = "\ufdd0"
"""A Unicode noncharacter, reserved for internal use by a program. Contents that hold it come through unchanged."""


class SpecialTokenGuard:
    """Sets and removes marks for one list of special tokens.

    A place is marked by one more ``MARK`` than stood there, wherever a special token begins when marks are
    overlooked. Setting marks does not change that set of places, so removing one from each undoes it exactly.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        ordered = sorted({t for t in tokens if t}, key=len, reverse=True)
        self._single = [t for t in ordered if len(t) == 1]
        places = [
            re.escape(t[0]) + f"{MARK}*(?=" + f"{MARK}*".join(re.escape(c) for c in t[1:]) + ")"
            for t in ordered
            if len(t) > 1
        ]
        self._place = re.compile("|".join(places)) if places else None
        self._starts: dict[str, set[str]] = {}  # by the second half of a special token, its first halves
        for token in ordered:
            for cut in range(1, len(token)):
                self._starts.setdefault(token[cut:], set()).add(token[:cut])
        self._longest = max((len(t) for t in ordered), default=0)

    def touches(self, text: str) -> bool:
        """Whether a text may hold marks."""
        return MARK in text

    def protect(self, content: str) -> str:
        """The content with a mark inside everything that spells a special token.

        Raises DataError for special tokens of one character, which have no inside.
        """
        for token in self._single:
            if token in content:
                raise DataError(f"a content holds {token!r}, which alone is a special token. Remove it.")
        return content if self._place is None else self._place.sub(lambda m: m[0] + MARK, content)

    def refuse_halves(self, texts: Iterable[str]) -> None:
        """Raises DataError where one text ends with the first half of a special token and another one begins with the
        second: a template that writes them side by side would make it whole."""
        kept = [t for t in dict.fromkeys(texts) if t]
        firsts: set[str] = set()
        for text in kept:
            for n in range(1, min(self._longest, len(text) + 1)):
                firsts |= self._starts.get(text[:n], set())
        for first in firsts:
            if any(text.endswith(first) for text in kept):
                raise DataError(
                    f"one text ends with {first!r} and another one begins with the rest of a special token, which they "
                    "could become together. Change one of them."
                )

    def remove(self, text: str) -> tuple[str, list[int]]:
        """The text without the marks that :meth:`protect` set, and where in ``text`` each of its characters was."""
        places = () if self._place is None else self._place.finditer(text)
        marks = {m.end() - 1 for m in places if m[0].endswith(MARK)}
        origin = [i for i in range(len(text)) if i not in marks]
        return "".join(text[i] for i in origin), [*origin, len(text)]
