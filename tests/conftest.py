"""For every test: Ctrl-C interrupts, also where the suite was started in the background of a shell; folders whose
tests share a server stay on one worker, and the longest parts come first, so that no worker is left alone with one."""

from __future__ import annotations

import gc
import signal
import socketserver
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from daunce_api.cli import main
from daunce_api.server import EmbeddedServer, ServerSettings

# A shell starts `pytest &` with SIGINT ignored, and every process below it inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_handle_error = socketserver.BaseServer.handle_error


def _handle_error_of_a_server(server: socketserver.BaseServer, request: Any, client_address: Any) -> None:
    """Python's servers print a traceback where a client has left before its answer, which clients may."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
        _handle_error(server, request, client_address)


socketserver.BaseServer.handle_error = _handle_error_of_a_server  # type: ignore[method-assign]

# The time of one example says nothing on a shared machine. The examples are the same in every run of the same code;
# `--hypothesis-profile=default` draws others.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("shared machine")

SHARING = {
    **{"reliability": "reliability", "run": "run", "server": "server", "examples": "wire", "wire": "wire"},
    **{"local/test_chats.py": "wire", "local/test_whole_run.py": "wire"},
}
"""The part for xdist that a folder or file belongs to, where tests share the servers of the session. Elsewhere each
file is a part."""


def part_of(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    place = path.removeprefix("tests/")
    return SHARING.get(place) or SHARING.get(place.partition("/")[0], path)


class Parts(LoadScopeScheduling):
    """A part of the tests at a time for each worker. (Marks of groups are not seen by xdist 3.8 with pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return part_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Parts:
    return Parts(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here stays until the end. Looking for garbage among it took a third of the time of importing it,
    and a second whenever a test fills the heap."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(part_of(item.nodeid) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (part_of(item.nodeid) not in SHARING.values(), -slow[part_of(item.nodeid)]))


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
