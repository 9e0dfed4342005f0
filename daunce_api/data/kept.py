"""Data sets as a run folder keeps them, with their token ids beside them: a command reads no more than it shows.

Beside ``train.jsonl`` stands ``train.index.npz`` with the checksum of its bytes, the digest of its examples, and their
token ids. An index that is missing, damaged, or of other bytes is not used: the examples are read and encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._util.files import replacing
from .._util.lazy import LazySequence
from ..errors import DataError, StoreCorruptError
from .dataset import Dataset, example_of
from .encoded import EncodedExample
from .example import Example
from .files import parse_lines

_FORMAT = 1
_LISTS = ("ids", "targets", "turns")
Arrays = dict[str, NDArray[Any]]


class KeptDataset(Dataset):
    """A data set of a run folder whose bytes are those that were written: parsed when an example is looked at."""

    def __init__(self, name: str, raw: bytes, index: Arrays, header: dict[str, Any]) -> None:
        # Checked when it was written; what Dataset sets from its examples comes from `__getattr__`.
        self.name, self.warnings, self.dialect, self.verdicts = name, tuple(header["warnings"]), "chat", {}
        self._raw, self._kept, self._header = raw, index, header

    def __getattr__(self, name: str) -> Any:
        if name == "_index":
            self._index = {example_id: position for position, example_id in enumerate(self.ids)}
        elif name == "_examples":
            records, _ = parse_lines(self._raw)
            self._examples = tuple(example_of(record, record["id"], line) for line, record in records)
        else:
            raise AttributeError(name)
        return self.__dict__[name]

    def __len__(self) -> int:
        return len(self._header["ids"])

    @property
    def ids(self) -> list[str]:
        """As :attr:`Dataset.ids`."""
        return list(self._header["ids"])

    def item(self, position: int) -> Example:
        """One example, parsed alone unless all of them are."""
        if "_examples" in self.__dict__:
            return super().item(position)
        ((_, record),), _ = parse_lines(self._lines[position])
        return example_of(record, record["id"], position + 1)

    @cached_property
    def _lines(self) -> list[bytes]:
        return self._raw.split(b"\n")

    @property
    def digest(self) -> str:
        """As :attr:`Dataset.digest`."""
        return str(self._header["digest"])

    @property
    def content_hashes(self) -> list[str]:
        """As :attr:`Dataset.content_hashes`."""
        return _spelled(self._kept["contents"], 16)

    def tokens(self, recipe: Sequence[str]) -> Sequence[EncodedExample] | None:
        """Token ids of the examples under this recipe (tokenizer, measured turns), where they were kept."""
        return KeptTokens(self, self._kept) if self._header["recipe"] == list(recipe) else None


class KeptTokens(LazySequence[EncodedExample]):
    """A data set as token ids, each example made when it is looked at; ``keys`` are known at once."""

    def __init__(self, dataset: Dataset, arrays: Arrays) -> None:
        self._dataset, self._arrays = dataset, arrays
        self._edges = {n: np.concatenate([[0], np.cumsum(arrays[f"{n}_counts"], dtype=np.int64)]) for n in _LISTS}

    @cached_property
    def keys(self) -> list[str]:
        """:attr:`EncodedExample.key` of each example."""
        return _spelled(self._arrays["keys"], 64)

    def __len__(self) -> int:
        return len(self._dataset)

    def item(self, position: int) -> EncodedExample:
        """One example as token ids."""
        ids, targets, turns = (
            tuple(self._arrays[name][edges[position] : edges[position + 1]].tolist())
            for name, edges in self._edges.items()
        )
        left_out = tuple(self._left_out.get(str(position), ()))
        return EncodedExample(self._dataset[position], ids, targets, turns, left_out)

    @cached_property
    def _left_out(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = json.loads(self._arrays["left_out"].tobytes())
        return found


def keys_of(examples: Sequence[EncodedExample]) -> list[str]:
    """The key of each example."""
    return examples.keys if isinstance(examples, KeptTokens) else [e.key for e in examples]


def kept_dataset(path: Path, digest: str) -> Dataset:
    """Examples as a run folder keeps them. Raises StoreCorruptError where they are not those of this digest."""
    found = _indexed(path)
    if found is not None and found.digest == digest:
        return found
    try:
        examples = Dataset.from_jsonl(path)
    except DataError as error:
        raise StoreCorruptError(_edited(path)) from error
    if examples.digest != digest:
        raise StoreCorruptError(_edited(path))
    return examples


def keep_dataset(
    path: Path, examples: Dataset, tokens: Sequence[EncodedExample] | None = None, recipe: Sequence[str] = ()
) -> None:
    """Write examples, and their token ids where these are known, where a file does not hold them; a torn or edited one
    does not. ``recipe``: what the token ids depend on. Raises StoreError."""
    digest, found = examples.digest, _indexed(path)
    if found is not None and found.digest == digest and (tokens is None or found.tokens(recipe) is not None):
        return
    try:
        held = path.exists() and Dataset.from_jsonl(path).digest == digest
    except DataError:
        held = False
    if not held:
        examples.to_jsonl(path)
    header = {
        "format": _FORMAT,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "digest": digest,
        "ids": examples.ids,
        "warnings": examples.warnings,
        "recipe": None if tokens is None else list(recipe),
    }
    arrays = {"header": _bytes_of(json.dumps(header)), "contents": _digits(examples.content_hashes)}
    arrays |= {} if tokens is None else _arrays_of(tokens)
    with replacing(_index_of(path)) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _index_of(path: Path) -> Path:
    return path.with_suffix(".index.npz")


def _indexed(path: Path) -> KeptDataset | None:
    """The data set of a file whose index belongs to its bytes."""
    try:
        with np.load(_index_of(path), allow_pickle=False) as stored:
            arrays = dict(stored)
        header, raw = json.loads(arrays.pop("header").tobytes()), path.read_bytes()
        if header["format"] != _FORMAT or header["sha256"] != hashlib.sha256(raw).hexdigest():
            return None
        return KeptDataset(path.name, raw, arrays, header)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _arrays_of(tokens: Sequence[EncodedExample]) -> Arrays:
    arrays: Arrays = {
        "keys": _digits(keys_of(tokens)),
        "left_out": _bytes_of(json.dumps({str(i): e.left_out for i, e in enumerate(tokens) if e.left_out})),
    }
    for name in _LISTS:
        lists = [getattr(e, name) for e in tokens]
        arrays[name] = _packed([number for numbers in lists for number in numbers])
        arrays[f"{name}_counts"] = _packed([len(numbers) for numbers in lists])
    return arrays


def _packed(numbers: Sequence[int]) -> NDArray[Any]:
    """Numbers in a narrow type that holds them."""
    ends = (np.min_scalar_type(end(numbers, default=0)) for end in (min, max))
    return np.array(numbers, np.result_type(*ends))


def _digits(hashes: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8)


def _spelled(digits: NDArray[np.uint8], length: int) -> list[str]:
    whole = digits.tobytes().hex()
    return [whole[i : i + length] for i in range(0, len(whole), length)]


def _bytes_of(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _edited(path: Path) -> str:
    return (
        f"{path} does not hold the examples that the run was started with: it was edited or damaged. Nothing "
        "was changed. `daunce run` with the original data writes it anew."
    )
