"""The command line: parse, call, print. Everything it does is a call of the package's public functions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import terminal
from .errors import ConfigurationError, DaunceError, MissingExtraError
from .version import __version__

if TYPE_CHECKING:
    from .attribution import Attribution
    from .budget import Plan
    from .pipeline import Run

EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected failure; 2 config, data or arguments are wrong; 3 refused before spending "
    "(budget, capability, shut-down date); 4 the run folder cannot be used; 5 the provider refused; 6 parked until a "
    "daily quota returns; 7 too few members are scored; 8 a recording does not cover the run; 130 interrupted with "
    "Ctrl-C, to be taken up by the same command."
)

INTERRUPTED = 130
"""What typer returns after Ctrl-C."""

app = typer.Typer(
    name="daunce",
    help="Which of my fine-tuning examples made the model answer this? Found with API calls alone.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ConfigArgument = Annotated[Path, typer.Argument(help="config file; `daunce init` writes one", metavar="CONFIG")]
RunArgument = Annotated[Path, typer.Argument(help="run folder (run_dir of the config)", metavar="RUN")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, nothing else")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask before money is spent or things are deleted")]


class Format(StrEnum):
    """How ``daunce top`` prints."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


class Question(StrEnum):
    """What a ranking is for; see ``daunce_api.core.QUESTIONS``."""

    ATTRIBUTION = "attribution"
    RETRIEVAL = "retrieval"


class Group(StrEnum):
    """What scores are summed over."""

    SOURCE = "source"


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="folder of the new run.yaml")] = Path(),
    train: Annotated[Path | None, typer.Option(help="training examples; default: a JSONL file found there")] = None,
    test: Annotated[Path | None, typer.Option(help="answers to explain; default: a JSONL file found there")] = None,
    backend: Annotated[str, typer.Option(help="embedded, openai, openai_wire, local, ...")] = "embedded",
    as_json: JsonOption = False,
) -> None:
    """Write a run.yaml in which every key is explained."""
    from .init import write_template

    path = write_template(folder, train=train, test=test, backend=backend)
    _print(as_json, {"config": str(path)}, lambda: terminal.say(f"Wrote {path}. Next: daunce plan {path}"))


