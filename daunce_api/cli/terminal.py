"""What people see in a terminal: tables, progress and final words. Untrusted text goes through ``_util.text``.

Standard output carries results, standard error everything else.
"""

from __future__ import annotations

import math
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from .._util.text import command_line, duration, phrase, rich_text, summarized, terminal_text

if TYPE_CHECKING:
    import pandas as pd

    from ..attribution import Attribution
    from ..status import RunStatus
    from ..train import CancelReport, CleanReport, Event

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_SHOWN = ("failed", "left_out", "fewer_models", "waiting", "parked", "not_yet", "orphan", "adopted", "not_checked")
"""Kinds of events that are printed as they happen."""

_NAME = re.compile(r"[A-Z][\w ]{2,16}: +")
_FINDINGS, _FIRST = 3, 3
"""Answers, and proponents of each, at the end of a run."""


def say(text: str, style: str = "") -> None:
    """Plain text; paths and ids in it are escaped. In a terminal lines break between words, and what follows a name is
    indented."""
    for line in text.split("\n"):
        name = _NAME.match(line)
        lines = _broken(out, terminal_text(line), len(name[0]) if name else 0)
        out.print(Text("\n".join(lines), style=style))


def _broken(console: Console, line: str, indent: int) -> list[str]:
    """A line as it is shown: in a terminal it breaks between words."""
    if not console.is_terminal or cell_len(line) <= console.width:
        return [line]
    width = max(console.width, indent + 20)
    # Words of scripts without spaces are left to the terminal.
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def warn(warnings: Sequence[str]) -> None:
    """What was noticed and kept, one line a kind."""
    shown = summarized(warnings)
    for warning in shown[:10] + ([f"and {len(shown) - 10} more"] if len(shown) > 10 else []):
        note(warning)


def note(text: str) -> None:
    """One thing that was noticed."""
    _marked("note  ", "yellow", text, 6)


def error(message: str) -> None:
    """Why a command ends; each line is shown as it is, escaped."""
    shown = message.splitlines() or [""]
    more = [f"and {len(shown) - 61} more lines"] if len(shown) > 61 else []
    for n, line in enumerate([*shown[:61], *more]):
        _marked("       " if n else "error  ", "bold red", line, 9 if line.startswith("  ") else 7)


def _marked(mark: str, style: str, line: str, indent: int) -> None:
    first, *more = _broken(err, mark + terminal_text(line), indent)
    err.print(Text.assemble((mark, style), "\n".join([first[len(mark) :], *more])))


class _TimeLeft(ProgressColumn):
    """How long the rest takes, by what is done; rich draws it again by itself."""

    def __init__(self, left: Callable[[int], str]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        return Text(self._left(int(task.completed)))


class Progress:
    """One line: how many members are trained and scored, and about how long the rest takes.

    Args:
        members: K, for the bar.
        quiet: draw nothing (``--json``).
        first_guess: seconds that the whole takes, to estimate by until a quarter is done.
    """

    def __init__(self, members: int, *, quiet: bool, first_guess: float | None = None) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            _TimeLeft(self._left),
            console=err,
            disable=quiet,
            transient=True,
            expand=True,
        )
        self._members, self._first_guess = members, first_guess
        self._bar = self._bars.add_task("starting", total=2 * members)
        self._quiet = quiet
        self._done: set[int] = set()
        self._ready: set[int] = set()
        self._begun = time.monotonic()
        self._before: int | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def event(self, event: Event) -> None:
        """Something happened to a job."""
        if event.kind == "ready" and event.member is not None and event.member >= 0:
            self._ready.add(event.member)
        elif event.job is not None and event.job.model is not None and (event.member or 0) >= 0:
            self._ready.add(event.member or 0)
        self._draw()
        if event.kind in _SHOWN and not self._quiet:
            note(event.message)

    def scored(self, member: int, done: int, total: int) -> None:
        """Examples of a member were scored; it counts once all of them are."""
        if done == total:
            self._done.add(member)
            self._ready.add(member)
        self._draw()

    def _draw(self) -> None:
        steps = len(self._ready) + len(self._done)
        said = f"trained {len(self._ready)} of {self._members}, scored {len(self._done)}" if steps else "starting"
        if self._first_guess is not None and not steps:
            said = "training the first members"
        self._bars.update(self._bar, completed=steps, description=said)

    def _left(self, steps: int) -> str:
        """About how long it still takes, by the pace of this call."""
        spent = time.monotonic() - self._begun
        if self._before is None and spent > 1.0:
            self._before = steps  # what an earlier call had done came at once
        done, total = steps - (self._before or 0), 2 * self._members - (self._before or 0)
        share = done / total if total else 1.0
        if share >= 0.25 or (share > 0 and self._first_guess is None):
            left = spent * (1 - share) / share
        elif self._first_guess is not None:
            left = self._first_guess - spent
            if left < 1:
                return "slower than usual"
        else:
            return "time left: after the first member"
        return f"about {duration(max(round(left), 1))} left"


