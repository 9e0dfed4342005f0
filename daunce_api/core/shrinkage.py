"""Scores drawn towards zero, pair by pair, by how much of each chance alone would make.

A filter's score is an inner product of two vectors, a of the training and b of the test example, which K members spread
over d directions. Vectors that have nothing to do with each other are not orthogonal: their product has a standard
deviation of |a| |b| / sqrt(d). And influence is heavy-tailed: a few training examples do much to a test example, and
most next to nothing, so that most of what the many small scores add up to is chance. With z = score sqrt(d) / (|a| |b|)
every score is therefore multiplied by

    z^2 / (z^2 + c),

which leaves what stands out as it is and takes the rest away. For c = 1 this is an empirical Wiener filter, signal over
signal and noise with the pair's own square as the estimate of its signal (Ghael, Sayeed and Baraniuk 1997); the sparser
the influence, the larger the c that is right, and held-out members tell it (`choice`). It is no inner product any more,
but it grows with the score and never exceeds it, so that the largest are found as before (`selection`).

Vectors: with the filter phi, a = phi^1/2 U^T A_i and b likewise, so that |a|^2 = A_i^T U phi U^T A_i. Directions: a
filtered spectrum p = w phi spreads over d = (sum p)^2 / sum p^2 of them (the participation ratio; for random vectors
with that second moment it makes the mean of z^2 over pairs equal to 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Floats

_BLOCK = 16_384
_ROOT_OF_FIVE = 5**0.5


@dataclass(frozen=True, eq=False)
class Shrinkage:
    """What the weights of all pairs are made of.

    Attributes:
        left_N: (N,) 1 / |a|, zero for a vector of zeros.
        right_M: (M,) sqrt(d / c) / |b|, likewise.
    """

    left_N: Floats
    right_M: Floats

    def weight(self, score: Floats, rows: slice | NDArray[np.int64], columns: slice | NDArray[np.int64]) -> Floats:
        """Weights in [0, 1) of unweighted scores: (n, m) of a block given by slices, or (p,) of single pairs."""
        left, right = self.left_N[rows], self.right_M[columns]
        square = score * (left[:, None] if isinstance(rows, slice) else left)
        square *= right
        square *= square
        return np.asarray(square / (1 + square))

    def shrunk(self, score: Floats, rows: slice | NDArray[np.int64], columns: slice | NDArray[np.int64]) -> Floats:
        """Scores times their weights; arguments as for `weight`."""
        return np.asarray(score * self.weight(score, rows, columns))

    def slope(self, score: Floats, rows: slice | NDArray[np.int64], columns: slice | NDArray[np.int64]) -> Floats:
        """What a deviation of the score makes of ``shrunk``, root mean square: w (5^1/2 - (5^1/2 - 1) w), w the weight.

        1 for a score that stands out. For one that is chance alone, normal about zero, a small ``shrunk`` is its cube,
        whose variance is 15 where that of w times it, with E w^2 = 3, is 3: five times as much. Arguments as for
        `weight`.
        """
        weight = self.weight(score, rows, columns)
        return np.asarray(weight * (_ROOT_OF_FIVE - (_ROOT_OF_FIVE - 1) * weight))

    def swapped(self) -> Shrinkage:
        """With the sides exchanged."""
        return Shrinkage(self.right_M, self.left_N)

    def some(self, rows: NDArray[np.int64]) -> Shrinkage:
        """Of some training examples."""
        return Shrinkage(self.left_N[rows], self.right_M)


def shrinkage_of(amount: float, directions: float, left_square_N: Floats, right_square_M: Floats) -> Shrinkage:
    """From c, d, and the squared lengths of all vectors."""
    scale = right_square_M.dtype.type(np.sqrt(directions / amount))
    return Shrinkage(_inverse(left_square_N), _inverse(right_square_M) * scale)


def directions(filtered_D: NDArray[np.float64]) -> float:
    """d: over how many directions a spectrum w phi spreads."""
    return float(filtered_D.sum() ** 2 / (filtered_D**2).sum())


def squared_lengths(half_DR: Floats, side_RX: Floats) -> Floats:
    """(X,) |half x|^2 of every column."""
    out = np.empty(side_RX.shape[1], dtype=side_RX.dtype)
    for start in range(0, out.size, _BLOCK):
        piece = slice(start, start + _BLOCK)
        part = half_DR @ side_RX[:, piece]
        out[piece] = np.einsum("dx,dx->x", part, part)
    return out


def _inverse(square_X: Floats) -> Floats:
    return np.asarray(np.divide(1, np.sqrt(square_X), out=np.zeros_like(square_X), where=square_X > 0))
