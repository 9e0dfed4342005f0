"""How files are written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from daunce_api._util.files import replacing
from daunce_api.errors import StoreError


def write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)


def test_what_was_there_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write(path, "old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


def test_what_ends_early_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, "old")

    def interrupted() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_keeps_pointing_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    file, link = tmp_path / "store" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_what_is_no_plain_file_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe, "through")
    reader.join(timeout=120)
    assert read == ["through"]
    assert pipe.is_fifo()


def test_a_folder_in_the_place_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"could not be written: Is a directory.*Name another file"):
        write(tmp_path, "text")
