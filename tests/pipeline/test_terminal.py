"""What people see in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from daunce_api import terminal
from daunce_api.attribution import Attribution
from daunce_api.pipeline import Run


@pytest.fixture
def attribution(finished: object) -> Attribution:
    return Run.open(str(finished)).attribution()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns."""
    text = io.StringIO()
    monkeypatch.setattr(
        terminal, "out", Console(file=text, width=80, force_terminal=True, color_system=None, soft_wrap=True)
    )
    return text


def test_correlations_are_printed_with_both_ends_of_their_interval(
    attribution: Attribution, screen: io.StringIO
) -> None:
    table = attribution.top("q0", 3, question="retrieval")
    terminal.ranking(table, title="t")
    row = table.to_dict("records")[0]
    assert f"{terminal.number(row['low'])} to {terminal.number(row['high'])}" in screen.getvalue()
    assert "±" not in screen.getvalue()


def test_other_scores_are_printed_with_half_their_interval(attribution: Attribution, screen: io.StringIO) -> None:
    table = attribution.with_estimator("covariance").top("q0", 3)
    terminal.ranking(table, title="t")
    row = table.to_dict("records")[0]
    assert terminal.number((row["high"] - row["low"]) / 2).lstrip("+") in screen.getvalue()
    assert "±95 %" in screen.getvalue()


def test_sources_have_no_ids(attribution: Attribution, screen: io.StringIO) -> None:
    terminal.ranking(attribution.top_groups("q0"), title="t")
    head = screen.getvalue().splitlines()[1].split()
    assert head == ["score", "±95", "%", "source", "examples"]


def test_lines_break_between_words(attribution: Attribution, screen: io.StringIO) -> None:
    terminal.ranking(attribution.top("q0", 3), title="word " * 60)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(re.search(r"w$|wo$|wor$", line) for line in lines[:5])


def test_status_says_what_was_used(finished: object, screen: io.StringIO) -> None:
    state = Run.open(str(finished)).status()
    terminal.status(state)
    text = " ".join(screen.getvalue().split())
    assert f"{state.trained_tokens:,} tokens trained, {state.scored_tokens:,} tokens scored" in text
    assert "from start to last result" in text
    assert "last changes (UTC)" in text
