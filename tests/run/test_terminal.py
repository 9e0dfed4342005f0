"""What people see in a terminal."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from daunce_api._util.text import command_line, phrase, summarized, terminal_text
from daunce_api.attribution import Attribution, tables
from daunce_api.cli import terminal
from daunce_api.core import SelfLDS
from daunce_api.data.dataset import Dataset
from daunce_api.run import Run
from tests.core.problems import linear_problem, self_lds


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


def chats(*, system: str = "Be brief.") -> Attribution:
    """Losses of 40 members over chats with one system prompt; t1, t2 and t3 have the same content."""
    rng = np.random.default_rng(0)
    problem = linear_problem(members=40, train=12, test=2)
    words = ["ember", "grove", "grove", "grove", *(f"word{i} " + "meaning " * 12 for i in range(8))]

    def record(name: str, question: str, answer: str) -> dict[str, object]:
        turns = [("system", system), ("user", question), ("assistant", answer)]
        return {"id": name, "messages": [{"role": role, "content": text} for role, text in turns]}

    train = Dataset.from_records([record(f"t{i}", f"What is {w[:8]}?", f"It is\n{w}.") for i, w in enumerate(words)])
    test = Dataset.from_records([record(f"q{i}", f"Why {i}?", f"Because of {i}.") for i in range(2)])
    loss = problem.train[:, [0, 1, 1, 1, *range(2, 10)]] * 1e-3
    inclusion = rng.random(loss.shape) < 0.5
    return Attribution(train, test, tuple(range(40)), loss, problem.test, inclusion)


def test_correlations_are_printed_with_both_ends_of_their_interval(
    attribution: Attribution, screen: io.StringIO
) -> None:
    table = attribution.top("q0", 3, question="retrieval")
    terminal.rankings(attribution, {"proponents": table}, test="q0", fdr=None)
    assert re.search(r"[+-]\d\.\d+ to [+-]\d\.\d+", screen.getvalue())
    assert "±" not in screen.getvalue()


def test_decimals_stand_below_each_other(attribution: Attribution, screen: io.StringIO) -> None:
    table = attribution.with_estimator("covariance").top("q0", 8)
    terminal.rankings(attribution, {"proponents": table}, test="q0", fdr=None)
    rows = re.findall(r"^\s*\d+ +([+-][\d.]+) +([\d.]+)  ", screen.getvalue(), re.M)
    assert len(rows) == 8
    assert (
        len({len(score.partition(".")[2]) for score, _ in rows} | {len(half.partition(".")[2]) for _, half in rows})
        == 1
    )
    assert "± 95 %" in screen.getvalue()
    assert "e-" not in screen.getvalue().replace("1e-", "")


def test_a_scale_keeps_tiny_scores_readable() -> None:
    scale = terminal.Scale([3.2e-7, -1e-8])
    assert (scale.unit, scale.number(3.2e-7), scale.number(-1e-8)) == (" x 1e-7", "+3.20", "-0.10")
    assert terminal.Scale([0.0155, 7.64e-4]).number(7.64e-4) == "+0.0008"
    assert terminal.Scale([]).number(float("nan")) == "-"


def test_answers_come_first_and_system_prompts_and_copies_are_folded(screen: io.StringIO) -> None:
    attribution = chats()
    table = tables.top_folded(attribution, "q0", 9)
    assert list(table["rank"]) == list(range(1, 10))
    terminal.rankings(attribution, {"proponents": table}, test="q0", fdr=None)
    text = screen.getvalue()
    assert text.startswith("Because of 0.")
    assert "Be brief" not in text
    assert "\\n" not in text
    assert text.count("It is grove.") == 1
    assert "3 copies" in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\bmean(i|in|ing?)? …", text.replace("meaning …", ""))
    assert next(i for i, line in enumerate(lines) if "It is" in line) < next(
        i for i, x in enumerate(lines) if "What is" in x
    )


def test_system_prompts_that_differ_are_shown(screen: io.StringIO) -> None:
    attribution = chats()
    odd = Dataset.from_records(
        [
            attribution.train[0].to_record()
            | {
                "messages": [{"role": "system", "content": "Shout!"}, *attribution.train[0].to_record()["messages"][1:]]
            },
            *[e.to_record() for e in attribution.train[1:]],
        ]
    )
    attribution = replace(attribution, train=odd)
    terminal.rankings(attribution, {"t": attribution.top("q0", 12)}, test="q0", fdr=None)
    assert "[Shout!]" in screen.getvalue()
    assert "[Be brief.]" in screen.getvalue()


def test_the_last_line_says_how_to_read_it(screen: io.StringIO) -> None:
    attribution = chats()
    terminal.rankings(attribution, {"proponents": attribution.top("q0", 3)}, test="q0", fdr=None)
    last = screen.getvalue().rstrip().splitlines()[-1]
    assert last.startswith("40 members · ")
    assert "not significant (5 %, per pair)" in last


def test_two_rankings_share_a_footer_that_names_the_level_of_significance(
    attribution: Attribution, screen: io.StringIO
) -> None:
    tables = {name: attribution.top("q0", 2, opponents=name == "opponents", fdr=0.1) for name in ("first", "opponents")}
    terminal.rankings(attribution, tables, test="q0", fdr=0.1)
    *lines, last = screen.getvalue().strip().splitlines()
    assert last.endswith("dim: not significant (false-discovery rate 0.1)")
    assert [line.strip() for line in lines if line.strip() in tables] == ["first", "opponents"]
    assert "not significant" not in "".join(lines)


def test_an_answer_without_scores_says_why(screen: io.StringIO) -> None:
    attribution = chats()
    loss = attribution.test_loss_KM.copy()
    loss[:, 1] = np.nan
    censored = replace(attribution, test_loss_KM=loss, censored=0.3)
    table = censored.top("q1", 3)
    assert list(table.columns)[:2] == ["rank", "id"]
    terminal.rankings(censored, {"proponents": table}, test="q1", fdr=None)
    assert "lower bound" in screen.getvalue()
    assert "1" not in screen.getvalue().splitlines()[-1].replace("q1", "")


def test_a_run_ends_with_what_it_found(finished: Path, screen: io.StringIO) -> None:
    run = Run.open(finished)
    attribution = run.attribution()
    terminal.finished(run.status(), attribution, finished / "report.html")
    text = screen.getvalue()
    for test in attribution.test.ids[:3]:
        assert f"· {test}" in text
    first = attribution.top("q0", 1)["id"][0]
    assert f"· {first}" in text
    assert text.index(first) < text.index("report")
    assert "daunce view" in text


def test_the_time_left_is_shown_from_the_first_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.Progress(4, quiet=True, first_guess=40)
    assert progress._left(0) == "about 40 s left"
    now[0] = 10
    progress.scored(0, 2, 2)  # trained and scored: two of eight steps
    assert progress._left(2) == "about 30 s left"
    now[0] = 41
    slow = terminal.Progress(4, quiet=True, first_guess=40)
    now[0] = 90
    assert slow._left(0) == "slower than usual"
    now[0] = 10
    plain = terminal.Progress(4, quiet=True)
    assert "after the first member" in plain._left(0)
    now[0] = 12
    assert plain._left(0) == "time left: after the first member"
    plain.scored(1, 2, 2)
    now[0] = 20
    assert plain._left(2) == "about 30 s left"


def test_sources_have_no_ids(attribution: Attribution, screen: io.StringIO) -> None:
    terminal.rankings(attribution, {"t": attribution.top_groups("q0")}, test="q0", fdr=None)
    head = screen.getvalue().splitlines()[3].split()
    assert head == ["score", "±", "95", "%", "examples", "source"]


@pytest.mark.parametrize("width", [8, 20, 33, 80])
def test_phrases_end_after_a_whole_word(width: int) -> None:
    text = "A kind of\nwave\tnear the \x1b[31mamber, and a stone."
    shown = phrase(text, width)
    assert cell_len(shown) <= width
    assert "\\n" not in shown
    assert "\x1b" not in shown
    if shown.endswith("…"):
        kept = shown.rstrip("…").rstrip()
        assert terminal_text(" ".join(text.split())).startswith(kept)


def test_notes_of_one_kind_are_one_line() -> None:
    notes = [f"train.jsonl:{i}: same content as train.jsonl:{i - 1}; both are kept" for i in range(2, 9)]
    assert summarized([*notes, "another"]) == [f"{notes[0]} (and 6 more like this)", "another"]
    assert summarized(notes[:3]) == notes[:3]


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
    terminal.status(state)
    text = " ".join(screen.getvalue().split())
    gain, low, high = quality.gain(20)
    assert f"20 more members would be expected to add {gain:.2f} [{low:.2f}, {high:.2f}]" in text
    assert "rough guess" not in text
    content = json.loads(json.dumps(state.to_json(), allow_nan=False))
    assert content["more"] == pytest.approx({"members": 20, "gain": gain, "low": low, "high": high})
    assert content["self_lds"]["value"] == quality.value
    assert "draws" not in content["self_lds"]


def test_status_says_that_few_members_tell_little(finished: object, screen: io.StringIO) -> None:
    state = replace(Run.open(str(finished)).status(), self_lds=replace(judged(12), curve=None, draws=None))
    terminal.status(state)
    text = " ".join(screen.getvalue().split())
    assert "a rough guess below 20 members" in text
    assert "more members" not in text
    assert state.to_json()["more"] is None


def test_lines_break_between_words_in_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Loss:            every assistant turn of twelve chats is trained on"
    for wide, expected in (
        (40, ["Loss:            every assistant turn of", " " * 17 + "twelve chats is trained", " " * 17 + "on"]),
        (80, [line]),
    ):
        text = io.StringIO()
        monkeypatch.setattr(
            terminal, "out", Console(file=text, width=wide, force_terminal=True, color_system=None, soft_wrap=True)
        )
        terminal.say(line)
        assert text.getvalue().splitlines() == expected
    piped, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=piped, width=40, soft_wrap=True))
    terminal.say(line)
    assert piped.getvalue() == line + "\n"
    monkeypatch.setattr(
        terminal, "err", Console(file=err, width=30, force_terminal=True, color_system=None, soft_wrap=True)
    )
    terminal.error("a.jsonl has problems. Fix them:\n  a.jsonl:1: not JSON: a comma stands there")
    terminal.note("something was noticed and kept")
    assert err.getvalue().splitlines() == [
        "error  a.jsonl has problems.",
        "       Fix them:",
        "         a.jsonl:1: not JSON:",
        "         a comma stands there",
        "note  something was noticed",
        "      and kept",
    ]


def test_commands_to_run_next_can_be_pasted() -> None:
    words = ["daunce", "top", "runs of mine/ü", "--test", "it's q"]
    assert shlex.split(command_line(*words[1:])) == words
