"""The fault storm: runs against a server that commits faults on purpose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .crashes import undisturbed
from .harness import MEMBERS, Client, Provider, config_of, jobs_of, outcome, save_config, write_data
from .proxy import Sent

REQUEST_FAULTS = (
    "rate_limit",
    "rate_limit_bare",
    "error_500",
    "error_502",
    "timeout_before",
    "timeout_after",
    "drop",
    "truncated",
    "malformed",
)
TIMEOUT = 6.0
"""Seconds that the clients of a fault storm wait for an answer; the server hangs for longer."""


def mixed(total: float, seed: int) -> str:
    """All request faults, equally often, hitting a share ``total`` of the requests."""
    rate = total / len(REQUEST_FAULTS)
    return ",".join(f"{name}={rate:.5f}" for name in REQUEST_FAULTS) + f",retry_after=0.2,hang=12,seed={seed}"


def without_polls(sent: list[Sent]) -> Counter[str]:
    """Requests by route; looks at a job, which go on for as long as it takes, are left out."""
    counts = Counter(s.route for s in sent)
    counts.pop("GET /v1/fine_tuning/jobs/*", None)
    return counts


@dataclass
class Weather:
    """What one run through faults came to: requests sent, and those that an undisturbed run sends."""

    inject: str
    sent: int
    needed: int
    lookups: int

    @property
    def ratio(self) -> float:
        return self.sent / self.needed

    def text(self) -> str:
        return f"{self.sent} requests where {self.needed} were needed ({self.ratio:.2f} x; {self.lookups} look-ups)"


def good_weather(folder: Path) -> tuple[dict[str, Any], Counter[str]]:
    """Outcome of the run without faults, and the requests that it needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    with Provider(folder / "server") as provider:
        expected = undisturbed(provider, folder)
        return expected, without_polls(provider.proxy.sent)


def fault_run(folder: Path, inject: str, expected: dict[str, Any], needed: Counter[str]) -> Weather:
    """One run in bad weather, compared with a good one. Raises AssertionError where a promise is broken."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    with Provider(folder / "server", inject) as provider:
        config = config_of(folder, folder / "run", provider.proxy.base_url, backend=PATIENCE)
        client = Client(["run", str(save_config(config, folder / "run.yaml")), "--yes"], folder / "output.txt")
        code = client.run(500)
        assert code == 0, f"{inject}: exit code {code}\n{client.printed()[-4000:]}"
        assert "Traceback" not in client.printed()
        sent = without_polls(provider.proxy.sent)
        check_jobs(provider, config.run_dir, expected)
    lookups = sent["GET /v1/fine_tuning/jobs"] + sent["GET /v1/files"]
    return Weather(inject, sum(sent.values()), sum(needed.values()), lookups)


PATIENCE: dict[str, Any] = {"options": {"timeout": TIMEOUT}, "scorer": {"options": {"timeout": TIMEOUT}}}
"""Config of a client that does not wait long for an answer."""


def check_jobs(provider: Provider, run_dir: Path, expected: dict[str, Any]) -> None:
    """One job a member and the numbers of good weather."""
    keys = Counter((job.metadata or {})["daunce_key"] for job in jobs_of(provider, run_dir))
    assert max(keys.values()) == 1, f"submitted twice: {keys}"
    assert len(keys) == MEMBERS, keys
    found = outcome(run_dir)
    for name, value in expected.items():
        if name == "spent":  # requests that are sent again are booked: more than in good weather, and not without end
            assert value <= found[name] <= 2 * value, (found[name], value)
        else:
            assert found[name] == value, f"{name} differs from good weather"
