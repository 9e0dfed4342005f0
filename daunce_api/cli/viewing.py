"""``daunce view``, and the removal ranking of marked answers as pages show it."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.text import command_line
from . import terminal
from .common import HERE, LOOK, command

if TYPE_CHECKING:
    from ..attribution import Attribution
    from ..report import Candidates
    from ..run import Run

_SHOWN = 100
_BRIEF = 400


@command(LOOK)
def view(
    folder: Annotated[Path, typer.Argument(help="all runs in it are shown, live", metavar="FOLDER")] = HERE,
    host: Annotated[str, typer.Option(help="a loopback address")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free")] = 0,
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = True,
) -> None:
    """A local page over all runs in a folder: progress while they run, money, quality, every report, two side by side.

    Mark answers as wanted or unwanted there, ask about more of them, and see what to take out. It answers on this
    machine only; the address carries a secret token. Needs the extra `view`, and no PyTorch.
    """
    from ..report.view import Runs, serve

    def started(address: str) -> None:
        terminal.say(f"daunce view: {address}\nCtrl-C stops it.")
        if browser:
            webbrowser.open(address)

    runs = Runs(folder, fix=proposal_of, candidates=candidates_of, outcome=outcome_of)
    serve(runs, host=host, port=port, on_start=started)


def proposal_of(run: Run) -> dict[str, Any]:
    """What to take out of a run with marked answers, kept in its folder, as plain data.

    Raises ConfigurationError where no answer is marked as unwanted, and what ``fix.propose`` raises.
    """
    from ..attribution.texts import conversation
    from ..fix import propose_for
    from ..fix.folder import keep
    from ..fix.proposal import finite

    proposal = propose_for(run)
    train, folder = proposal.attribution.train, keep(run, proposal)
    groups = []
    for group in proposal.removed[:_SHOWN]:
        example = train[group.positions[0]]
        parts = conversation(example)
        groups.append(
            {
                "id": example.id,
                "examples": len(group.positions),
                "question": parts.question[:_BRIEF],
                "answer": parts.answer[:_BRIEF],
                "effect": group.effect,
                "z": finite(group.z),
            }
        )
    return {
        "reason": proposal.reason,
        "folder": None if folder is None else str(folder),
        "count": len(proposal.positions),
        "of": len(train),
        "groups": groups,
        "command": command_line("fix", str(run.run_dir), "--retrain"),
    }


def candidates_of(run: Run, attribution: Attribution) -> Candidates | None:
    """The same ranking for a report; None where none of its answers is marked as unwanted."""
    import numpy as np

    from ..fix import marked, propose
    from ..report import Candidates

    unwanted, wanted = marked(run, attribution)
    if not unwanted:
        return None
    proposal = propose(attribution, unwanted, wanted)
    size = np.full(len(attribution.train), np.nan)
    for group in proposal.ranked:
        size[list(group.positions)] = group.z
    proposed = np.zeros(len(attribution.train), dtype=np.bool_)
    proposed[proposal.positions] = True
    against = f" against {len(wanted)} wanted" if wanted else ""
    proposal_words = (
        f"Proposed for removal: {len(proposal.positions)} ({proposal.reason}); daunce fix writes the cleaned file."
        if proposal.removed
        else f"Nothing is proposed for removal: {proposal.reason}"
    )
    words = (
        f"By how much each example pushes the {len(unwanted)} unwanted{against} answers, in standard errors; "
        f"near-duplicates count together. {proposal_words}"
    )
    return Candidates(size, proposed, "Unwanted (z)", words, outcome_of(run))


def outcome_of(run: Run) -> dict[str, Any] | None:
    """What the newest retraining of a run gave, as plain data; None without one."""
    from ..fix.folder import kept_fixes, kept_outcome

    return kept_outcome(*kept_fixes(run.run_dir))
