"""``daunce fix``: what to take out so that unwanted answers go away, and whether it helped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .._util.text import command_line, phrase, rich_text, terminal_text
from ..errors import ConfigurationError
from . import terminal
from .common import (
    HERE,
    LOOK,
    JsonOption,
    MaxUsdOption,
    RunArgument,
    YesOption,
    command,
    confirm_price,
    only_with,
    show,
    without_none,
)

if TYPE_CHECKING:
    from ..fix import Proposal
    from ..fix.retraining import Outcome

_SHOWN, _SAID = 20, 5


@command(LOOK)
def fix(
    run: RunArgument = HERE,
    unwanted: Annotated[list[str] | None, typer.Option(help="id of an answer that the model should not give")] = None,
    wanted: Annotated[list[str] | None, typer.Option(help="id of an answer that it should keep giving")] = None,
    fdr: Annotated[float | None, typer.Option(help="expected share of false entries of the list; default: 0.1")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="take out this many, whatever their significance")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="fine-tune without them and compare the answers")] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="with --retrain: models of each kind; default: 3")] = None,
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

    only_with("--retrain", retrain, seeds=seeds, max_usd=max_usd)
    if fdr is not None and top is not None:
        raise ConfigurationError("--top takes out that many whatever their significance: leave --top or --fdr out.")
    if both := set(unwanted or ()) & set(wanted or ()):
        raise ConfigurationError(f"{min(both)} is marked as both wanted and unwanted: choose one.")
    job = Run.open(run)
    if unwanted:
        job.mark(unwanted, "unwanted")
    if wanted:
        job.mark(wanted, "wanted")
    rule = without_none(fdr=fdr, top=top)
    proposal = propose_for(job, **rule)
    folder = keep(job, proposal)
    content = _content(proposal) | {"folder": None if folder is None else str(folder)}
    if not as_json:
        words = [word for name, value in rule.items() for word in (f"--{name}", str(value))]
        again = command_line("fix", str(job.run_dir), *words, "--retrain")
        _show(proposal, str(folder), "" if retrain else again)
    if retrain and folder is not None:
        retrained = retraining_of(job, proposal, **without_none(seeds=seeds))
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
    from ..attribution.score_files import table_rows

    rows = proposal.table().drop(columns=["prompt", "completion"])
    return {
        "unwanted": list(proposal.unwanted),
        "wanted": list(proposal.wanted),
        "removed": proposal.ids,
        "reason": proposal.reason,
        "groups": table_rows(rows),
        "changes": [change.to_json() for change in proposal.changes],
    }


def _show(proposal: Proposal, folder: str, following: str) -> None:
    from ..attribution.texts import conversation

    out, train, test = terminal.out, proposal.attribution.train, proposal.attribution.test
    if not proposal.removed:
        terminal.say(f"Nothing is proposed: {proposal.reason}")
        return
    count = len(proposal.positions)
    terminal.say(f"Take out {count:,} of {len(train):,} training examples ({proposal.reason})", "bold")
    scale = terminal.Scale(g.effect for g in proposal.removed)
    view = terminal.grid("", f"effect{scale.unit}", "z", text="training example")
    for rank, group in enumerate(proposal.removed[:_SHOWN], start=1):
        first, more = train[group.positions[0]], len(group.positions) - 1
        name = terminal_text(first.id, 24) + (f" and {more} near-duplicates" if more else "")
        shown = conversation(first)
        text = terminal.example(shown.answer, shown.question, max(out.width - 24, 24), name)
        view.add_row(str(rank), scale.number(group.effect), f"{group.z:.1f}", text)
    out.print(view, soft_wrap=False)
    if len(proposal.removed) > _SHOWN:
        terminal.say(f"and {len(proposal.removed) - _SHOWN} more in removed.jsonl", "dim")
    known = [c for c in proposal.changes if not math.isnan(c.expected)]
    if known:
        terminal.say("\nExpected change of each marked answer's loss without them (nats a token)", "bold")
        view = terminal.grid("", "", "95 % interval", text="answer")
        for change in known:
            answer = phrase(test[test.position(change.id)].completion_text(), max(out.width - 36, 20))
            interval = f"{change.low:+.2f} to {change.high:+.2f}"
            view.add_row(change.verdict, f"{change.expected:+.2f}", interval, Text(answer))
        out.print(view, soft_wrap=False)
    out.print()
    terminal.lines_of(("wrote", folder), ("next", following))


def _show_outcome(found: Outcome) -> None:
    from ..fix.retraining import ALL, CLEANED, RANDOM

    out = terminal.out
    terminal.say(f"\n{found.verdict}", "bold")
    view = terminal.grid("before", "after", "random", "loss", text="probability a token of")
    for answer in found.answers:
        known = not math.isnan(answer.change)
        numbers = [f"{answer.probability(arm):.3f}" for arm in (ALL, CLEANED, RANDOM)] + [f"{answer.change:+.2f}"]
        view.add_row(*(numbers if known else ["-"] * len(numbers)), rich_text(f"{answer.verdict} {answer.id}"))
    out.print(view, soft_wrap=False)
    terminal.say(f"{found.seeds} models of each kind; before: all data; random: without as many others", "dim")
    for answer in found.answers[:_SAID] if any(a.said for a in found.answers) else ():
        terminal.say(f"\n{terminal_text(answer.id, 40)}, as one model of each answers by itself", "dim")
        for name, arm in (("before", ALL), ("after", CLEANED)):
            out.print(Text(f"  {name:<8}{phrase(answer.said.get(arm, '-'), max(out.width - 10, 20))}"))