@app.command()
def plan(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Jobs, tokens, dollars and time of a run. Nothing is sent, nothing is spent, no key is needed."""
    from .pipeline import Run

    job = Run.create(config)
    planned = job.plan()
    terminal.warn(job.warnings)
    _print(as_json, planned.to_json(), lambda: terminal.say(planned.text()))
    planned.check()


@app.command()
def run(
    config: ConfigArgument,
    yes: YesOption = False,
    record: Annotated[Path | None, typer.Option(help="record the API traffic into this new folder")] = None,
    replay: Annotated[Path | None, typer.Option(help="answer from a recording: no network, no key")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run folder at the end")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train the members, score them, attribute. The same command again does only what is missing."""
    from .pipeline import Run

    job = Run.create(config)
    planned = job.plan()
    terminal.warn(job.warnings)
    planned.check()
    if not as_json:
        terminal.say(planned.text())
    if planned.costs_money and not yes and replay is None:
        price = "an unknown price" if planned.usd is None else f"about ${planned.usd:,.2f}"
        _confirm(f"Start this run for {price}?")
    session = _session(record, replay)
    with terminal.Progress(job.config.ensemble.members, quiet=as_json) as progress:
        attribution = job.execute(on_event=progress.event, on_progress=progress.scored, session=session)
    status = job.status()
    page = _report_at_the_end(job, attribution) if report else None
    content = status.to_json() | {"report": None if page is None else str(page)}
    _print(as_json, content, lambda: terminal.finished(status, attribution, page))


@app.command()
def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """How far a run is, also while it is going on."""
    from .pipeline import Run

    state = Run.open(run).status()
    _print(as_json, state.to_json(), lambda: terminal.status(state))


@app.command()
def cancel(run: RunArgument, as_json: JsonOption = False) -> None:
    """Stop the jobs of a run that are still going on. What is trained and scored is kept."""
    from .pipeline import Run

    report = Run.open(run).cancel()
    content = {"cancelled": report.cancelled, "already_final": report.already_final, "kept": report.kept}
    _print(as_json, content, lambda: terminal.cancelled(report))


@app.command()
def clean(run: RunArgument, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Delete the files and models that a run created at the provider, and nothing else. Scores are kept."""
    from .pipeline import Run

    job = Run.open(run)
    if not yes:
        _confirm(f"Delete the remote files and models of {job.config.name}? Scores stay, the models are gone.")
    report = job.clean()
    content = {"models": report.models, "files": report.files, "kept": report.kept}
    _print(as_json, content, lambda: terminal.cleaned(report))


@app.command()
def top(
    run: RunArgument,
    test: Annotated[str, typer.Option(help="id of the answer to explain, as in the test file")],
    k: Annotated[int, typer.Option("-k", min=1, help="how many")] = 10,
    opponents: Annotated[bool, typer.Option("--opponents", help="those that made the answer less likely")] = False,
    by: Annotated[Group | None, typer.Option(help="sum over the examples of each source")] = None,
    question: Annotated[
        Question, typer.Option(help="effect on the loss, or which examples belong to the answer")
    ] = Question.ATTRIBUTION,
    fdr: Annotated[float | None, typer.Option(help="mark with this false-discovery rate over all pairs")] = None,
    estimator: Annotated[str | None, typer.Option(help="another estimator than the config's")] = None,
    form: Annotated[Format, typer.Option("--format", help="how to print")] = Format.TABLE,
    output: Annotated[Path | None, typer.Option(help="write to this file")] = None,
    as_json: JsonOption = False,
) -> None:
    """The training examples behind one answer, ranked; positive scores made the answer more likely."""
    from .export import write_table
    from .pipeline import Run

    attribution = Run.open(run).attribution()
    if estimator is not None:
        attribution = attribution.with_estimator(estimator)
    table = (
        attribution.top(test, k, opponents=opponents, question=question.value, fdr=fdr)
        if by is None
        else attribution.top_groups(test, k, opponents=opponents)
    )
    if as_json:
        form = Format.JSON
    if form is Format.TABLE and output is None:
        kind = "opponents" if opponents else "proponents"
        terminal.ranking(
            table, title=f"{kind} of {test}: {attribution.test[attribution.test.position(test)].prompt_text()}"
        )
    else:
        write_table(table, form.value, output)


@app.command()
def report(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="default: RUN/report.html")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML file that explains every answer; it opens from disk and needs no network."""
    from .pipeline import Run
    from .summary import write_report_of

    job = Run.open(run)
    page = write_report_of(job, job.attribution(), output)
    _print(as_json, {"report": str(page)}, lambda: terminal.say(f"Wrote {page}"))


@app.command()
def evaluate(
    run: RunArgument,
    retrieval: Annotated[
        Path | None, typer.Option(help="JSON: known training ids, as a list or by test id; nothing is trained")
    ] = None,
    lds: Annotated[bool, typer.Option("--lds", help="retrain on random subsets and compare with predictions")] = False,
    removal: Annotated[bool, typer.Option("--removal", help="retrain without each answer's top k")] = False,
    subsets: Annotated[int, typer.Option(help="for --lds")] = 100,
    seeds: Annotated[int, typer.Option(help="for --lds: fine-tunes on each subset")] = 1,
    k: Annotated[int, typer.Option("-k", help="for --removal: examples left out")] = 10,
    test: Annotated[list[str] | None, typer.Option(help="for --removal: ids; default: the first five")] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """How good the attribution is, beside BM25, embeddings and chance. The same command again goes on."""
    from . import experiments
    from .pipeline import Run

    if retrieval is None and not lds and not removal:
        raise ConfigurationError("Nothing to evaluate: add --retrieval LABELS, --lds or --removal.")
    job = Run.open(run)
    tables = []
    if retrieval is not None:
        attribution = job.attribution()
        tables.append(experiments.retrieval_table(attribution, experiments.read_labels(retrieval, attribution)))
    if lds:
        truth = experiments.lds_truth(job, subsets=subsets, seeds=seeds)
        _ask_for(truth.plan(), "--lds", yes=yes, as_json=as_json)
        with terminal.Progress(truth.ensemble.members, quiet=as_json) as progress:
            tables.append(experiments.lds_table(job, truth, on_event=progress.event, on_progress=progress.scored))
    if removal:
        experiment = experiments.removal_truth(job, k=k, tests=test or ())
        _ask_for(experiment.truth.plan(), "--removal", yes=yes, as_json=as_json)
        with terminal.Progress(experiment.truth.ensemble.members, quiet=as_json) as progress:
            tables.append(experiments.removal_table(experiment, on_event=progress.event, on_progress=progress.scored))
    text = "\n\n".join(f"{table.name}\n{table.text()}" for table in tables)
    _print(as_json, {"tables": [table.to_json() for table in tables]}, lambda: terminal.say(text))


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="daunce-tiny, smollm2-135m, or a model folder")] = "daunce-tiny",
    host: Annotated[str, typer.Option(help="address; others than loopback need an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DAUNCE_SERVE_API_KEY", help="key that clients must send", show_envvar=True)
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="folder of files, jobs and models; default: the user's state folder")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="fine-tuning jobs at once")] = 1,
    inject: Annotated[str | None, typer.Option(help="faults, such as rate_limit=0.1,error_500=0.05,seed=3")] = None,
) -> None:
    """Serve OpenAI's wire format (fine-tuning, echo log-probabilities) over a local model."""
    from .server import ServerSettings, run_server

    options = {"model": model, "state_dir": state_dir, "api_key": api_key, "workers": workers, "inject": inject}
    settings = ServerSettings.from_options({k: v for k, v in options.items() if v is not None})

    def ready(base_url: str) -> None:
        terminal.say(f"Serving {model} at {base_url} (Ctrl-C stops it)")

    run_server(settings, host, port, on_ready=ready)