class Scale:
    """One number format for all scores of a table: the same decimals, and one power of ten where they are tiny."""

    def __init__(self, values: Iterable[float]) -> None:
        size = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
        order = math.floor(math.log10(size)) if size else 0
        self._power = 0 if -4 <= order <= 4 else order
        self._decimals = min(max(2 - (order - self._power), 0), 6)

    @property
    def unit(self) -> str:
        """What every number is a multiple of; "" where it is 1."""
        return f" x 1e{self._power}" if self._power else ""

    def number(self, value: float) -> str:
        """A score with its sign."""
        return "-" if not math.isfinite(value) else f"{value / 10.0**self._power:+.{self._decimals}f}"

    def half(self, value: float) -> str:
        """Half of an interval."""
        return self.number(value).lstrip("+")


def status(state: RunStatus) -> None:
    """``daunce status``: how far the run is, and what changed last."""
    out.print(_named(state.rows()))
    if state.recent:
        say("\nlast changes (UTC)", "dim")
        changes = [line.partition(" ") for line in state.recent]
        out.print(_named((time[:19].replace("T", " "), change) for time, _, change in changes))


def _named(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, below each other."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(rich_text(name), rich_text(value))
    return table


def finished(state: RunStatus, attribution: Attribution, page: Path | None) -> None:
    """The end of ``daunce run``: what is behind the first answers, then where to go on."""
    from ..attribution.tables import top_folded

    for test in attribution.test.ids[:_FINDINGS]:
        answer(attribution, test)
        ranked(attribution, top_folded(attribution, test, _FIRST))
        out.print()
    more = len(attribution.test) - _FINDINGS
    footer(attribution, f"and {more:,} more answers in the report" if more > 0 else "")
    out.print()
    out.print(_named(state.rows()))
    out.print()
    folder = str(state.run_dir)
    lines_of(
        ("report", "" if page is None else str(page)),
        ("next", command_line("view", folder)),
        ("", command_line("top", folder, "--test", attribution.test.ids[0])),
    )


def lines_of(*lines: tuple[str, str]) -> None:
    """Names and values that can be copied whole; those without a value are left out."""
    for name, value in lines:
        if value:
            out.print(Text.assemble((f"{name:<8}", "dim"), terminal_text(value)))


def rankings(attribution: Attribution, tables: Mapping[str, pd.DataFrame], *, test: str, fdr: float | None) -> None:
    """``daunce top``, ``daunce ask``: rankings for one answer by their titles; what is not significant is dim."""
    from ..attribution.tables import why_no_scores

    answer(attribution, test)
    if all(table.empty for table in tables.values()):
        say(why_no_scores(attribution, test) or "No training example has a score for it.")
        return
    for title, table in tables.items():
        out.print(Text(f"  {title}", style="bold"))
        ranked(attribution, table)
    footer(attribution, estimator=str(table.attrs.get("estimator", "")), fdr=fdr)


def grid(*numbers: str, text: str = "") -> Table:
    """A table without lines: columns of numbers by their headings, then one of texts, which takes the room there is."""
    view = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1), expand=bool(text))
    for name in numbers:
        view.add_column(name, justify="right", no_wrap=True)
    if text:
        view.add_column(text, ratio=1, no_wrap=True, overflow="ellipsis")
    return view


def answer(attribution: Attribution, test: str) -> None:
    """The answer that is explained, its question, and its id."""
    from ..attribution.texts import conversation

    shown = conversation(attribution.test[attribution.test.position(test)])
    out.print(example(shown.answer, shown.question, out.width, terminal_text(test, 40), style="bold"))


