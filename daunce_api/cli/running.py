"""Commands that start, resume and end a run; what they send is shown first, and confirmed where it costs money."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .._util.text import command_line
from ..errors import ConfigurationError
from . import terminal
from .common import (
    HERE,
    MAKE,
    ConfigArgument,
    JsonOption,
    MaxUsdOption,
    RunArgument,
    YesOption,
    command,
    confirm,
    confirm_price,
    error_content,
    only_with,
    show,
)

DEMO_SECONDS = 10.0, 2.5
"""To start with, and per member, on two cores."""


@command(MAKE)
def init(
    folder: Annotated[Path, typer.Argument(help="folder of the new run.yaml")] = Path(),
    train: Annotated[Path | None, typer.Option(help="training examples; default: a file found there")] = None,
    test: Annotated[Path | None, typer.Option(help="answers to explain; default: a file found there")] = None,
    backend: Annotated[
        str, typer.Option(help="embedded, local, openai, azure, together, fireworks, nebius, tinker, openai_wire")
    ] = "embedded",
    as_json: JsonOption = False,
) -> None:
    """Write a run.yaml in which every key is explained.

    Training examples and answers to explain are JSONL, JSON, CSV or Parquet files in any common dialect (chats,
    prompts and completions, Alpaca, ShareGPT, ...); those found in the folder are entered. Next: daunce plan run.yaml
    """
    from ..config import RunConfig
    from ..providers.registry import BACKENDS, known
    from .template import described, write_template

    known(BACKENDS, backend, "--backend")
    path = write_template(folder, train=train, test=test, backend=backend)
    data = RunConfig.from_yaml(path).data
    missing = [str(file) for file in (data.train, data.test) if not file.exists()]
    seen = {side: described(file)[0] for side, file in (("train", data.train), ("test", data.test))}
    put = f" Put your examples into {' and '.join(missing)}, or name other files under data:." if missing else ""
    content = {"config": str(path), "missing": missing, **seen}
    files = "".join(f"\n  data.{side}: {getattr(data, side).name} ({what})" for side, what in seen.items())
    show(as_json, content, lambda: terminal.say(f"Wrote {path}.{put}{files}\nNext: {command_line('plan', str(path))}"))


@command(MAKE)
def plan(
    config: ConfigArgument,
    max_usd: MaxUsdOption = None,
    advice: Annotated[
        bool, typer.Option("--advise", help="which recipes are worth a budget (--max-usd), by what was measured")
    ] = False,
    noise: Annotated[
        float | None, typer.Option(help="with --advise: scoring noise in nats, as `daunce doctor` reports it")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Jobs, tokens, dollars and time of what a run still has to do. Nothing is sent or spent, and no key is needed.

    Ends with exit code 3 where `daunce run` would refuse to start: above budget.max_usd, beyond what the endpoint can
    do, or past the day on which the model shuts down.
    """
    from ..plan.advice import advise
    from ..run import Run

    only_with("--advise", advice, noise=noise)
    job = Run.create(config)
    if advice:
        advised = advise(job, max_usd, noise)
        show(as_json, advised.to_json(), lambda: terminal.say(advised.text()))
        return
    planned = job.plan(max_usd=max_usd)
    terminal.warn(job.warnings)
    refusal = next(iter(planned.refusals), None)
    content = planned.to_json() | ({} if refusal is None else error_content(type(refusal).__name__, str(refusal)))
    show(as_json, content, lambda: terminal.say(planned.text()))
    if refusal is not None:  # the plan says why
        raise typer.Exit(refusal.exit_code)


