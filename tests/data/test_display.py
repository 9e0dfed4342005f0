"""Untrusted text on terminals and in spreadsheets."""

from __future__ import annotations

import csv
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from daunce_api._util.text import csv_cell, rich_text, terminal_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本語 😀 żółw", "plain é 日本語 😀 żółw"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x00\x7f\x9b2J", r"\x00\x7f\x9b2J"),
        ("abc\u202edcba\u2066\u200e", r"abc\u202edcba\u2066\u200e"),
        ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
        ("\ud800\ufdd0\ue000\U000e0041", r"\ud800\ufdd0\ue000\U000e0041"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("\ufeffzero\u200bwidth\u00ad", r"\ufeffzero\u200bwidth\xad"),
        ("[red]x[/red] :bomb:", "[red]x[/red] :bomb:"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text: str, shown: str) -> None:
    assert terminal_text(text) == shown


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abcde…"),
        ("abcdefg", 1, "…"),
        ("a", 1, "a"),
        ("", 1, ""),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("ab\x1b[31m", 5, "ab…"),
        ("ab\x1b", 6, r"ab\x1b"),
    ],
)
def test_cutting_to_a_width(text: str, width: int, shown: str) -> None:
    assert terminal_text(text, width) == shown


@given(st.text(), st.integers(1, 30))
def test_nothing_but_printable_characters_on_one_line_of_the_width(text: str, width: int) -> None:
    shown = terminal_text(text, width)
    assert cell_len(shown) <= width
    assert all(c in "\u200c\u200d" or unicodedata.category(c)[0] not in "C" for c in shown)
    assert len(shown.splitlines()) <= 1
    whole = terminal_text(text)
    assert shown == whole or whole.startswith(shown[:-1])


def test_a_megabyte_is_not_walked_through_for_one_line() -> None:
    """Neither a long text nor accents stacked on one letter."""

    class Counted(str):
        __slots__ = ("seen",)
        seen: int

        def __iter__(self):  # type: ignore[no-untyped-def]
            self.seen = 0
            for c in str.__iter__(self):
                self.seen += 1
                yield c

    for text in (Counted("x" * 1_000_000), Counted("e" + "\u0301" * 1_000_000)):
        assert terminal_text(text, 80).endswith("…")
        assert text.seen < 1_000


def printed(text: str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=1000, force_terminal=True, color_system=None, highlight=True)
    table = Table(show_header=False, box=None, padding=0)
    table.add_row(rich_text(text))
    console.print(table)
    return out.getvalue().rstrip(" \n")


@pytest.mark.parametrize("text", ["[red]x[/red]", "[link=file:///]x", "\\[red]", "[/]", "x\\", ":bomb:", "[bold"])
def test_rich_prints_markup_and_emoji_names_as_they_are(text: str) -> None:
    assert printed(text) == text


@given(st.text(max_size=40))
def test_rich_prints_what_a_terminal_may_show(text: str) -> None:
    assert printed(text).rstrip() == terminal_text(text).rstrip()


@pytest.mark.parametrize("start", [*"=+-@\t\r\n＝＋－＠", " =", "   @"])
def test_formulas_become_text(start: str) -> None:
    assert csv_cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"


@pytest.mark.parametrize("text", ["", " ", "a=b", "'=1", "q-17", "1+1", "日本"])
def test_other_cells_are_left_alone(text: str) -> None:
    assert csv_cell(text) == text


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_no_exported_cell_begins_a_formula_and_the_text_can_be_read_back(text: str) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerow([csv_cell(text), "x"])
    cell = next(csv.reader(io.StringIO(out.getvalue(), newline="")))[0]
    assert not cell.lstrip(" ").startswith(tuple("=+-@\t\r\n"))
    assert cell in (text, f"'{text}")
