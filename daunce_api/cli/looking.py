"""Commands that look at what a run has: how far it is, its rankings, its report, and how good they are."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigurationError
from . import terminal
from .common import (
    HERE,
    LOOK,
    JsonOption,
    RunArgument,
    YesOption,
    command,
    confirm_price,
    file_named,
    only_with,
    show,
    without_none,
)

if TYPE_CHECKING:
    from ..evaluation.table import Table
    from ..plan import Plan
    from ..run import Run


TableFormat = Literal["table", "csv", "json", "parquet"]
ExportFormat = Literal["npy", "csv", "parquet", "bergson", "dattri"]
EXPORT_FOLDER = "export"
EXPORT_NAMES: dict[ExportFormat, str] = {
    "npy": "scores.npy",
    "csv": "scores.csv",
    "parquet": "scores.parquet",
    "bergson": "bergson",
    "dattri": "dattri.npz",
}
ESTIMATORS = "auto, covariance, correlation, inclusion, whitened, half_whitened"
"""Written out, since importing the core takes a second; a test compares them."""
EstimatorOption = Annotated[str | None, typer.Option(help=f"another estimator than the config's: {ESTIMATORS}")]


@command(LOOK)
def status(run: RunArgument = HERE, as_json: JsonOption = False) -> None:
    """How far a run is, also while it is running.

    Members trained and scored, tokens, money and time spent, scoring noise, the estimator and why it was chosen, and
    self_lds, an estimate of the ranking's quality without further fine-tunes.
    """
    from ..run import Run

    state = Run.open(run).status()
    show(as_json, state.to_json(), lambda: terminal.status(state))


@command(LOOK)
def top(
    run: RunArgument = HERE,
    test: Annotated[
        str | None, typer.Option(help="id of the answer to explain, as in the test file; default: the first")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="how many")] = 10,
    opponents: Annotated[bool, typer.Option("--opponents", help="those that made the answer less likely")] = False,
    by: Annotated[Literal["source"] | None, typer.Option(help="sum over the examples of each source")] = None,
    question: Annotated[
        Literal["attribution", "retrieval"],
        typer.Option(help="effect on the loss, or which examples belong to the answer"),
    ] = "attribution",
    fdr: Annotated[
        float | None, typer.Option(help="mark with this false-discovery rate over all pairs (sources and answers)")
    ] = None,
    estimator: EstimatorOption = None,
    form: Annotated[TableFormat, typer.Option("--format", help="how to print")] = "table",
    output: Annotated[Path | None, typer.Option(help="write to this file", callback=file_named)] = None,
    as_json: JsonOption = False,
) -> None:
    """The training examples behind one answer, ranked; positive scores made the answer more likely.

    Every score comes with its 95 % interval; what is not significant (5 %, per pair) is dim.

    Example: daunce top RUN --test q-17 --by source
    """
    from ..attribution import Attribution
    from ..attribution.score_files import write_table
    from ..attribution.tables import top_folded
    from ..run import Run

    if as_json:
        only_with("--format json", form in ("table", "json"), json=True)
        form = "json"
    attribution = Run.open(run).attribution(test)
    if estimator is not None:
        attribution = attribution.with_estimator(estimator)
    test = attribution.test.ids[0] if test is None else test
    ranked = top_folded if form == "table" and output is None else Attribution.top
    table = (
        ranked(attribution, test, k, opponents=opponents, question=question, fdr=fdr)
        if by is None
        else attribution.top_groups(test, k, by=by, opponents=opponents, question=question, fdr=fdr)
    )
    if form == "table" and output is None:
        kind = "opponents" if opponents else "proponents"
        if by is not None:
            kind = f"{by}s, {'most harmful' if opponents else 'most helpful'} first"
        terminal.rankings(attribution, {kind: table}, test=test, fdr=fdr)
    else:
        write_table(table, form, output)


@command(LOOK)
def export(
    run: RunArgument = HERE,
    form: Annotated[ExportFormat, typer.Option("--format", help="what to write")] = "csv",
    output: Annotated[
        Path | None,
        typer.Option(
            help="file, for bergson a folder; default: in RUN/export, named by the format", callback=file_named
        ),
    ] = None,
    estimator: EstimatorOption = None,
    seeds: Annotated[
        int | None, typer.Option(help="for dattri: which truth, where --lds ran with several numbers of --seeds")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the scores of all pairs in a form that other tools read; positive = helpful.

    npy: one array, training examples down, answers across, in the order of RUN/data. csv, parquet: one row a pair
    (train_id, test_id, score). bergson: its score folder, to be read as higher_is_better. dattri: one .npz with score,
    and the values and indices that dattri's lds takes, from the models that `daunce evaluate RUN --lds` retrained;
    `daunce evaluate OTHER_RUN --lds --truth FILE` reads it.

    Example: daunce export RUN --format parquet
    """
    from ..evaluation import experiments
    from ..run import Run

    only_with("--format dattri", form == "dattri", seeds=seeds)
    job = Run.open(run)
    attribution = job.attribution()
    if estimator is not None:
        attribution = attribution.with_estimator(estimator)
    _name_other_groups(job)
    path = output or job.run_dir / EXPORT_FOLDER / EXPORT_NAMES[form]
    if form == "dattri":
        experiments.export_truth(job, path, attribution, seeds=seeds)
    else:
        attribution.export(path, form)
    content = {
        "path": str(path),
        "format": form,
        "train": len(attribution.train),
        "test": len(attribution.test),
        "estimator": attribution.choice.estimator.name,
        "why": attribution.choice.why,
    }
    pairs = f"{len(attribution.train):,} training x {len(attribution.test):,} test examples"
    show(as_json, content, lambda: terminal.say(f"Wrote {path} ({pairs}, {content['estimator']})"))


