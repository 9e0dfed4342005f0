"""What people see in a terminal: tables, progress and closing words. All foreign text goes through ``display``.

Standard output carries results, standard error everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from .._util.text import rich_text, terminal_text
from ..status import RunStatus
from ..train import CancelReport, CleanReport, Event, EventKind

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ..attribution import Attribution
    from .demo import DemoResult

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_TOLD = (
    EventKind.FAILED,
    EventKind.LEFT_OUT,
    EventKind.FEWER_MODELS,
    EventKind.WAITING,
    EventKind.NOT_YET,
    EventKind.ORPHAN,
    EventKind.ADOPTED,
    EventKind.NOT_CHECKED,
    EventKind.PARKED,
)
"""Events that people are told of."""

SIGN = "positive = helpful: training on it made this answer more likely"


def say(text: str) -> None:
    """A plain result."""
    out.print(Text(text))


def warn(warnings: Sequence[str], limit: int = 10) -> None:
    """What was noticed and kept."""
    for warning in warnings[:limit]:
        err.print(Text.assemble(("note  ", "yellow"), terminal_text(warning)))
    if len(warnings) > limit:
        err.print(Text.assemble(("note  ", "yellow"), f"and {len(warnings) - limit} more of this kind"))


def error(message: str) -> None:
    """Why a command ends; each line is shown as it is, escaped."""
    first, *rest = message.splitlines() or [""]
    err.print(Text.assemble(("error  ", "bold red"), terminal_text(first)))
    for line in rest[:60]:
        err.print(Text("       " + terminal_text(line)))
    if len(rest) > 60:
        err.print(Text(f"       and {len(rest) - 60} more lines"))


class Progress:
    """Two bars: members with a model, and scored examples; with an estimate once some are done."""

    def __init__(self, members: int, *, quiet: bool) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            disable=quiet,
            transient=True,
        )
        self._trained = self._bars.add_task("fine-tunes", total=members)
        self._scored = self._bars.add_task("members scored", total=members)
        self._quiet = quiet
        self._done: set[int] = set()
        self._ready: set[int] = set()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def event(self, event: Event) -> None:
        """Something happened to a job."""
        if event.kind is EventKind.READY and event.member is not None and event.member >= 0:
            self._ready.add(event.member)
        elif event.job is not None and event.job.model is not None and (event.member or 0) >= 0:
            self._ready.add(event.member or 0)
        self._bars.update(self._trained, completed=len(self._ready))
        if event.kind in _TOLD and not self._quiet:
            self._bars.console.print(Text.assemble(("note  ", "yellow"), terminal_text(event.message)))

    def scored(self, member: int, done: int, total: int) -> None:
        """Examples of a member were scored; members that are half done count as half."""
        if done == total:
            self._done.add(member)
        self._bars.update(self._scored, completed=len(self._done))


def number(value: float) -> str:
    """Three significant digits with a sign, without exponents in the usual range."""
    if not math.isfinite(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        return f"{value:+.2e}"
    return f"{value:+.3g}"


def status(state: RunStatus) -> None:
    """``daunce status``: how far the run is, and what changed last."""
    summary(state)
    changes = Table(show_header=False, box=None, pad_edge=False, style="dim")
    changes.add_column(no_wrap=True)
    changes.add_column(overflow="fold")
    for line in state.recent:
        time, _, change = line.partition(" ")
        changes.add_row(Text(time[:19].replace("T", " ")), rich_text(change))
    if state.recent:
        out.print()
        out.print(Text("last changes (UTC)", style="dim"))
        out.print(changes)


def summary(state: RunStatus) -> None:
    """How far a run is."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in state.rows():
        table.add_row(Text(name, style="dim"), rich_text(value))
    out.print(table)


def finished(state: RunStatus, attribution: Attribution, page: Path | None) -> None:
    """The closing words of ``daunce run``."""
    summary(state)
    first = attribution.test.ids[0]
    out.print()
    if page is not None:
        out.print(Text(f"report  {page}"))
    out.print(Text(f"next    daunce top {state.run_dir} --test {terminal_text(first)} -k 10"))


