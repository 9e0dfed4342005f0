"""Token log-probabilities of every member, kept or read from the store when they are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
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
