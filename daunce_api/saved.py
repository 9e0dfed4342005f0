"""An attribution on disk: one JSON file for what can be read, one ``.npz`` for arrays. No pickle, ever."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError, StoreCorruptError
from .writing import writing

FORMAT = 1
CONTENT_NAME, ARRAYS_NAME = "attribution.json", "losses.npz"

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]


def write(folder: Path, content: Mapping[str, Any], arrays: Arrays) -> Path:
    """Write both files into a folder, each under another name first, and return the folder.

    Raises StoreError where that fails.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / (ARRAYS_NAME + ".part")
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(part, folder / ARRAYS_NAME)
        part = folder / (CONTENT_NAME + ".part")
        part.write_text(json.dumps({"format": FORMAT, **content}, ensure_ascii=True), encoding="utf-8")
        os.replace(part, folder / CONTENT_NAME)
    return folder


def read(folder: Path, build: Callable[[dict[str, Any], Arrays], T]) -> T:
    """Read both files and build something of them.

    Raises ConfigurationError where nothing is there, StoreCorruptError where it cannot be read or built.
    """
    if not (folder / CONTENT_NAME).is_file():
        raise ConfigurationError(f"{folder} holds no saved attribution. `daunce run` writes one into its run folder.")
    try:
        content = json.loads((folder / CONTENT_NAME).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        with np.load(folder / ARRAYS_NAME, allow_pickle=False) as arrays:
            return build(content, dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StoreCorruptError(
            f"{folder} cannot be read as a saved attribution ({error}). Run `daunce run` again: it rewrites the "
            "folder from the run's store, without new fine-tunes."
        ) from error
