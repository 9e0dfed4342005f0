"""What all commands share: the app, arguments, and how they print and ask."""

from __future__ import annotations

import inspect
import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from .._util.exhausted import exhausted
from .._util.text import dollars, terminal_text
from .._util.version import __version__
from ..errors import ConfigurationError, DaunceError, StoreError
from . import terminal

EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected failure; 2 config, data or arguments are wrong; 3 refused before spending "
    "(budget, capability, closing date); 4 the run folder cannot be used; 5 the provider refused; 6 parked until a "
    "daily quota returns; 7 too few members are scored; 8 a recording does not cover the run; 130 interrupted with "
    "Ctrl-C, and the same command resumes it."
)

INTERRUPTED = 130
"""What typer returns after Ctrl-C."""

MAKE, LOOK, ENDPOINT = "Make a run", "Look at a run", "Endpoints"
"""Headings of the commands in `daunce --help`."""

ConfigArgument = Annotated[Path, typer.Argument(help="config file in YAML; `daunce init` writes one", metavar="CONFIG")]
DATABASE = "run.sqlite"
HERE = Path()
"""Where a command looks without RUN."""


def found_run(folder: Path) -> Path:
    """The folder of a run: the one named, or the only run in it (or in its ``runs``)."""
    if (folder / DATABASE).exists():
        return folder
    runs = sorted(path.parent for pattern in ("*", "runs/*") for path in folder.glob(f"{pattern}/{DATABASE}"))
    if len(runs) > 1:
        named = ", ".join(terminal_text(str(run)) for run in runs[:5]) + (", ..." if len(runs) > 5 else "")
        raise ConfigurationError(f"There are {len(runs)} runs in {terminal_text(str(folder))}: name one of {named}.")
    return runs[0] if runs else folder


RunArgument = Annotated[
    Path,
    typer.Argument(
        help="folder of the run (run_dir in its config); may be left out where there is only one here",
        metavar="RUN",
        callback=found_run,
        show_default=False,
    ),
]


def file_named(path: Path | None) -> Path | None:
    """The file of ``--output``: ``-``, which stands for standard output elsewhere, would be a file of that name."""
    if path == Path("-"):
        raise ConfigurationError("--output takes the name of a file, and - is none: /dev/stdout is standard output.")
    return path


JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, nothing else")]
MaxUsdOption = Annotated[
    float | None, typer.Option("--max-usd", help="budget.max_usd for this command; recorded with the run")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask before money is spent or things are deleted")]


Command = TypeVar("Command", bound=Callable[..., None])


class _Switches:
    """Help without a type after plain switches."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_Switches, TyperCommand):
    pass


class _Group(_Switches, TyperGroup):
    pass


app = typer.Typer(
    name="daunce",
    help="Which of my fine-tuning examples made the model answer this? Found with API calls alone.\n\n"
    "It fine-tunes small members on random parts of the training data, asks each for the log-probabilities of all "
    "examples, and turns these losses into scores. In order: init, plan, run, top, report. To see it work without a "
    "key: demo.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    cls=_Group,
)


def command(panel: str) -> Callable[[Command], Command]:
    """A command under one of the headings. Its docstring is its help: typer keeps the line breaks of all but the first
    paragraph, so lines are joined before."""

    def register(function: Command) -> Command:
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        help_text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return app.command(help=help_text, rich_help_panel=panel, cls=_Command)(function)

    return register


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{question} There is no terminal to ask on: add --yes to confirm in advance.")
    typer.confirm(question, abort=True, err=True)


def confirm_price(what: str, *usd: float | None, bound: bool = False) -> None:
    """Ask whether to continue with what costs money, all prices together: "WHAT for about $2.10?"; a ``bound`` is "at
    most"."""
    known = [price for price in usd if price is not None]
    amount = f"{'at most' if bound else 'about'} {dollars(sum(known))}"
    confirm(f"{what} for {amount if len(known) == len(usd) else 'an unknown price'}?")


def only_with(other: str, chosen: bool, **options: object) -> None:
    """Raises ConfigurationError for an option that was set and does nothing without another one."""
    for name, value in options.items():
        if value is not None and not chosen:
            flag = f"-{name}" if len(name) == 1 else "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag} goes with {other}: add that, or leave {flag} out.")


def without_none(**options: Any) -> dict[str, Any]:
    """The options that were set; the others have the defaults of whatever takes them."""
    return {name: value for name, value in options.items() if value is not None}


def show(as_json: bool, content: dict[str, Any], show: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(content, allow_nan=False, default=str))
    else:
        show()


def error_content(kind: str, message: str) -> dict[str, Any]:
    """An error as --json prints it."""
    return {"error": {"type": kind, "message": message}}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; no traceback reaches a user for an error of this package."""
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)

    def failed(kind: str, message: str) -> None:
        terminal.error(message)
        if as_json:
            with suppress(OSError):  # no room for standard output is one of the errors
                typer.echo(json.dumps(error_content(kind, message)))

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the locale's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            kept = "Everything so far is kept: run the same command again to resume; `daunce cancel` stops the jobs."
            failed("Interrupted", f"Interrupted. {kept}")
    except DaunceError as error:
        failed(type(error).__name__, str(error))
        code = error.exit_code
    except typer.Abort:
        failed("Aborted", "Stopped; nothing was sent.")
        code = INTERRUPTED
    except typer.TyperException as error:
        said = error.format_message().replace("Value error, ", "").rstrip(".")
        if said:  # nothing where no command was named: the help is what is shown then
            failed("UsageError", f"{said}. `daunce --help` and `daunce COMMAND --help` list commands and options.")
        code = 2
    except BrokenPipeError:
        code = 0
    except Exception as error:
        limit = exhausted(error)
        if limit is None:
            raise
        what_next = "What was stored is kept; once it is raised or freed, run the same command again."
        failed(StoreError.__name__, f"{limit}. {what_next}")
        code = StoreError.exit_code
    sys.exit(code)
