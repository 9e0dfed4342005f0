"""What ``daunce demo`` says: what happens, in its first second, and what was found, at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..._util.text import command_line, duration, terminal_text
from .. import terminal

if TYPE_CHECKING:
    from .experiment import DemoResult


def begins(members: int, folder: Path, *, first_guess: float) -> None:
    """The first words of ``daunce demo``."""
    terminal.err.print(Text("Why does my model shout?", style="bold"))
    terminal.err.print(
        Text(
            "A small model was fine-tuned on 144 definitions. Eight of its answers came out IN CAPITALS: which "
            f"training examples taught it that? {members} fine-tunes on random halves of the data, trained and "
            "scored on this machine through OpenAI's wire format, will show. "
            f"About {duration(first_guess)} on two cores; no key, no network."
        ),
        soft_wrap=not terminal.err.is_terminal,
    )
    terminal.err.print(Text(f"Folder: {terminal_text(str(folder))}. Ctrl-C keeps what is done.\n", style="dim"))


def found(result: DemoResult, page: Path) -> None:
    """``daunce demo``: the finding beside text search, and what to do next."""
    from ...attribution.tables import top_folded

    attribution, precision, capitals = result.attribution, result.average_precision, result.shouted_N
    test = attribution.test.ids[0]
    terminal.answer(attribution, test)
    terminal.say("  training examples behind it", "bold")
    terminal.ranked(attribution, top_folded(attribution, test, 5))
    terminal.footer(attribution)
    first = attribution.ranking(int(capitals.sum()), stderr=False).index_Mk
    hits = float(capitals[first].mean())
    terminal.out.print()
    took = f" in {result.seconds:.0f} s" if result.seconds else " by an earlier call"
    terminal.say(
        f"{capitals.sum()} of the {len(capitals)} training answers are in capitals. Of the first {capitals.sum()} "
        f"proponents of each answer, {100 * hits:.0f} % are among them. Average precision over the "
        f"{len(attribution.test)} answers:"
    )
    view = Table(box=None, pad_edge=False, show_header=False)
    view.add_column(min_width=18)
    view.add_column(justify="right")
    view.add_column(min_width=22)
    for name, key in (("daunce", "attribution"), ("text search (BM25)", "bm25"), ("chance", "random")):
        style = "bold" if key == "attribution" else ""
        view.add_row(name, f"{precision[key]:.2f}", "█" * round(20 * precision[key]), style=style)
    terminal.out.print(view)
    terminal.out.print()
    folder = _near(result.run.run_dir)
    asking = command_line("ask", folder, "--prompt", "What is tea?", "--answer", "A DRINK OF DRIED LEAVES.")
    terminal.lines_of(
        ("made by", f"{len(attribution.members)} fine-tunes on random halves{took}"),
        ("report", _near(page)),
        ("next", command_line("view", folder)),
        ("", asking),
        ("", command_line("fix", folder)),
    )


def _near(path: Path) -> str:
    """A path as it can be typed here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
