"""Filters where losses are missing, by patterns of what is missing (moment estimators: `pairwise`).

Gaps are those of the final models (`usable_checkpoints` takes them over to earlier ones): a pair uses the members whose
final models have both of its losses, with all their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError, DataError
from .checkpoints import Floats, Mask
from .complete import FactorBlocks
from .estimators import Estimator, spectral_factors
from .grouping import Groups, group_error, group_sums, is_single
from .leaving_out import MOST_MATRICES, ErrorTerm
from .members import MemberLosses
from .spectrum import Filter, Setting, Spectrum, spectrum_of

PATTERN_PAIRS = 2_000  # decompositions that filters are given for incomplete data; some seconds
PATTERN_BYTES = 2**28  # that their eigenvectors may take, and as much that is kept of what their errors need


def few_patterns(members: MemberLosses) -> bool:
    """Whether the gaps in the losses are regular enough for filters (see `PatternBlocks`)."""
    if members.complete:
        return True
    patterns = [np.unique(np.isfinite(x), axis=1).shape[1] for x in (members.train_KN, members.test_KM)]
    return _affordable(patterns[0] * patterns[1], members)


def _affordable(pairs: int, members: MemberLosses) -> bool:
    return pairs <= PATTERN_PAIRS and 8 * pairs * members.stages.rows**2 <= PATTERN_BYTES


class PatternBlocks:
    """Filter estimators on incomplete data: a pair is scored as if only the members that have both its losses existed.

    The spectrum of those members comes from every training example that all of them scored. One decomposition is made
    and kept for each distinct pair of missing patterns; losses are gathered where they are asked for.

    Raises:
        DataError: too many patterns, or members without a training example in common.
    """

    def __init__(self, estimator: Estimator, members: MemberLosses, setting: Setting) -> None:
        if estimator.filter is None:
            raise ConfigurationError(f"{estimator.name} is no filter, so patterns of missing entries do not help it.")
        self._filter: Filter = estimator.filter
        self._members, self._setting = members, setting
        self.shape = (members.train_KN.shape[1], members.test_KM.shape[1])
        train_seen, test_seen = np.isfinite(members.train_KN), np.isfinite(members.test_KM)
        self._train_patterns, self._train_of = np.unique(train_seen, axis=1, return_inverse=True)
        self._test_patterns, self._test_of = np.unique(test_seen, axis=1, return_inverse=True)
        train_count, test_count = self._train_patterns.shape[1], self._test_patterns.shape[1]
        if not _affordable(train_count * test_count, members):
            raise DataError(
                f"Entries are missing in {train_count} different patterns of training and {test_count} of test "
                f"examples, too many for {estimator.name}, which needs one decomposition for each pair of patterns. "
                "Use estimator='covariance', which leaves out missing entries pair by pair, or score the missing "
                "entries."
            )
        self._errors: dict[tuple[int, int], Callable[[], tuple[ErrorTerm, ...]]] = {}
        self._room = PATTERN_BYTES // (8 * MOST_MATRICES * members.stages.rows**2)
        self._spectra: dict[tuple[int, int], Spectrum] = {}
        for p, q in np.ndindex(train_count, test_count):
            common = self._common(p, q)
            if common.sum() >= 2:
                rows = np.flatnonzero(train_seen[common].all(axis=0))
                part = replace(members.columns(rows, slice(0)).rows(common), complete=True)
                self._spectra[p, q] = spectrum_of(part, setting.of_examples(rows, self.shape[0]))

    def _common(self, p: int, q: int) -> Mask:
        """(K,) the members that have both losses of a pair with these patterns."""
        return np.asarray(self._train_patterns[:, p] & self._test_patterns[:, q])

    def _parts(
        self, rows: slice, columns: slice
    ) -> Iterator[tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64]]]:
        """The pairs of patterns in a block, and which of its rows and columns have them."""
        train_of, test_of = self._train_of[rows], self._test_of[columns]
        for p in np.unique(train_of):
            for q in np.unique(test_of):
                yield (int(p), int(q)), np.flatnonzero(train_of == p), np.flatnonzero(test_of == q)

    def _fitted(self, pair: tuple[int, int], train: NDArray[np.int64], test: NDArray[np.int64]) -> FactorBlocks:
        """Scores of examples that have these patterns."""
        some = replace(self._members.columns(train, test).rows(self._common(*pair)), complete=True)
        factors = spectral_factors(some, self._spectra[pair], self._filter, self._setting)
        if pair not in self._errors and len(self._errors) < self._room:
            self._errors[pair] = factors.errors
        return FactorBlocks(replace(factors, errors=self._errors.get(pair, factors.errors)))

    def _gather(self, rows: slice, columns: slice, stderr: bool) -> Floats:
        first_row, first_column = rows.indices(self.shape[0])[0], columns.indices(self.shape[1])[0]
        out = np.full((self._train_of[rows].size, self._test_of[columns].size), np.nan)
        whole = slice(None)
        for pair, i, j in self._parts(rows, columns):
            if pair in self._spectra:
                blocks = self._fitted(pair, i + first_row, j + first_column)
                out[np.ix_(i, j)] = blocks.stderr_block(whole, whole) if stderr else blocks.block(whole, whole)
        return out

    def block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) scores."""
        return self._gather(rows, columns, stderr=False)

    def stderr_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) standard errors."""
        return self._gather(rows, columns, stderr=True)

    def group_block(self, row_of: NDArray[np.int64], column_of: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(G, H) sums of scores over groups of examples, and their standard errors (`group_error`)."""
        whole = slice(None)
        if is_single(row_of) and is_single(column_of):
            return self.block(whole, whole), self.stderr_block(whole, whole)
        out = np.zeros((self._members.count, int(row_of.max()) + 1, int(column_of.max()) + 1))
        for pair, i, j in self._parts(whole, whole):
            if pair in self._spectra:
                own, other, common = Groups.of(row_of[i]), Groups.of(column_of[j]), self._common(*pair)
                change = self._fitted(pair, i, j).changes(own.number, other.number)
                out[np.ix_(common, own.present, other.present)] += change if common.sum() >= 3 else np.nan
        return group_sums(self, row_of, column_of), group_error(out)

    def count_block(self, rows: slice, columns: slice) -> Floats:
        """(n, m) members that have both losses."""
        out = np.zeros((self._train_of[rows].size, self._test_of[columns].size))
        for pair, i, j in self._parts(rows, columns):
            out[np.ix_(i, j)] = self._common(*pair).sum()
        return out
