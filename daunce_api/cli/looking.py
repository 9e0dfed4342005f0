"""Commands that look at what a run has: how far it is, its rankings, its report, and how good they are."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import terminal
from ..errors import ConfigurationError
from .common import LOOK, JsonOption, RunArgument, YesOption, command, confirm_price, show

if TYPE_CHECKING:
    from ..budget import Plan


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


@command(LOOK)
def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """How far a run is, also while it is going on.

    Members trained and scored, tokens, money and time spent, scoring noise, the estimator and why it was chosen, and
    self_lds, an estimate of the ranking's quality without further fine-tunes.
    """
    from ..pipeline import Run

    state = Run.open(run).status()
    show(as_json, state.to_json(), lambda: terminal.status(state))


@command(LOOK)
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
    """The training examples behind one answer, ranked; positive scores made the answer more likely.

    Every score comes with its 95 % interval; what cannot be told from zero is dim.

    Example: daunce top RUN --test q-17 --by source
    """
    from ..export import write_table
    from ..pipeline import Run

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
        example = attribution.test[attribution.test.position(test)]
        kind = "opponents" if opponents else "proponents"
        if by is not None:
            kind = f"{by.value}s ({'most harmful' if opponents else 'most helpful'} first)"
        terminal.ranking(table, title=f"{kind} of {test}: {example.prompt_text()} → {example.completion_text()}")
    else:
        write_table(table, form.value, output)


@command(LOOK)
def report(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="default: RUN/report.html")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML file that explains every answer; it opens from disk and needs no network.

    Each answer with the training examples and the tokens behind it, scores by source, examples to look at again, and
    how far the scores can be trusted. `daunce run` writes it too.
    """
    from ..pipeline import Run
    from ..summary import write_report_of

    job = Run.open(run)
    page = write_report_of(job, job.attribution(), output)
    show(as_json, {"report": str(page)}, lambda: terminal.say(f"Wrote {page}"))


@command(LOOK)
def evaluate(
    run: RunArgument,
    retrieval: Annotated[
        Path | None, typer.Option(help="JSON: known training ids, as a list or by test id; nothing is trained")
    ] = None,
    lds: Annotated[
        bool,
        typer.Option("--lds", help="linear datamodeling score: retrain on random subsets, compare with predictions"),
    ] = False,
    removal: Annotated[
        bool, typer.Option("--removal", help="loss after retraining without each answer's top k, against random k")
    ] = False,
    subsets: Annotated[int, typer.Option(help="for --lds: random subsets to retrain on")] = 100,
    seeds: Annotated[int, typer.Option(help="for --lds: fine-tunes on each subset")] = 1,
    k: Annotated[int, typer.Option("-k", help="for --removal: examples left out")] = 10,
    test: Annotated[
        list[str] | None, typer.Option(help="for --removal: id of an answer; may be repeated; default: the first five")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """How good the attribution is, beside BM25, embeddings and chance. The same command again goes on.

    --retrieval needs nothing but labels. --lds and --removal fine-tune new models through the run's own backend, none
    of them in the ensemble; the plan and its price come first.
    """
    from .. import experiments
    from ..pipeline import Run

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
    show(as_json, {"tables": [table.to_json() for table in tables]}, lambda: terminal.say(text))


def _ask_for(planned: Plan, what: str, *, yes: bool, as_json: bool) -> None:
    """Show the price of an experiment first, and ask where it costs money."""
    planned.check()
    if not as_json:
        terminal.say(planned.text())
    if planned.costs_money and not yes:
        confirm_price(planned, f"Train the models of {what}")
