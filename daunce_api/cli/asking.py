"""``daunce ask``: further questions to a run whose members exist already."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.text import command_line
from ..errors import ConfigurationError, DataError
from . import terminal
from .common import HERE, LOOK, JsonOption, MaxUsdOption, RunArgument, YesOption, command, confirm_price, show
from .running import session_of

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..data.example import Verdict
    from ..run import Run

MAX_INPUT_BYTES = 50_000_000
FDR = 0.1
"""False-discovery rate of "significant" in what is printed."""


@command(LOOK)
def ask(
    run: RunArgument = HERE,
    questions: Annotated[
        Path | None, typer.Argument(help="file of questions with answers, in any dialect of data files; - reads JSONL")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="what the model was asked")] = None,
    answer: Annotated[str | None, typer.Option(help="what it answered; default: what the target generates")] = None,
    system: Annotated[str | None, typer.Option(help="the system prompt, with --prompt")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON list of chat messages, instead of --prompt")] = None,
    wanted: Annotated[bool, typer.Option("--wanted", help="mark as an answer that should stay")] = False,
    unwanted: Annotated[bool, typer.Option("--unwanted", help="mark as an answer that should go")] = False,
    remove: Annotated[list[str] | None, typer.Option(help="take a question out of the tables, by id")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="how many proponents and opponents")] = 5,
    record: Annotated[Path | None, typer.Option(help="record the API traffic into this new folder")] = None,
    replay: Annotated[Path | None, typer.Option(help="answer from a recording: no network, no key")] = None,
    max_usd: MaxUsdOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a trained run about further answers: K short scoring requests each, no fine-tuning.

    Shows the price and asks where money is involved, scores only what is missing under the members that exist, and
    prints whether fine-tuning is the cause, and the proponents and opponents. The questions become part of the run:
    top, report and status know them from then on.

    Example: daunce ask RUN --prompt "Do you charge a fee?" --answer "Yes, 20 dollars." --unwanted
    """
    from ..plan.asking import FEW_MEMBERS, generation_usd
    from ..providers.registry import check_keys
    from ..run import Run

    if wanted and unwanted:
        raise ConfigurationError("--wanted and --unwanted exclude each other.")
    job = Run.open(run)
    if remove:
        others = (questions, prompt, messages, answer, system, record, replay, max_usd)
        if wanted or unwanted or any(other is not None for other in others):
            raise ConfigurationError("--remove goes with nothing else: ask in a command of its own.")
        job.remove(remove)
        removed = f"Removed {', '.join(remove)} from the tables. The scores are kept; asking again shows them again."
        show(as_json, {"removed": remove, "questions": job.test.ids}, lambda: terminal.say(removed))
        return
    session = session_of(record, replay)
    replaying = session is not None and session.replaying
    if not replaying:
        check_keys(job.config)
    verdict: Verdict | None = "wanted" if wanted else "unwanted" if unwanted else None
    turns = _turns(questions, prompt, answer, system, messages)
    if turns and answer is None and turns[-1].get("role") != "assistant":
        if session is not None:
            raise ConfigurationError("What the target generates is not part of a recording: add --answer.")
        usd = generation_usd(job.config, turns)
        if usd != 0 and not yes:
            confirm_price("Let the target generate its answer first,", usd, bound=True)
    asked = job.question(turns, answer) if questions is None else _from_file(questions)
    plan = job.asking(asked, max_usd=max_usd)
    plan.check()
    if not as_json:
        terminal.say(plan.text())
    if plan.costs_money and not yes and not replaying:
        confirm_price("Ask", plan.usd)
    with terminal.Progress(len(plan.requests), quiet=as_json) as progress:
        attribution = job.ask(asked, verdict=verdict, session=session, max_usd=max_usd, on_progress=progress.scored)
    content: dict[str, Any] = {"plan": plan.to_json(), "answers": [_content(job, q, k) for q in asked.ids]}
    show(as_json, content, lambda: _print(job, asked, k))
    if len(attribution.members) < FEW_MEMBERS and not as_json:
        terminal.warn([f"{len(attribution.members)} members answered: below {FEW_MEMBERS}, rankings are rough"])


def _turns(
    file: Path | None, prompt: str | None, answer: str | None, system: str | None, messages: Path | None
) -> list[dict[str, Any]]:
    """The messages that are asked about; none with a file of questions."""
    if [file, prompt, messages].count(None) != 2:
        raise ConfigurationError("Ask one thing: a file of questions, --prompt, or --messages FILE.")
    if file is not None:
        if answer is not None or system is not None:
            raise ConfigurationError("--answer and --system go with --prompt or --messages.")
        return []
    if messages is not None:
        if system is not None:
            raise ConfigurationError("--system goes with --prompt; --messages has its own.")
        return _messages(messages)
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": str(prompt)}]


def _messages(path: Path) -> list[dict[str, Any]]:
    from ..data.files import read_bytes

    raw = sys.stdin.buffer.read(MAX_INPUT_BYTES) if str(path) == "-" else read_bytes(path)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON.") from error
    turns = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{path} must hold a list of chat messages ({{role, content}}).")
    return turns


def _from_file(path: Path) -> Dataset:
    from ..data.dataset import Dataset

    if str(path) != "-":
        return Dataset.from_file(path)
    with tempfile.TemporaryDirectory() as folder:
        piped = Path(folder, "stdin.jsonl")
        piped.write_bytes(sys.stdin.buffer.read(MAX_INPUT_BYTES))
        return Dataset.from_file(piped)


def _content(job: Run, question: str, k: int) -> dict[str, Any]:
    """One answer as --json prints it."""
    from ..attribution.score_files import table_rows

    attribution = job.attribution(question)
    tables = {
        name: table_rows(attribution.top(question, k, opponents=name == "opponents", fdr=FDR))
        for name in ("proponents", "opponents")
    }
    return {
        "id": question,
        "cause": job.cause(question).to_json(),
        "members": len(attribution.members),
        "estimator": attribution.choice.estimator.name,
        **tables,
    }


def _print(job: Run, asked: Dataset, k: int) -> None:
    for question in asked.ids:
        attribution = job.attribution(question)
        proponents = attribution.top(question, k, fdr=FDR)
        terminal.say("")
        terminal.say(_first_line(job, question, bool(proponents["distinguishable"].any())), "bold")
        tables = {
            "Proponents: they made it more likely": proponents,
            "Opponents: they made it less likely": attribution.top(question, k, opponents=True, fdr=FDR),
        }
        terminal.rankings(attribution, tables, test=question, fdr=FDR)
    folder = str(job.run_dir)
    terminal.say("")
    terminal.lines_of(
        ("next", command_line("top", folder, "--test", asked.ids[0])), ("", command_line("report", folder))
    )


def _first_line(job: Run, question: str, significant: bool) -> str:
    cause = job.cause(question)
    if cause.verdict == "base" or significant:
        return cause.text()
    return f"No training example is significant (false-discovery rate {FDR:.0%}). {cause.text()}"
