"""Tokens as pieces of the text that a reader sees.

The page carries every text once; its tokens are lengths over that text. What a template writes around a completion (an
end mark, say) is a token too and is put before or after. A character that is split over several tokens has no piece of
its own in any of them: those tokens become one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the tokens of one example spell its text.

    Attributes:
        starts: index of the first token of each unit; a unit is what has a colour of its own.
        lengths: of each unit in UTF-16 code units, which is how JavaScript counts.
        before, after: what the tokens hold around the text.
        instead: the text that the tokens spell, where they do not spell the example's own; else None.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    before: str = ""
    after: str = ""
    instead: str | None = None


def spell(pieces: Sequence[str], text: str) -> Spelling:
    """Fit tokens to the text of an example.

    Args:
        pieces: the tokens as printable strings.
        text: the completion.

    Returns:
        Spelling; its units, one after the other, are ``before + text + after``, or ``instead``.
    """
    if any(_BROKEN in piece for piece in pieces):
        whole = _mended(pieces, text)
        if whole is not None:
            starts, units = whole
            return _placed(starts, units, text)
    return _placed(range(len(pieces)), pieces, text)


def _placed(starts: Sequence[int], units: Sequence[str], text: str) -> Spelling:
    joined = "".join(units)
    lengths = tuple(len(unit.encode("utf-16-le", "surrogatepass")) // 2 for unit in units)
    at = joined.find(text)
    if at < 0 or not text:
        return Spelling(tuple(starts), lengths, instead=joined)
    return Spelling(tuple(starts), lengths, joined[:at], joined[at + len(text) :])


def _mended(pieces: Sequence[str], text: str) -> tuple[list[int], list[str]] | None:
    """Units in which no character is split, by walking along the text; None where the tokens do not follow it."""
    starts: list[int] = []
    units: list[str] = []
    place = t = 0
    while t < len(pieces):
        starts.append(t)
        if _BROKEN not in pieces[t]:
            if place < len(text) and not text.startswith(pieces[t], place):
                return None
            units.append(pieces[t])
            place += len(pieces[t])
            t += 1
            continue
        end = t
        while end < len(pieces) and _BROKEN in pieces[end]:
            end += 1
        # Every character that is split shows as at least one mark, so a run covers at most as many characters.
        most = place + sum(map(len, pieces[t:end]))
        after = -1 if end == len(pieces) else text.find(pieces[end], place + 1, most + len(pieces[end]))
        stop = len(text) if after < 0 else after
        if not place < stop <= most:
            return None
        units.append(text[place:stop])
        place, t = stop, end
    return starts, units
