"""A marked key is looked for in every byte that a run, a recording, a log, a report and a crash leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from daunce_api import RunConfig

from .harness import KEY, Client, Provider, kill
from .proxy import AFTER, Sent

MakeClient = Callable[..., tuple[RunConfig, Client]]
MARK = KEY.removeprefix("sk-").encode()
"""Without the prefix, so that a key that was only cut at its end would be found too."""


def search(*folders: Path) -> int:
    """Bytes looked at; raises AssertionError with the file that holds the key."""
    looked = 0
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert MARK not in content, f"the key is in {path}"
                looked += len(content)
    return looked


def leak(sent: Sent) -> bytes:
    """A server that repeats the Authorization header in every object it sends."""
    try:
        answer = json.loads(sent.answer)
    except ValueError:
        return sent.answer
    return json.dumps({**answer, "you_sent": f"Bearer {KEY}"}).encode() if isinstance(answer, dict) else sent.answer


def test_a_run_its_recording_its_log_and_its_report_hold_no_key(
    provider: Provider, make_client: MakeClient, tmp_path: Path
) -> None:
    provider.proxy.change_answer = leak
    config, client = make_client()
    client.arguments += ["--record", str(tmp_path / "recording")]
    assert client.run() == 0, client.printed()
    for arguments in (
        ["top", str(config.run_dir), "--test", "q0", "--format", "csv", "--output", str(tmp_path / "top.csv")],
        ["status", str(config.run_dir), "--json"],
        ["doctor", str(tmp_path / "run.yaml"), "--yes"],
    ):
        assert Client(arguments, tmp_path / f"{arguments[0]}.txt").run() == 0
    for name in ("report.html", "daunce.log", "run.sqlite"):
        assert (config.run_dir / name).is_file()
    assert (tmp_path / "recording" / "cassette.json").is_file()
    assert search(tmp_path, provider.state_dir) > 1_000_000


@pytest.mark.slow
def test_errors_that_repeat_the_key_are_said_without_it(
    provider: Provider, make_client: MakeClient, tmp_path: Path
) -> None:
    body = {"error": {"message": f"Incorrect API key provided: {KEY}", "type": "x", "code": "invalid_api_key"}}
    config, client = make_client()
    client.arguments += ["--record", str(tmp_path / "recording")]
    provider.proxy.refuse = lambda sent: (401, json.dumps(body).encode()) if "jobs" in sent.path else None
    assert client.run() == 5
    assert "Incorrect API key provided" in client.printed()
    body["error"] |= {"message": f"slow down, {KEY}", "code": "daily_rate_limit_exceeded"}
    again = Client(["run", str(tmp_path / "run.yaml"), "--yes"], tmp_path / "again.txt")
    provider.proxy.refuse = lambda sent: (429, json.dumps(body).encode()) if "jobs" in sent.path else None
    assert again.run() == 6
    assert (config.run_dir / "run.sqlite").is_file()  # it holds why the run stopped
    search(tmp_path)


def test_a_crash_leaves_no_key(provider: Provider, make_client: MakeClient, tmp_path: Path) -> None:
    config, client = make_client()
    process = client.start()

    def hook(sent: Sent, when: str) -> None:
        if when == AFTER and sent.route == "POST /v1/completions":
            kill(process)

    provider.proxy.hook = hook
    process.join(120)
    assert process.exitcode == -9
    assert (config.run_dir / "run.sqlite-wal").is_file()  # what was not yet in the file itself
    assert search(tmp_path) > 10_000
