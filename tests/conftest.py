"""For every test: Ctrl-C interrupts, also where the suite was started in the background of a shell; folders whose
tests share a server stay on one worker, and the longest parts come first, so that no worker is left alone with one."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from daunce_api.cli import main
from daunce_api.server import EmbeddedServer, ServerSettings

# A shell starts `pytest &` with SIGINT ignored, and every process below it inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of one example says nothing on a shared machine. The examples are the same in every run of the same code;
# `--hypothesis-profile=default` draws others.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("shared machine")

TESTS = Path(__file__).parent
SHARING = {"reliability": "reliability", "server": "server", "examples": "run", "run": "run", "wire": "run"}
"""The part for xdist that a folder belongs to, where tests share the servers of the session. Elsewhere each file is a
part."""


def part_of(item: pytest.Item) -> str:
    path = item.path.relative_to(TESTS)
    return SHARING.get(path.parts[0], str(path))


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(part_of(item) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (part_of(item) not in SHARING.values(), -slow[part_of(item)]))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(part_of(item)))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The server of all tests that do not harm it."""
    with EmbeddedServer(ServerSettings(state_dir=tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call