@app.command()
def doctor(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Ask the configured endpoint for one tiny example: what it can do, how noisy and fast it is, what to change."""
    from .doctor import examine
    from .pipeline import Run

    findings = examine(Run.create(config))
    _print(as_json, findings.to_json(), lambda: terminal.say(findings.text()))


@app.command()
def demo(
    members: Annotated[int, typer.Option(min=8, help="fine-tunes")] = 24,
    folder: Annotated[Path, typer.Option(help="folder of the run")] = Path("daunce-demo"),
    as_json: JsonOption = False,
) -> None:
    """The main job on real data with the embedded provider: find a planted backdoor. No key, no configuration."""
    from .demo import run_demo

    with terminal.Progress(members, quiet=as_json) as progress:
        result = run_demo(folder, members=members, on_event=progress.event, on_progress=progress.scored)
    page = _report_at_the_end(result.run, result.attribution)
    content = result.to_json() | {"report": None if page is None else str(page)}
    _print(as_json, content, lambda: terminal.demo(result, page))


def _ask_for(planned: Plan, what: str, *, yes: bool, as_json: bool) -> None:
    """Show the price of an experiment first, and ask where it costs money."""
    planned.check()
    if not as_json:
        terminal.say(planned.text())
    if planned.costs_money and not yes:
        price = "an unknown price" if planned.usd is None else f"about ${planned.usd:,.2f}"
        _confirm(f"Train the models of {what} for {price}?")


def _report_at_the_end(job: Run, attribution: Attribution) -> Path | None:
    """The report, or a word on what it lacks: the run itself is done and kept."""
    from .summary import write_report_of

    try:
        return write_report_of(job, attribution)
    except MissingExtraError as missing:
        terminal.warn([f"{missing}; then: daunce report {job.run_dir}"])
        return None


def _session(record: Path | None, replay: Path | None) -> Any:
    from . import replay as recording

    if record is not None and replay is not None:
        raise ConfigurationError("--record and --replay exclude each other: a replay sends nothing to record.")
    if record is not None:
        return recording.record(record)
    return None if replay is None else recording.replay(replay)


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{question} There is nobody to ask: add --yes to say so beforehand.")
    typer.confirm(question, abort=True, err=True)


def _print(as_json: bool, content: dict[str, Any], show: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(content, allow_nan=False, default=str))
    else:
        show()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; no traceback reaches a user for an error of this package."""
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            terminal.error("Interrupted. What was done is kept: the same command goes on, `daunce cancel` stops jobs.")
    except DaunceError as error:
        if as_json:
            typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        terminal.error(str(error))
        code = error.exit_code
    except typer.Abort:
        terminal.error("Stopped; nothing was sent.")
        code = INTERRUPTED
    except typer.TyperException as error:
        terminal.error(f"{error.format_message()} `daunce --help` and `daunce COMMAND --help` show what there is.")
        code = 2
    except BrokenPipeError:
        code = 0
    sys.exit(code)
