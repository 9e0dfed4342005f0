"""An attribution on disk: one JSON file for what can be read, one ``.npz`` for arrays. No pickle, ever."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import core
from .._util import files
from ..data.dataset import Dataset
from ..errors import ConfigurationError, StoreCorruptError
from .labels import Side
from .token_table import TokenTable

if TYPE_CHECKING:
    from .measurements import Measurements

FORMAT = 1
CONTENT_NAME, ARRAYS_NAME = "attribution.json", "losses.npz"

MAX_TOKEN_ENTRIES = 20_000_000
"""Token log-probabilities that are saved at most of a side (160 MB); above it, that side is left out."""

_PLAIN = ("estimator", "noise", "rho", "loss", "prior", "prior_model", "measured", "censored")
_OLDER = {"prior": "none", "prior_model": None}  # of files of earlier versions, which lack them

Arrays = dict[str, NDArray[Any]]


def write(folder: Path, attribution: Measurements) -> Path:
    """Write both files into a folder, and return it. Raises StoreError where that fails."""
    content, arrays = _contents_of(attribution)
    with files.replacing(folder / ARRAYS_NAME) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    files.write(folder / CONTENT_NAME, json.dumps({"format": FORMAT, **content}, ensure_ascii=True))
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The arguments that make an equal attribution.

    Raises ConfigurationError where nothing is there, StoreCorruptError where it cannot be read.
    """
    if not (folder / CONTENT_NAME).is_file():
        raise ConfigurationError(f"{folder} holds no saved attribution. `Attribution.save` writes one.")
    try:
        content = json.loads((folder / CONTENT_NAME).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        with np.load(folder / ARRAYS_NAME, allow_pickle=False) as arrays:
            return _fields_of(content, dict(arrays))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StoreCorruptError(
            f"{folder} cannot be read as a saved attribution ({error}). `Run.open(...).attribution().save(...)` writes "
            "it again, without new fine-tunes."
        ) from error


def _contents_of(attribution: Measurements) -> tuple[dict[str, Any], Arrays]:
    arrays: Arrays = {
        "members_K": np.array(attribution.members, dtype=np.int64),
        "train_loss_KN": attribution.train_loss_KN,
        "test_loss_KM": attribution.test_loss_KM,
        "inclusion_KN": attribution.inclusion_KN,
    }
    if attribution.weight_KN is not None:
        arrays["weight_KN"] = attribution.weight_KN
    if attribution.earlier is not None:
        arrays["earlier_train_loss_SKN"] = attribution.earlier.train_loss_SKN
        arrays["earlier_test_loss_SKM"] = attribution.earlier.test_loss_SKM
    tables = {side: table for side, table in attribution.tokens.items() if _entries(table) <= MAX_TOKEN_ENTRIES}
    for side, table in tables.items():
        table.prefetch(range(len(table.pieces)))
        arrays[f"{side}_token_logprobs_KT"] = np.concatenate(table.logprobs, axis=1)
        arrays[f"{side}_token_counts"] = np.array([len(p) for p in table.pieces], dtype=np.int64)
    content = {
        **{name: getattr(attribution, name) for name in _PLAIN},
        "facts": dict(attribution.facts),
        "train": _dataset_to_json(attribution.train),
        "test": _dataset_to_json(attribution.test),
        "tokens": {side: [list(p) for p in table.pieces] for side, table in tables.items()},
    }
    return content, arrays


def _entries(table: TokenTable) -> int:
    """Token log-probabilities of a table, without reading them where they are in a store."""
    return sum(len(pieces) for pieces in table.pieces) * (len(table.logprobs[0]) if len(table.pieces) else 0)


def _fields_of(content: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    tokens: dict[Side, TokenTable] = {}
    for side, pieces in content["tokens"].items():
        edges = np.cumsum(arrays[f"{side}_token_counts"])[:-1]
        logprobs = np.split(arrays[f"{side}_token_logprobs_KT"], edges, axis=1)
        tokens[side] = TokenTable(tuple(tuple(p) for p in pieces), tuple(logprobs))
    earlier = None
    if "earlier_train_loss_SKN" in arrays:
        earlier = core.Checkpoints(arrays["earlier_train_loss_SKN"], arrays["earlier_test_loss_SKM"])
    return {
        "train": _dataset_from_json(content["train"]),
        "test": _dataset_from_json(content["test"]),
        "members": tuple(int(m) for m in arrays["members_K"]),
        **{name: arrays[name] for name in ("train_loss_KN", "test_loss_KM", "inclusion_KN")},
        "weight_KN": arrays.get("weight_KN"),
        **{name: {**_OLDER, **content}[name] for name in _PLAIN},
        "facts": content["facts"],
        "tokens": tokens,
        "earlier": earlier,
        "rho": _rho(content),
    }


def _rho(content: Mapping[str, Any]) -> core.Rho:
    """Files of earlier versions hold null where members start from the base, and where the recipes do not say."""
    if content["rho"] is None:
        return "unknown" if content["facts"].get("start_from") == "target" else "base"
    return cast("core.Rho", content["rho"])


def _dataset_to_json(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "records": [e.to_record() for e in dataset]}


def _dataset_from_json(content: dict[str, Any]) -> Dataset:
    return Dataset.from_records(content["records"], name=content["name"])
