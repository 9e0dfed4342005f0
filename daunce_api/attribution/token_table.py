"""Token log-probabilities of every member: kept, or read from the run's store for the examples that are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .._util.lazy import LazySequence
from ..data.tokenizers import EncodedExample, Tokenizer
from ..store import Ids, RunStore

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(eq=False)
class TokenTable:
    """Token log-probabilities of every member, for token-level views.

    ``pieces`` holds the completion tokens of each example as printable strings, ``logprobs`` one (K, T_i) array an
    example in nats, NaN where a member has not scored it.
    """

    pieces: Sequence[tuple[str, ...]]
    logprobs: Sequence[Floats]

    def rows(self, keep: Sequence[int]) -> TokenTable:
        """The table of some members alone."""
        return TokenTable(self.pieces, tuple(x[list(keep)] for x in self.logprobs))

    def prefetch(self, positions: Iterable[int]) -> None:
        """Say which examples will be looked at; a table that reads them from a store reads them at once."""


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

    def pieces(i: int) -> tuple[str, ...]:
        return tuple(tokenizer().pieces([examples[i].ids[t] for t in examples[i].targets]))

    return _StoredTable(run_dir, members, ids, _Lazy(len(examples), pieces))


class _Lazy(LazySequence[T]):
    """Items that a function makes."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def item(self, position: int) -> T:
        return self._make(position)


class _StoredTable(TokenTable):
    """A token table whose numbers are in a run's store; what was read stays in memory."""

    def __init__(self, run_dir: Path, members: Sequence[int], ids: Ids, pieces: Sequence[tuple[str, ...]]) -> None:
        super().__init__(pieces, _Lazy(len(pieces), self._logprobs_of))
        self._run_dir, self._members, self._ids = run_dir, tuple(members), ids
        self._read: dict[int, Floats] = {}

    def rows(self, keep: Sequence[int]) -> TokenTable:
        part = _StoredTable(self._run_dir, [self._members[k] for k in keep], self._ids, self.pieces)
        part._read = {i: values[list(keep)] for i, values in self._read.items()}
        return part

    def prefetch(self, positions: Iterable[int]) -> None:
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

    def _logprobs_of(self, position: int) -> Floats:
        self.prefetch([position])
        return self._read[int(self._ids[position])]

    @cached_property
    def _store(self) -> RunStore:
        return RunStore.open(self._run_dir, read_only=True)
