"""Token log-probabilities of an attribution, read from the run's store for the examples that are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ..data.tokenizers import EncodedExample, Tokenizer
from ..store import Ids, RunStore
from .token_table import TokenTable

Floats = NDArray[np.float64]
T = TypeVar("T")


def stored_tokens(
    run_dir: Path,
    members: Sequence[int],
    examples: Sequence[EncodedExample],
    ids: Ids,
    tokenizer: Callable[[], Tokenizer],
) -> TokenTable:
    """The table of these members and examples; nothing is read or opened before it is looked at.

    Reading raises StoreError where the run folder is gone by then.
    """
    return StoredTable(_Pieces(examples, tokenizer), _Logprobs(run_dir, members, ids))


class StoredTable(TokenTable):
    """A token table whose numbers are in a run's store."""

    logprobs: _Logprobs

    def rows(self, keep: Sequence[int]) -> TokenTable:
        """The table of some members alone."""
        return StoredTable(self.pieces, self.logprobs.rows(keep))

    def prefetch(self, positions: Iterable[int]) -> None:
        """Read these examples at once."""
        self.logprobs.read(positions)


class _Pieces(Sequence[tuple[str, ...]]):
    def __init__(self, examples: Sequence[EncodedExample], tokenizer: Callable[[], Tokenizer]) -> None:
        self._examples = examples
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, at: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[tuple[str, ...]]: ...
    def __getitem__(self, at: int | slice) -> tuple[str, ...] | Sequence[tuple[str, ...]]:
        if isinstance(at, slice):
            return _Pieces(self._examples[at], self._tokenizer)
        example = self._examples[at]
        return tuple(self._tokenizer().pieces([example.ids[t] for t in example.targets]))


class _Logprobs(Sequence[Floats]):
    """(K, T_i) arrays of examples; what was read stays in memory."""

    def __init__(self, run_dir: Path, members: Sequence[int], ids: Ids) -> None:
        self._run_dir = run_dir
        self._members = tuple(members)
        self._ids = ids
        self._read: dict[int, Floats] = {}

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, at: int) -> Floats: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Floats]: ...
    def __getitem__(self, at: int | slice) -> Floats | Sequence[Floats]:
        if isinstance(at, slice):
            self.read(range(*at.indices(len(self))))
            return [self._read[int(i)] for i in self._ids[at]]
        self.read([at])
        return self._read[int(self._ids[at])]

    def rows(self, keep: Sequence[int]) -> _Logprobs:
        """The same examples of some members."""
        part = _Logprobs(self._run_dir, [self._members[k] for k in keep], self._ids)
        part._read = {i: values[list(keep)] for i, values in self._read.items()}
        return part

    def read(self, positions: Iterable[int]) -> None:
        """Have these examples in memory."""
        wanted = np.unique(self._ids[np.fromiter(positions, dtype=np.int64)])
        missing = np.array([i for i in wanted.tolist() if i not in self._read], dtype=np.int32)
        if not missing.size:
            return
        rows: dict[int, list[Floats]] = {i: [] for i in missing.tolist()}
        for member in self._members:
            found = self._store.scores.load_some(missing, member)
            for i, start, count in zip(found.ids.tolist(), found.starts().tolist(), found.counts.tolist(), strict=True):
                rows[i].append(found.logprobs[start : start + count])
        self._read.update({i: np.stack(values) for i, values in rows.items()})

    @cached_property
    def _store(self) -> RunStore:
        return RunStore.open(self._run_dir, read_only=True)