@command(LOOK)
def report(
    run: RunArgument = HERE,
    output: Annotated[Path | None, typer.Option(help="default: RUN/report.html", callback=file_named)] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML file that explains every answer; it opens from disk and needs no network.

    Each answer with the training examples and the tokens behind it, scores by source, examples to look at again, and
    how far the scores can be trusted. `daunce run` writes it too.
    """
    from ..report.page import write_report_of
    from ..run import Run

    job = Run.open(run)
    page = write_report_of(job, job.attribution(), output)
    _name_other_groups(job, "on a page of their own")
    show(as_json, {"report": str(page)}, lambda: terminal.say(f"Wrote {page}"))


@command(LOOK)
def view(
    folder: Annotated[
        Path, typer.Argument(help="all runs in it are shown, live", metavar="FOLDER", exists=True, file_okay=False)
    ] = HERE,
    host: Annotated[str, typer.Option(help="a loopback address")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 0,
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

    serve(Runs(folder), host=host, port=port, on_start=started)


def _name_other_groups(job: Run, where: str = "not in it") -> None:
    """Questions that other members answered are not in one table with the rest."""
    for group in job.attributions()[1:]:
        names = ", ".join(group.test.ids[:5]) + (", ..." if len(group.test) > 5 else "")
        terminal.warn([f"{where}, since {len(group.members)} other members answered: {names} (see `daunce top`)"])


@command(LOOK)
def evaluate(
    run: RunArgument = HERE,
    retrieval: Annotated[
        Path | None, typer.Option(help="JSON: known training ids, as a list or by test id; nothing is trained")
    ] = None,
    lds: Annotated[
        bool,
        typer.Option("--lds", help="linear datamodeling score: retrain on random subsets, compare with predictions"),
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(help="for --lds: a .npz with retrained models' losses from elsewhere; nothing is trained"),
    ] = None,
    removal: Annotated[
        bool, typer.Option("--removal", help="loss after retraining without each answer's top k, against random k")
    ] = False,
    subsets: Annotated[int | None, typer.Option(help="for --lds: random subsets to retrain on; default: 100")] = None,
    seeds: Annotated[int | None, typer.Option(help="for --lds: fine-tunes on each subset; default: 1")] = None,
    k: Annotated[int | None, typer.Option("-k", help="for --removal: examples left out; default: 10")] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="for --removal: id of an answer; may be repeated; default: the first five")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """How good the attribution is, beside BM25, embeddings and chance. Run the same command again to resume.

    --retrieval needs nothing but labels. --lds and --removal fine-tune new models through the run's own backend, none
    of them in the ensemble; all plans and their prices come first. With --truth FILE, LDS takes models from elsewhere:
    an .npz with dattri's values and indices (`daunce export --format dattri` writes one), or with inclusion (subsets x
    training examples) and loss (subsets x answers), in the order of RUN/data.
    """
    from ..evaluation import experiments
    from ..run import Run

    if retrieval is None and not lds and not removal:
        raise ConfigurationError("Nothing to evaluate: add --retrieval LABELS, --lds or --removal.")
    only_with("--lds", lds, truth=truth)
    only_with("--lds without --truth", lds and truth is None, subsets=subsets, seeds=seeds)
    only_with("--removal", removal, k=k, test=test)
    job = Run.open(run)
    if truth is None:  # which has answers of its own
        _name_other_groups(job)
    tables = []
    if retrieval is not None:
        attribution = job.attribution()
        tables.append(experiments.retrieval_table(attribution, experiments.read_labels(retrieval, attribution)))
    work: dict[str, tuple[Run, Callable[..., Table]]] = {}
    if truth is not None:
        tables.append(experiments.lds_table_of_file(job, truth))
    elif lds:
        retrained = experiments.lds_truth(job, **without_none(subsets=subsets, seeds=seeds))
        work["lds"] = retrained, partial(experiments.lds_table, job, retrained)
    if removal:
        experiment = experiments.removal_truth(job, **without_none(k=k, tests=test))
        work["removal"] = experiment.truth, partial(experiments.removal_table, experiment)
    plans = {name: models.plan() for name, (models, _) in work.items()}
    unfinished = [name for name, plan in plans.items() if not plan.nothing_missing]
    _ask_for(plans, unfinished, yes=yes, as_json=as_json)
    for models, measure in work.values():
        with terminal.Progress(models.material.ensemble.members, quiet=as_json) as progress:
            tables.append(measure(on_event=progress.event, on_progress=progress.scored))
    text = "\n\n".join(f"{table.name}\n{table.text()}" for table in tables)
    content = {
        "plans": {name: planned.to_json() for name, planned in plans.items()},
        "tables": [table.to_json() for table in tables],
    }
    show(as_json, content, lambda: terminal.say(text))


def _ask_for(plans: dict[str, Plan], unfinished: Sequence[str], *, yes: bool, as_json: bool) -> None:
    """Show the prices of all experiments first, and ask once where an unfinished one costs money."""
    for name in unfinished:
        plans[name].check()
    if not as_json:
        for name, planned in plans.items():
            terminal.say(f"{name}\n{planned.text()}\n")
    paid = [name for name in unfinished if plans[name].costs_money]
    if paid and not yes:
        options = " and ".join(f"--{name}" for name in paid)
        confirm_price(f"Train the models of {options}", *(plans[name].usd for name in paid))
