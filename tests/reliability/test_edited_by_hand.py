"""What was edited or damaged in a run folder is refused, not trusted."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Run, RunConfig
from daunce_api.errors import StoreCorruptError
from daunce_api.store.run import FILE_NAME

Quiet = tuple[RunConfig, dict[str, Any]]


@pytest.fixture
def folder(quiet: Quiet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quiet[0].run_dir, tmp_path / "run"))


def test_examples_edited_in_the_run_folder_are_refused_and_written_anew(quiet: Quiet, folder: Path) -> None:
    path = folder / "data" / "train.jsonl"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"source":"sea"', b'"source":"sky"', 1))
    assert path.read_bytes() != before
    with pytest.raises(StoreCorruptError, match="edited or damaged"):
        Run.open(folder)
    Run.create(quiet[0].model_copy(update={"run_dir": folder})).execute()
    assert path.read_bytes() == before
    assert len(Run.open(folder).attribution().members) == 4


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE losses SET loss = zeroblob(length(loss)) WHERE member = 0",
        "UPDATE blobs SET logprobs = zeroblob(length(logprobs)) WHERE replicate = 1 AND member = 0",
        "UPDATE jobs SET model = 'ft:another' WHERE member = 1",
        "UPDATE spend SET settled = 0, reserved = 0",
        "UPDATE meta SET value = replace(value, '0.5', '0.4') WHERE key = 'manifest'",
    ],
    ids=["losses", "scores", "jobs", "spend", "manifest"],
)
def test_a_store_edited_by_hand_is_refused(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder / FILE_NAME) as database:
        assert database.execute(statement).rowcount >= 1
    database.close()
    with pytest.raises(StoreCorruptError, match="checksum"):
        Run.open(folder).attribution()


def test_a_saved_attribution_that_is_not_one_is_refused(folder: Path) -> None:
    from daunce_api import Attribution

    path = Run.open(folder).attribution().save(folder / "saved") / "attribution.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(StoreCorruptError):
        Attribution.load(folder / "saved")
