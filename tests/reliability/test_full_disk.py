"""A disk that is full or read-only: a clear sentence, nothing corrupt, and the run goes on when there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Run, RunConfig

from .harness import Client, Provider, check_run, jobs_of, outcome
from .proxy import AFTER, Sent

MakeClient = Callable[..., tuple[RunConfig, Client]]
Quiet = tuple[RunConfig, dict[str, Any]]


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"

    def fill(self) -> None:
        with suppress(OSError), self.filler.open("ab", buffering=0) as file:
            while True:
                file.write(b"x" * 512)

    def empty(self) -> None:
        self.filler.unlink()

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", self.path], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield Disk(path)
    subprocess.run(["umount", "-l", path], check=True)


def sentence(client: Client) -> str:
    """The last thing that was said; no traceback anywhere."""
    printed = client.printed()
    assert "Traceback" not in printed, printed[-4000:]
    assert "error" in printed
    return printed[printed.rindex("error") :]


# Routes at whose answer the disk becomes full: jobs bought, a batch scored; nothing stored yet is tested below.
MOMENTS = [
    pytest.param("POST /v1/files", 1, marks=pytest.mark.long),
    ("POST /v1/fine_tuning/jobs", 2),
    pytest.param("POST /v1/completions", 4, marks=pytest.mark.long),
    ("POST /v1/completions", 25),
]


@pytest.mark.parametrize(("route", "count"), MOMENTS, ids=lambda value: str(value).rpartition("/")[2])
def test_a_run_on_a_disk_that_fills_up_is_taken_up(
    provider: Provider, disk: Disk, make_client: MakeClient, quiet: Quiet, route: str, count: int
) -> None:
    config, client = make_client(disk.path / "run")
    seen = 0

    def hook(sent: Sent, when: str) -> None:
        nonlocal seen
        seen += when == AFTER and sent.route == route
        if seen == count and when == AFTER:
            disk.fill()

    provider.proxy.sent.clear()
    provider.proxy.hook = hook
    assert client.run() == 4
    said = sentence(client)
    assert "free space" in said
    assert "same command again" in said
    provider.proxy.hook = None
    assert client.run() == 4  # still full: said again, nothing lost
    disk.empty()
    assert client.run() == 0, sentence(client)
    check_run(provider, config, quiet[1], provider.proxy.sent, 2)
    assert Run.open(config.run_dir).status().complete


@pytest.mark.slow
def test_a_full_disk_from_the_start_spends_nothing(provider: Provider, disk: Disk, make_client: MakeClient) -> None:
    config, client = make_client(disk.path / "run")
    disk.fill()
    provider.proxy.sent.clear()
    assert client.run() == 4
    assert "free space" in sentence(client)
    assert not [s for s in provider.proxy.sent if s.method == "POST"]
    disk.empty()
    assert client.run() == 0, sentence(client)
    assert len(jobs_of(provider, config.run_dir)) == 4


def test_a_read_only_folder_can_be_looked_at_and_not_run(
    disk: Disk, make_client: MakeClient, quiet: Quiet, tmp_path: Path
) -> None:
    config, client = make_client(disk.path / "run")
    assert client.run() == 0
    grown, again = make_client(disk.path / "run", ensemble={"members": 5})
    disk.remount("ro")
    assert again.run() == 4
    assert "Check" in sentence(again)
    for arguments in (["status", str(config.run_dir)], ["top", str(config.run_dir), "--test", "q0"]):
        looking = Client(arguments, tmp_path / f"{arguments[0]}.txt")
        assert looking.run() == 0, looking.printed()
    report = Client(["report", str(config.run_dir)], tmp_path / "report.txt")
    assert report.run() == 4
    assert "Read-only" in sentence(report)
    disk.remount("rw")
    assert outcome(config.run_dir)["scores"] == quiet[1]["scores"]
    assert again.run() == 0, sentence(again)
    assert len(Run.open(grown.run_dir).attribution().members) == 5
