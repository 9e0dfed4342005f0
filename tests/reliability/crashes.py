"""The crash storm: client and server killed at random moments until hundreds of kills are survived."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .harness import Client, Killer, Provider, check_run, config_of, kill, outcome, save_config, write_data


@dataclass
class Tally:
    """What a storm came to. ``again``: examples scored more than once, beyond the noise probe."""

    client_kills: int = 0
    server_kills: int = 0
    runs: int = 0
    again: int = 0
    requests: int = 0
    seconds: float = 0.0
    moments: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        where = ", ".join(f"{n} {moment}" for moment, n in sorted(self.moments.items()))
        return (
            f"{self.client_kills} kills of the client ({where}) and {self.server_kills} of the server in {self.runs} "
            f"runs, {self.requests} requests, {self.seconds:.0f} s: every run ended with its K jobs, each training "
            f"file once, and the bits of the undisturbed run; {self.again} examples were scored again"
        )


def crash_storm(
    folder: Path,
    *,
    kills: int,
    server_kills: int = 0,
    seed: int = 0,
    seconds: float = math.inf,
    tell: Callable[[str], None] = print,
    shared: tuple[Provider, dict[str, Any]] | None = None,
) -> Tally:
    """Run after run, each killed and resumed until it ends, until both numbers of kills are reached or ``seconds`` have
    passed.

    ``shared``: a server that is not killed, and the outcome of the undisturbed run on it. Raises AssertionError at the
    first broken promise, with the seed in its message.
    """
    rng = random.Random(seed)
    tally = Tally()
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    with Provider(folder / "server") if shared is None else nullcontext(shared[0]) as provider:
        killer = Killer(provider, rng)
        expected = undisturbed(provider, folder) if shared is None else shared[1]
        while (tally.client_kills < kills or provider.kills < server_kills) and time.monotonic() - begin < seconds:
            tally.runs += 1
            # On a busy machine a job that was sent may be listed only after a while.
            backend = {"options": {"listing_lag_seconds": 2}}
            config = config_of(folder, folder / f"run-{tally.runs}", provider.proxy.base_url, backend=backend)
            client = Client(
                ["run", str(save_config(config, folder / "run.yaml")), "--no-report", "--yes"], folder / "output.txt"
            )
            provider.proxy.sent.clear()
            deaths, struck = 0, provider.kills
            while True:
                process = client.start()
                if provider.kills < server_kills and rng.random() < 0.15:
                    process.join(10 ** rng.uniform(-1.0, 0.3))
                    provider.kill()
                    if rng.random() < 0.5:  # both at once
                        kill(process)
                    provider.start()
                if tally.client_kills < kills and killer.strike(process):
                    tally.client_kills += 1
                    deaths += 1
                    continue
                process.join(240)
                if process.exitcode == -9:  # died together with the server
                    tally.client_kills += 1
                    killer.moments["with the server"] += 1
                    deaths += 1
                    continue
                break
            if process.exitcode != 0:
                kill(process)
                raise AssertionError(f"seed {seed}: exit code {process.exitcode}\n{client.printed()[-4000:]}")
            # A server that dies takes the answers under way with it, as a client does.
            tally.again += check_run(provider, config, expected, provider.proxy.sent, deaths + provider.kills - struck)
            tally.requests += len(provider.proxy.sent)
            if "Traceback" in client.printed():
                raise AssertionError(f"seed {seed}: a traceback\n{client.printed()[-4000:]}")
            tell(f"run {tally.runs}: {deaths} kills; {tally.client_kills} and {provider.kills} so far")
        tally.server_kills = provider.kills
    tally.moments = killer.moments
    tally.seconds = time.monotonic() - begin
    return tally


def undisturbed(provider: Provider, folder: Path) -> dict[str, Any]:
    """The outcome of the same run when nothing happens to it."""
    config = config_of(folder, folder / "undisturbed", provider.proxy.base_url)
    client = Client(["run", str(save_config(config, folder / "quiet.yaml")), "--yes"], folder / "quiet.txt")
    code = client.run()
    if code != 0:
        raise AssertionError(f"the undisturbed run ended with {code}:\n{client.printed()[-4000:]}")
    found = outcome(config.run_dir)
    again = check_run(provider, config, found, provider.proxy.sent, 0)
    if again:
        raise AssertionError(f"{again} examples were scored twice without any disturbance")
    return found
