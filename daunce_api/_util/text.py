"""Text for people.

Untrusted text (training examples, file names, answers of servers) is made harmless for where it goes.
Training text can hold terminal escape sequences, right-to-left overrides, rich markup or spreadsheet formulas. What
is shown keeps every character that is one; the others are written as Python escapes.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

_JOINERS = "\u200c\u200d"
"""Format characters that Persian, Indic scripts and emoji are spelled with; they hide nothing."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that are never printed as they are: control, format, surrogate, private use, unassigned, and
the separators that break lines."""
_ELLIPSIS = "…"
_SHOWN = 3
"""Sentences of one kind that are listed one by one."""
_STACK = 8
"""Characters a column at most: accents can be stacked without end on one letter."""
_FORMULA = frozenset("=+-@\t\r\n＝＋－＠")


def terminal_text(text: str, width: int | None = None) -> str:
    r"""One line of text that a terminal prints and does not obey.

    Line breaks and tabs become ``\n``, ``\t``, other characters without a shape of their own ``\x1b``, ``\u202e``
    and so on. With ``width`` (terminal columns, >= 1; wide characters take two) a longer text is cut and ends in an
    ellipsis. Only as much of ``text`` is looked at as fits.
    """
    pieces: list[str] = []
    used = 0
    fits = 0  # pieces that leave room for the ellipsis
    for character in text:
        piece = _shown(character)
        used += cell_len(piece)
        if width is not None and (used > width or len(pieces) > _STACK * width):
            return "".join(pieces[:fits]) + _ELLIPSIS
        pieces.append(piece)
        if width is None or used < width:
            fits = len(pieces)
    return "".join(pieces)


def command_line(*words: str) -> str:
    """A ``daunce`` command as it can be pasted into a shell."""
    return terminal_text(shlex.join(["daunce", *words]))


def phrase(text: str, width: int) -> str:
    """One line of at most ``width`` terminal columns: white space becomes single spaces, and a text that is too long
    ends after a whole word where there is one."""
    line = " ".join(text[: _STACK * width + 1].split())
    shown = terminal_text(line, width)
    if not shown.endswith(_ELLIPSIS) or line.endswith(_ELLIPSIS):
        return shown
    words, _, last = shown.rpartition(" ")
    return words.rstrip(" ,;:") + " " + _ELLIPSIS if words and len(last) <= width // 3 else shown


def rich_text(text: str, width: int | None = None) -> Text:
    """:func:`terminal_text` for tables and panels of rich, which parse a ``str`` for markup (``[red]``) and emoji
    names (``:bomb:``) and a ``Text`` for neither. Progress columns take a ``str``: give them ``markup=False``."""
    return Text(terminal_text(text, width))


def csv_cell(text: str) -> str:
    """A text cell that a spreadsheet does not take for a formula: what begins like one gets an apostrophe before it.

    For exported files that people open in spreadsheets (OWASP, "CSV Injection"); quoting of commas, quotes and line
    breaks is left to the csv module.
    """
    start = text.lstrip(" ")[:1]
    return f"'{text}" if start and start in _FORMULA else text


def summarized(sentences: Sequence[str]) -> list[str]:
    """Sentences that differ in numbers and quoted names only, as one: the first, and how many more there are."""
    kinds: dict[str, list[str]] = {}
    for sentence in sentences:
        kinds.setdefault(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "*", sentence), []).append(sentence)
    out: list[str] = []
    for found in kinds.values():
        out += found if len(found) <= _SHOWN else [f"{found[0]} (and {len(found) - 1:,} more like this)"]
    return out


def dollars(usd: float | None) -> str:
    """An amount of money, below ten cents to a hundredth of a cent; what is not known is said to be unknown.

    Example:
        >>> dollars(1234.5), dollars(0.5), dollars(0.00123), dollars(None)
        ('$1,234.50', '$0.50', '$0.0012', 'unknown')
    """
    if usd is None:
        return "unknown"
    return f"${usd:,.2f}" if usd >= 0.1 else "$" + f"{usd:.4f}".removesuffix("00")


def duration(seconds: float) -> str:
    """A duration for people, in the two largest units.

    Example:
        >>> duration(0.53), duration(40.4), duration(600), duration(9000), duration(400_000)
        ('0.5 s', '40 s', '10 min', '2 h 30 min', '4 d 15 h')
    """
    whole = round(seconds)
    for unit, name, smaller, smaller_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s".replace(".0 s", " s")


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode()
