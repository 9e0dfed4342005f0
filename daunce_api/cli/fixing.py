"""``daunce fix``: what to take out so that unwanted answers go away, and whether it helped."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .._util.text import command_line, phrase, rich_text, terminal_text
from ..errors import ConfigurationError
from . import terminal
from .common import HERE, LOOK, JsonOption, MaxUsdOption, RunArgument, YesOption, command, confirm_price, show

if TYPE_CHECKING:
    from ..fix import Proposal
    from ..fix.retraining import Outcome

DEFAULT_FDR = 0.1
_SHOWN, _SAID = 20, 5


@command(LOOK)
def fix(
    run: RunArgument = HERE,
    unwanted: Annotated[list[str] | None, typer.Option(help="id of an answer that the model should not give")] = None,
    wanted: Annotated[list[str] | None, typer.Option(help="id of an answer that it should keep giving")] = None,
    fdr: Annotated[float, typer.Option(help="expected share of false entries of the list")] = DEFAULT_FDR,
    top: Annotated[int | None, typer.Option(min=1, help="take out this many, whatever their significance")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="fine-tune without them and compare the answers")] = False,
    seeds: Annotated[int, typer.Option(min=2, help="models of each kind with --retrain")] = 3,
    yes: YesOption = False,
    max_usd: MaxUsdOption = None,
    as_json: JsonOption = False,
) -> None:
    """Propose training examples to take out: those that make unwanted answers likelier, against wanted ones.

    Answers are marked by --unwanted and --wanted (here or in `daunce ask`), by a field `verdict` in the file of
    questions, or in `daunce view`. Writes RUN/fix/N: the training file without them in its own format, and
    removed.jsonl with the reasons. With --retrain, also models on the cleaned data, on all data, and without as many
    random examples; the price comes first.
    """
    from ..fix import propose_for
    from ..fix.folder import keep, keep_outcome, kept_outcome
    from ..fix.retraining import outcome, retraining_of
    from ..run import Run

    if both := set(unwanted or ()) & set(wanted or ()):
        raise ConfigurationError(f"{min(both)} is marked as both wanted and unwanted: choose one.")
    job = Run.open(run)
    if unwanted:
        job.mark(unwanted, "unwanted")
    if wanted:
        job.mark(wanted, "wanted")
    proposal = propose_for(job, fdr=fdr, top=top)
    folder = keep(job, proposal)
    content = _content(proposal) | {"folder": None if folder is None else str(folder)}
    if not as_json:
        chosen = ["--top", str(top)] if top is not None else ["--fdr", str(fdr)] if fdr != DEFAULT_FDR else []
        again = command_line("fix", str(job.run_dir), *chosen, "--retrain")
        _show(proposal, str(folder), "" if retrain else again)
    if retrain and folder is not None:
        retrained = retraining_of(job, proposal, seeds=seeds)
        plan = retrained.plan(max_usd=max_usd)
        plan.check()
        if not as_json:
            terminal.say("\n" + plan.text())
        if plan.costs_money and not yes:
            confirm_price("Retrain", plan.usd)
        with terminal.Progress(retrained.config.ensemble.members, quiet=as_json) as progress:
            found = outcome(
                retrained,
                proposal,
                known=kept_outcome(folder),
                on_event=progress.event,
                on_progress=progress.scored,
            )
        keep_outcome(folder, found)
        content["outcome"] = found.to_json()
        if not as_json:
            _show_outcome(found)
    show(as_json, content, lambda: None)


def _content(proposal: Proposal) -> dict[str, Any]:
    rows = proposal.table().drop(columns=["prompt", "completion"])
    return {
        "unwanted": list(proposal.unwanted),
        "wanted": list(proposal.wanted),
        "removed": proposal.ids,
        "reason": proposal.reason,
        "groups": json.loads(rows.to_json(orient="records", double_precision=15)),
        "changes": [change.to_json() for change in proposal.changes],
    }


def _show(proposal: Proposal, folder: str, following: str) -> None:
    from ..attribution.texts import conversation

    out = terminal.out
    count, total = len(proposal.positions), len(proposal.attribution.train)
    if not proposal.removed:
        terminal.sentence(f"Nothing is proposed: {proposal.reason}")
        return
    terminal.sentence(f"Take out {count:,} of {total:,} training examples ({proposal.reason})", style="bold")
    scale = terminal.Scale(g.effect for g in proposal.removed)
    view = terminal.grid("", f"effect{scale.unit}", "z", text="training example")
    for rank, group in enumerate(proposal.removed[:_SHOWN], start=1):
        example = proposal.attribution.train[group.positions[0]]
        shown = conversation(example)
        more = len(group.positions) - 1
        aside = f" · {terminal_text(example.id, 24)}" + (f" and {more} near-duplicates" if more else "")
        width = max(out.width - 24, 24)
        text = Text(phrase(shown.answer, width))
        text.append("\n" + phrase(shown.question, max(width - len(aside), 12)) + aside, style="dim")
        view.add_row(str(rank), scale.number(group.effect), f"{group.z:.1f}", text)
    out.print(view, soft_wrap=False)
    if len(proposal.removed) > _SHOWN:
        terminal.sentence(f"and {len(proposal.removed) - _SHOWN} more in removed.jsonl", style="dim")
    known = [c for c in proposal.changes if not math.isnan(c.expected)]
    if known:
        out.print(Text("\nExpected change of each marked answer's loss without them (nats a token)", style="bold"))
        _rows(((c.verdict, c.expected, c.low, c.high, c.id) for c in known), proposal)
    out.print()
    terminal.lines_of(("wrote", terminal_text(folder)), ("next", following))


def _rows(rows: Any, proposal: Proposal) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    for width in (8, 6, 16):
        table.add_column(no_wrap=True, min_width=width)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    test = proposal.attribution.test
    for verdict, value, low, high, identity in rows:
        table.add_row(
            Text(verdict, style="dim"),
            Text(f"{value:+.2f}"),
            Text(f"{low:+.2f} to {high:+.2f}"),
            Text(phrase(test[test.position(identity)].completion_text(), max(terminal.out.width - 36, 20))),
        )
    terminal.out.print(table, soft_wrap=False)


def _show_outcome(found: Outcome) -> None:
    from ..fix.retraining import ALL, CLEANED, RANDOM

    out = terminal.out
    out.print()
    terminal.sentence(terminal_text(found.verdict), style="bold")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("probability a token", "before", "after", "random", "loss"):
        table.add_column(name, justify="left" if name.startswith("prob") else "right", no_wrap=True)
    for answer in found.answers:
        table.add_row(
            rich_text(f"{answer.verdict} {answer.id}", 40),
            *(f"{answer.probability(arm):.3f}" for arm in (ALL, CLEANED, RANDOM)),
            f"{answer.change:+.2f}",
        )
    out.print(table)
    kinds = f"{found.seeds} models of each kind; before: all data; random: without as many others"
    terminal.sentence(kinds, style="dim")
    for answer in found.answers[:_SAID] if any(a.said for a in found.answers) else ():
        out.print(Text(f"\n{terminal_text(answer.id, 40)}, as one model of each answers by itself", style="dim"))
        for name, arm in (("before", ALL), ("after", CLEANED)):
            out.print(Text(f"  {name:<8}{phrase(answer.said.get(arm, '-'), max(out.width - 10, 20))}"))