@command(MAKE)
def run(
    config: ConfigArgument,
    yes: YesOption = False,
    record: Annotated[Path | None, typer.Option(help="record the API traffic into this new folder")] = None,
    replay: Annotated[Path | None, typer.Option(help="answer from a recording: no network, no key")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run folder at the end")] = True,
    max_usd: MaxUsdOption = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="take over jobs of this run that its folder does not know (a copy, a loss)")
    ] = False,
    accept_suspect: Annotated[
        bool, typer.Option("--accept-suspect", help="use scores that were set aside because members seemed alike")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the members, score them, attribute. Rerun the command to resume: it does only what is missing.

    Shows the plan and asks before money is spent. It may be interrupted or killed at any moment: what was trained and
    scored is kept, and no job is paid for twice. Ends with report.html in the run folder.
    """
    from ..providers.registry import check_keys
    from ..report.page import write_report_of
    from ..run import Run
    from ..score import health
    from ..store import RunStore

    job = Run.create(config, adopt=adopt)
    planned = job.plan(max_usd=max_usd)
    terminal.warn(job.warnings)
    planned.check()
    if replay is None and planned.models + planned.jobs:
        check_keys(job.config)  # before any question about money
    if not as_json:
        terminal.say(planned.text())
    if planned.costs_money and not yes and replay is None:
        confirm_price("Start this run", planned.usd)
    session = session_of(record, replay)
    if accept_suspect and RunStore.exists(job.run_dir):
        health.accept_suspect(job.run_dir)
    with terminal.Progress(job.config.ensemble.members, quiet=as_json) as progress:
        attribution = job.execute(
            on_event=progress.event, on_progress=progress.scored, session=session, max_usd=max_usd
        )
    page = write_report_of(job, attribution) if report else None
    status = job.status()  # after the report, which computes the quality
    content = status.to_json() | {"report": None if page is None else str(page)}
    show(as_json, content, lambda: terminal.finished(status, attribution, page))


@command(MAKE)
def cancel(run: RunArgument = HERE, as_json: JsonOption = False) -> None:
    """Stop the jobs of a run that are still running. What is trained and scored is kept.

    `daunce run` with the run's config resumes it.
    """
    from ..score.cleaning import cancel_run

    report = cancel_run(run)
    show(as_json, asdict(report), lambda: terminal.cancelled(report))


@command(MAKE)
def clean(run: RunArgument = HERE, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Delete the files and models that a run created at the provider, and what it left on the scoring server
    (deployments, adapters); nothing else. Scores are kept.

    Rankings and reports keep working; members that are not scored yet would have to be trained again.
    """
    from ..score.cleaning import clean_run
    from ..store import RunStore

    with RunStore.open(run, read_only=True) as store:  # neither its data nor its tokenizer may be there any more
        name = store.manifest["config"]["name"]
    if not yes:
        confirm(f"Delete the remote files and models of {name}? Scores stay, the models are gone.")
    report = clean_run(run)
    show(as_json, asdict(report), lambda: terminal.cleaned(report))


@command(MAKE)
def demo(
    members: Annotated[int, typer.Option(min=4, help="fine-tunes")] = 12,
    folder: Annotated[Path, typer.Option(help="folder of the run")] = Path("daunce-demo"),
    as_json: JsonOption = False,
) -> None:
    """Why does my model shout? Find the training examples behind answers in capitals. No key, no configuration.

    Fine-tunes members of a small language model through OpenAI's wire format, served on this machine, and compares the
    finding with text search. Needs the extra `server`.
    """
    from ..report.page import write_report_of
    from .demo import screen

    guess = DEMO_SECONDS[0] + DEMO_SECONDS[1] * members
    if not as_json:
        screen.begins(members, folder, first_guess=guess)
    with terminal.Progress(members, quiet=as_json, first_guess=guess) as progress:
        from .demo.experiment import run_demo

        result = run_demo(folder, members=members, on_event=progress.event, on_progress=progress.scored)
    page = write_report_of(result.run, result.attribution)
    content = result.to_json() | {"report": str(page)}
    show(as_json, content, lambda: screen.found(result, page))


def session_of(record: Path | None, replay: Path | None) -> Any:
    """A session that records or replays the API traffic, or None."""
    from ..providers import replay as recording

    if record is not None and replay is not None:
        raise ConfigurationError("--record and --replay exclude each other: a replay sends nothing to record.")
    if record is not None:
        return recording.record(record)
    return None if replay is None else recording.replay(replay)
