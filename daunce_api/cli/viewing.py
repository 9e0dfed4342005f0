"""``daunce view``, and the removal ranking of marked answers as pages show it."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.text import command_line
from ..errors import ConfigurationError
from . import terminal
from .common import HERE, LOOK, command

if TYPE_CHECKING:
    from ..attribution import Attribution
    from ..report import Candidates, Retrained
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

    runs = Runs(folder, fix=proposal_of, candidates=candidates_of, outcome=lambda run: outcome_of(run)[0])
    serve(runs, host=host, port=port, on_start=started)


def proposal_of(run: Run) -> dict[str, Any]:
    """What to take out of a run with marked answers, kept in its folder, as plain data.

    Raises ConfigurationError where no answer is marked as unwanted, and what ``fix.propose`` raises.
    """
    from ..attribution.texts import conversation
    from ..fix import propose
    from ..fix.folder import keep

    for attribution in run.attributions():
        unwanted, wanted = marked(run, attribution)
        if unwanted:
            break
    else:
        raise ConfigurationError("No answer is marked as unwanted. Mark those that the model should not give.")
    proposal = propose(attribution, unwanted, wanted)
    folder = keep(run, proposal)
    groups = []
    for group in proposal.removed[:_SHOWN]:
        example = attribution.train[group.positions[0]]
        parts = conversation(example)
        groups.append(
            {
                "id": example.id,
                "examples": len(group.positions),
                "question": parts.question[:_BRIEF],
                "answer": parts.answer[:_BRIEF],
                "effect": group.effect,
                "z": group.z if group.z == group.z else None,
            }
        )
    return {
        "reason": proposal.reason,
        "folder": str(folder),
        "count": len(proposal.positions),
        "of": len(attribution.train),
        "groups": groups,
        "command": command_line("fix", str(run.run_dir), "--retrain"),
    }


def candidates_of(run: Run, attribution: Attribution) -> Candidates | None:
    """The same ranking for a report; None where none of its answers is marked as unwanted."""
    import numpy as np

    from ..fix import propose
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
    verdict, retrained = outcome_of(run)
    return Candidates(size, proposed, "Unwanted (z)", words, verdict, retrained)


def outcome_of(run: Run) -> tuple[str, tuple[Retrained, ...]]:
    """What the newest retraining of a run says, in a sentence and for each answer; '' and nothing without one."""
    from ..fix.folder import kept_fixes, kept_outcome
    from ..fix.retraining import ALL, ARMS, CLEANED
    from ..report import Retrained

    kept = next((found for folder in reversed(kept_fixes(run.run_dir)) if (found := kept_outcome(folder))), None)
    if kept is None:
        return "", ()
    unknown = float("nan")
    return kept["verdict"], tuple(
        Retrained(
            a["id"],
            a["verdict"],
            tuple(a["loss"][arm] for arm in ARMS),
            tuple(a["probability"][arm] for arm in ARMS),
            tuple(unknown if a[name] is None else a[name] for name in ("change", "low", "high")),
            (said[ALL], said[CLEANED]) if (said := a.get("said")) else None,
        )
        for a in kept["answers"]
    )


def marked(run: Run, attribution: Attribution) -> tuple[list[str], list[str]]:
    """Ids of unwanted and of wanted answers among those of an attribution."""
    verdicts = run.questions.verdicts
    unwanted, wanted = ([i for i in attribution.test.ids if verdicts.get(i) == v] for v in ("unwanted", "wanted"))
    return unwanted, wanted
