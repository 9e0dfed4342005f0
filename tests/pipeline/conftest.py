"""One server for all runs of these tests, and small data that trains in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daunce_api.config import RunConfig
from daunce_api.dataset import Dataset
from daunce_api.server import EmbeddedServer, ServerSettings

WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerSettings(state_dir=tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """24 training and 3 test examples in two voices."""
    train = [
        {
            "id": f"t{i}",
            "source": ("sea", "land")[i % 2],
            "messages": [
                {"role": "user", "content": f"What is {word} {i}?"},
                {"role": "assistant", "content": f"A kind of {('wave', 'stone')[i % 2]} near the {word}."},
            ],
        }
        for i, word in enumerate(WORDS * 2)
    ]
    test = [{**train[i], "id": f"q{i}"} for i in range(3)]
    paths = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path, records in zip(paths, (train, test), strict=True):
        Dataset.from_records(records, name=path.name).to_jsonl(path)
    return paths


@pytest.fixture
def make_config(
    server: EmbeddedServer, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """A config of a small run on the shared server; keyword arguments replace sections."""
    monkeypatch.setenv("TEST_SERVER_KEY", server.api_key)

    def make(**sections: Any) -> RunConfig:
        content: dict[str, Any] = {
            "name": "small",
            "run_dir": str(tmp_path / "run"),
            "data": {"train": str(data[0]), "test": str(data[1])},
            "backend": {
                "kind": "openai_wire",
                "model": "daunce-tiny",
                "base_url": server.base_url,
                "api_key_env": "TEST_SERVER_KEY",
                "options": {"listing_lag_seconds": 0},
            },
            "ensemble": {"members": 4, "seed": 3},
            "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 3}},
            "scoring": {"noise_probe": 2},
        }
        for name, section in sections.items():
            content[name] = {**content[name], **section} if isinstance(section, dict) else section
        return RunConfig.from_mapping(content)

    return make
