"""What people see in a terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from daunce_api.attribution import Attribution
from daunce_api.cli import terminal
from daunce_api.core import SelfLDS, self_lds
from daunce_api.run import Run
from tests.core.problems import linear_problem


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


def judged(members: int) -> SelfLDS:
    """self_lds of the first members of a linear problem with luck of each run's own."""
    rng = np.random.default_rng(0)
    problem = linear_problem(members=members)
    test = problem.test + 2 * problem.test.std(axis=0) * rng.normal(size=problem.test.shape)
    return self_lds(problem.train, test, problem.inclusion, "whitened")


def test_status_says_what_more_members_would_add(finished: object, screen: io.StringIO) -> None:
    quality = judged(40)
    state = replace(Run.open(str(finished)).status(), self_lds=quality)
    terminal.summary(state)
    text = " ".join(screen.getvalue().split())
    gain, low, high = quality.gain(20)
    assert f"20 more members would be expected to add {gain:.2f} [{low:.2f}, {high:.2f}]" in text
    assert "rough guess" not in text
    content = json.loads(json.dumps(state.to_json(), allow_nan=False))
    assert content["more"] == pytest.approx({"members": 20, "gain": gain, "low": low, "high": high})
    assert content["self_lds"]["value"] == quality.value
    assert "forecast" not in content["self_lds"]


def test_status_says_that_few_members_tell_little(finished: object, screen: io.StringIO) -> None:
    state = replace(Run.open(str(finished)).status(), self_lds=replace(judged(12), curve=None, forecast=None))
    terminal.summary(state)
    text = " ".join(screen.getvalue().split())
    assert "a rough guess below 20 members" in text
    assert "more members" not in text
    assert state.to_json()["more"] is None
