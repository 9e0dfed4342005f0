"""What is known of the pairs before any member is trained: similarities of texts, or of the base model's gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Floats = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Prior:
    """Similarities, higher = more alike.

    Attributes:
        similarity_NM: (N, M) of training to test examples, columns of mean 0 and variance 1 (0 where constant).
        neighbors_NN: (N, N) of training examples to each other: rows that sum to 1 (or 0), zero diagonal.
    """

    similarity_NM: Floats
    neighbors_NN: Floats | None = None

    def checked(self, shape: tuple[int, int]) -> Prior:
        """This object. Raises DataError if it is of other examples."""
        if self.similarity_NM.shape != shape:
            raise DataError(f"The prior has shape {self.similarity_NM.shape}, the scores {shape}; they must agree.")
        return self

    def of_tests(self, columns: NDArray[np.int64]) -> Prior:
        """Of some test examples."""
        return Prior(self.similarity_NM[:, columns], self.neighbors_NN)

    def of_train(self, rows: NDArray[np.int64]) -> Prior:
        """Of some training examples."""
        near = self.neighbors_NN
        return Prior(self.similarity_NM[rows], None if near is None else near[np.ix_(rows, rows)])

    def smoothed(self, rows_RN: Floats, amount: float) -> Floats:
        """Losses of each training example plus ``amount`` times the mean of its neighbors'."""
        if self.neighbors_NN is None:
            return rows_RN
        return np.asarray(rows_RN + amount * (rows_RN @ self.neighbors_NN.T)).astype(rows_RN.dtype)