def ranking(table: pd.DataFrame, *, title: str) -> None:
    """Proponents or opponents of one answer; what cannot be told from zero is dim."""
    out.print(rich_text(title, 200), soft_wrap=not out.is_terminal)
    ranking_rows(table)
    sentence(f"{table.attrs.get('estimator', '')}: {table.attrs.get('question', '')}.", style="dim")
    sentence(f"Score: {SIGN}. Dim: not distinguishable from zero.", style="dim")
    if table.attrs.get("measured", "completion") != "completion":
        sentence(f"Measured: {table.attrs['measured']}.", style="yellow")


def sentence(text: str, *, style: str = "") -> None:
    """Prose, broken between words in a terminal; paths and commands are printed whole, to be copied."""
    out.print(Text(text, style=style), soft_wrap=not out.is_terminal)


def ranking_rows(table: pd.DataFrame) -> None:
    """The rows of a ranking, of examples or of groups."""
    view = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    # The interval of a correlation is not symmetric.
    correlation = table.attrs.get("estimator") == "correlation" and "prompt" in table
    for name in ("", "score", "95 % interval" if correlation else "±95 %"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("source", no_wrap=True)
    if "id" in table:
        view.add_column("id", no_wrap=True)
    view.add_column("text" if "prompt" in table else "examples", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in table.to_dict("records"):
        half = number((row["high"] - row["low"]) / 2).lstrip("+")
        source = row["source"]
        text = f"{row['prompt']} → {row['completion']}" if "prompt" in row else f"{row['examples']:,}"
        view.add_row(
            str(row["rank"]),
            number(row["score"]),
            f"{number(row['low'])} to {number(row['high'])}" if correlation else half,
            rich_text(source if isinstance(source, str) else "-", 16),
            *([rich_text(str(row["id"]), 24)] if "id" in row else []),
            rich_text(text, 200),
            style="" if row["distinguishable"] else "dim",
        )
    out.print(view)


def cancelled(report: CancelReport) -> None:
    """``daunce cancel``."""
    if report.cancelled or report.already_final or report.kept:
        out.print(Text(f"Cancelled {len(report.cancelled)} jobs; {len(report.already_final)} had ended before."))
    else:
        out.print(Text("No job was going on."))
    _kept(report.kept)


def cleaned(report: CleanReport) -> None:
    """``daunce clean``."""
    out.print(Text(f"Deleted {len(report.models)} models and {len(report.files)} files."))
    if report.unloaded:
        out.print(Text(f"Took {len(report.unloaded)} models off the scoring server."))
    _kept(report.kept)


def _kept(kept: dict[str, str]) -> None:
    for subject, why in kept.items():
        out.print(Text.assemble(("kept  ", "yellow"), terminal_text(f"{subject}: {why}")))


def table_of(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table of short texts and numbers."""
    view = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        view.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        view.add_row(*(rich_text(cell if isinstance(cell, str) else f"{cell:.3f}") for cell in row))
    out.print(view)


def demo(result: DemoResult, page: Path | None) -> None:
    """``daunce demo``: a few answers with their proponents, then the comparison."""
    attribution = result.attribution
    sources = attribution.labels("test")
    shown = [sources.index(source) for source in sorted(set(sources), key=lambda s: (s != "planted", s))]
    for j in shown[:3]:
        example = attribution.test[j]
        out.print(Text.assemble(("asked     ", "dim"), terminal_text(example.prompt_text(), 90)))
        out.print(Text.assemble(("answered  ", "dim"), terminal_text(example.completion_text(), 90)))
        ranking_rows(attribution.top(example.id, 5))
        out.print()
    columns = ["average precision", "daunce", "covariance", "BM25", "random"]
    rows = [
        ["planted, for triggered questions", *(result.average_precision[m] for m in result.average_precision)],
        [
            "examples of the same dictionary, for the others",
            *(result.source_precision[m] for m in result.average_precision),
        ],
    ]
    table_of(columns, rows)
    out.print()
    choice = attribution.choice
    took = f"in {result.seconds:.0f} s" if result.seconds else "made before"
    for name, value in (
        ("members", f"{len(attribution.members)} fine-tunes on random halves, {took}"),
        ("estimator", choice.why),
        ("report", "not written" if page is None else str(page)),
        ("next", f"daunce top {result.run.run_dir} --test {attribution.test.ids[shown[0]]} -k 10"),
    ):
        out.print(Text.assemble((f"{name:<10}", "dim"), terminal_text(value)))
