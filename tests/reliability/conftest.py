"""One server for the tests that do not harm it, and a finished run on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from daunce_api import RunConfig

from .faults import without_polls
from .harness import KEY, KEY_VARIABLE, Client, Provider, config_of, save_config, write_data
from .proxy import Sent


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    with Provider(tmp_path_factory.mktemp("provider") / "state") as running:
        yield running


@pytest.fixture(autouse=True)
def _quiet_proxy(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "provider" in request.fixturenames:
        proxy = request.getfixturevalue("provider").proxy
        proxy.hook = proxy.change_request = proxy.change_answer = proxy.refuse = None
        proxy.sent.clear()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The marked key in this process's environment."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="session")
def requests_of() -> list[Sent]:
    """Filled with the requests of the undisturbed run."""
    return []


@pytest.fixture(scope="session")
def quiet(
    provider: Provider, requests_of: list[Sent], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    """The undisturbed run, and its outcome."""
    from .crashes import undisturbed

    folder = tmp_path_factory.mktemp("quiet")
    write_data(folder)
    provider.proxy.sent.clear()
    found = undisturbed(provider, folder)
    requests_of.extend(provider.proxy.sent)
    return config_of(folder, folder / "undisturbed", provider.proxy.base_url), found


@pytest.fixture(scope="session")
def needed(quiet: tuple[RunConfig, dict[str, Any]], requests_of: list[Sent]) -> Counter[str]:
    """The requests of the undisturbed run, by route, without looks at jobs."""
    return without_polls(requests_of)


@pytest.fixture
def make_client(provider: Provider, tmp_path: Path) -> Callable[..., tuple[RunConfig, Client]]:
    """A new run of this test's own: its config, and the client that runs it."""

    def make(run_dir: Path | None = None, **sections: dict[str, Any]) -> tuple[RunConfig, Client]:
        write_data(tmp_path)
        config = config_of(tmp_path, run_dir or tmp_path / "run", provider.proxy.base_url, **sections)
        path = save_config(config, tmp_path / "run.yaml")
        return config, Client(["run", str(path), "--yes"], tmp_path / "output.txt")

    return make
