"""Independent random numbers for every purpose of every member."""

from __future__ import annotations

import numpy as np

ORDER, INIT, DROPOUT, NOISE = range(4)
"""Purposes: order of the examples, initial weights, dropout, the xi of the perturbed objectives."""


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """The generator of one purpose of the member with this seed; the same on every platform."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=purpose))
