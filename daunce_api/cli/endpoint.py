"""Commands about the other side: what an endpoint can do, what looking may cost, and an endpoint of one's own."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from .._util.files import writing
from .._util.text import dollars
from ..errors import BudgetError, ProviderError, StoreError
from . import terminal
from .common import ENDPOINT, ConfigArgument, JsonOption, YesOption, command, confirm_price, show


@command(ENDPOINT)
def serve(
    model: Annotated[str, typer.Option(help="daunce-tiny, a Hugging Face id, or a model folder")] = "daunce-tiny",
    host: Annotated[str, typer.Option(help="address; any address but loopback requires an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DAUNCE_SERVE_API_KEY", help="key that clients must send", show_envvar=True)
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="folder of files, jobs and models; default: the user's state folder")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="fine-tuning jobs at once")] = 1,
    dialect: Annotated[
        Literal["openai", "vllm", "nebius"], typer.Option(help="whose differences from OpenAI's format to speak")
    ] = "openai",
    inject: Annotated[str | None, typer.Option(help="faults, such as rate_limit=0.1,error_500=0.05,seed=3")] = None,
) -> None:
    """Serve OpenAI's wire format (fine-tuning, echo log-probabilities) over a local model.

    Your own provider: point a config at it with kind: openai_wire and its base_url. Needs the extras `server` and
    `local`.
    """
    from ..providers.options import parse_options
    from ..server import ServerSettings, run_server

    options = {"model": model, "state_dir": state_dir, "api_key": api_key, "workers": workers}
    options |= {"inject": inject, "dialect": dialect}
    settings = parse_options(ServerSettings, {k: v for k, v in options.items() if v is not None}, "daunce serve")

    def ready(base_url: str) -> None:
        terminal.say(f"Serving {model} at {base_url} (Ctrl-C stops it)")

    run_server(settings, host, port, on_ready=ready)


@command(ENDPOINT)
def doctor(
    config: ConfigArgument,
    yes: YesOption = False,
    max_usd: Annotated[
        float, typer.Option("--max-usd", min=0, help="most that all looks at this config may cost, in US dollars")
    ] = 1.0,
    train_one: Annotated[
        bool, typer.Option("--train-one", help="train one tiny job too, and compare the tokens that are billed")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask the configured endpoint for one tiny example: what it can do, how noisy and fast it is, what to change.

    Costs a few tokens: the price is shown first, and has to be confirmed where it is not zero. What was spent is kept
    in CONFIG.doctor.jsonl. Needs the key that the config names, and no run. Ends with exit code 5 where the endpoint
    cannot be used.
    """
    from ..providers.registry import check_keys
    from ..run import Run
    from .doctor import examine, price_of, tiny_job

    run = Run.create(config)
    check_keys(run.config)
    usd, ledger = price_of(run), config.with_name(config.name + ".doctor.jsonl")
    tiny = tiny_job(run) if train_one else None
    if tiny is not None:
        usd = None if usd is None or tiny.usd is None else usd + tiny.usd
    if usd != 0.0:
        _check_allowance(ledger, usd or 0.0, max_usd)
        if not yes:
            job = "" if tiny is None else f", and train one job of {len(tiny.positions)} examples"
            confirm_price(f"Ask {run.config.backend.kind} for one short example, a few times{job},", usd, bound=True)
        _book(ledger, usd or 0.0)
    findings = examine(run, tiny=tiny)
    content = findings.to_json() | {"max_price_usd": usd}
    show(as_json, content, lambda: terminal.say(findings.text()))
    if not findings.ok:
        raise typer.Exit(ProviderError.exit_code)


def _spent(ledger: Path) -> float:
    """Dollars of all looks so far: a line each, with the time. Raises StoreError where the ledger is damaged."""
    try:
        lines = ledger.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0.0
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{ledger} cannot be read. Nothing was sent. Repair or delete it.") from error
    try:
        return sum(float(json.loads(line)["usd"]) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{ledger} is damaged. Nothing was sent. Repair or delete it.") from error


def _check_allowance(ledger: Path, usd: float, max_usd: float) -> None:
    """Raises BudgetError where a look of this price would exceed the cap together with the earlier ones."""
    spent = _spent(ledger)
    if spent + usd > max_usd:
        raise BudgetError(
            f"a look at the endpoint costs up to {dollars(usd)}, and {dollars(spent)} of the {dollars(max_usd)} "
            f"that `daunce doctor` may spend on this config are used ({ledger}). Nothing was sent. Raise --max-usd."
        )


def _book(ledger: Path, usd: float) -> None:
    """Write a look down before anything is sent. Raises StoreError where that cannot be done."""
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "usd": usd})
    with writing(ledger), ledger.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