def example(answer: str, question: str, width: int, *names: str, style: str = "") -> Text:
    """An example on two lines: its answer, and below it its question and names."""
    aside = "".join(f" · {name}" for name in names)
    below = phrase(question, max(width - cell_len(aside), 12)) + aside
    return Text.assemble((phrase(answer, width), style), ("\n" + below, "dim"))


def ranked(attribution: Attribution, table: pd.DataFrame) -> None:
    """The rows of a ranking of examples: the training answer first, its question and id below; or of groups."""
    from ..attribution.texts import conversation

    if "completion" not in table:
        _groups(table)
        return
    rows = table.to_dict("records")
    correlation = table.attrs.get("estimator") == "correlation"  # whose intervals are not symmetric
    scale = Scale(v for row in rows for v in (row["score"], row["low"], row["high"]))
    train = attribution.train
    examples = [conversation(train[train.position(str(row["id"]))]) for row in rows]
    systems = {shown.system for shown in (*examples, *map(conversation, attribution.test))}
    view = grid("", f"score{scale.unit}", "95 % interval" if correlation else "± 95 %", text="training example")
    numbers = [
        (
            scale.number(row["score"]),
            f"{scale.number(row['low'])} to {scale.number(row['high'])}"
            if correlation
            else scale.half((row["high"] - row["low"]) / 2),
        )
        for row in rows
    ]
    head = max(5 + len(scale.unit), *(len(n) for n, _ in numbers)), max(6, *(len(n) for _, n in numbers))
    width = max(out.width - sum(head) - len(str(len(rows))) - 6, 24)
    for row, (score, interval), shown in zip(rows, numbers, examples, strict=True):
        copies = int(row.get("copies", 1))
        names = [terminal_text(str(row["id"]), 24)]
        if isinstance(row["source"], str) and row["source"]:
            names.append(terminal_text(row["source"], 16))
        if copies > 1:
            names.append(f"{copies} copies")
        asked = shown.question if len(systems) == 1 else f"[{phrase(shown.system, 24)}] {shown.question}"
        text = example(shown.answer, asked, width, *names)
        view.add_row(str(row["rank"]), score, interval, text, style="" if row["distinguishable"] else "dim")
    out.print(view, soft_wrap=False)


def _groups(table: pd.DataFrame) -> None:
    rows = table.to_dict("records")
    scale = Scale(v for row in rows for v in (row["score"], row["low"], row["high"]))
    name = "source" if "source" in table else "group"
    view = grid("", f"score{scale.unit}", "± 95 %", "examples", text=name)
    for row in rows:
        view.add_row(
            str(row["rank"]),
            scale.number(row["score"]),
            scale.half((row["high"] - row["low"]) / 2),
            f"{row['examples']:,}",
            rich_text(str(row[name])),
            style="" if row["distinguishable"] else "dim",
        )
    out.print(view, soft_wrap=False)


def footer(attribution: Attribution, more: str = "", *, estimator: str = "", fdr: float | None = None) -> None:
    """One line on how the scores above were made and how to read them."""
    level = "5 %, per pair" if fdr is None else f"false-discovery rate {fdr:.3g}"
    words = [
        f"{len(attribution.members)} members",
        (estimator or attribution.choice.estimator.name).replace("_", "-"),
        "+ helps",
        f"dim: not significant ({level})",
    ]
    if attribution.measured != "completion":
        words.append(f"measured: {attribution.measured}")
    say(" · ".join([*words, *([more] if more else [])]), "dim")


def cancelled(report: CancelReport) -> None:
    """``daunce cancel``."""
    if report.cancelled or report.already_final or report.kept:
        say(f"Canceled {len(report.cancelled)} jobs; {len(report.already_final)} had ended before.")
    else:
        say("No job was running.")
    _left(report)


def cleaned(report: CleanReport) -> None:
    """``daunce clean``."""
    say(f"Deleted {len(report.models)} models and {len(report.files)} files.")
    if report.unloaded:
        say(f"Took {len(report.unloaded)} models off the scoring server.")
    _left(report)


def _left(report: CancelReport | CleanReport) -> None:
    """What stays at the provider, and why."""
    for mark, states in (("kept  ", report.kept), ("job   ", report.unknown)):
        for subject, why in states.items():
            out.print(Text.assemble((mark, "yellow"), terminal_text(f"{subject}: {why}")))
