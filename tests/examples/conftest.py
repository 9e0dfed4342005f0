"""The uses' configs on small data."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_support import USES, first_of_each_source


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Run a script in this process and the test's folder, as ``python SCRIPT ARGUMENTS`` would: what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(path: Path, *arguments: str | Path) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
            patch.syspath_prepend(path.parent)
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def small_use(tmp_path: Path) -> Callable[..., Path]:
    """Write a use's config into the test's folder, with a few examples of each source, one epoch and few members."""

    def write(use: str, *, train: int = 6, test: int = 2, members: int = 8, **backend: Any) -> Path:
        content = yaml.safe_load((USES / use / "run.yaml").read_text(encoding="utf-8"))
        content["run_dir"] = "run"
        content["data"] = {
            "train": str(first_of_each_source("train.jsonl", train, tmp_path)),
            "test": str(first_of_each_source("test.jsonl", test, tmp_path)),
        }
        content["ensemble"]["members"] = members
        content["training"]["hyperparameters"]["n_epochs"] = 1
        content["backend"] |= backend
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write
