"""Which examples and which seed each member gets: pure, and reproducible from one number."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The design of a run.

    ``inclusion_KN`` (K, N) bool: whether example i is in member k's subset. ``seeds_K`` (K,) int64 in [0, 2^31): the
    training seed of each member. ``target_seed``: the seed of the target model's fine-tune.
    """

    inclusion_KN: npt.NDArray[np.bool_]
    seeds_K: npt.NDArray[np.int64]
    target_seed: int

    @property
    def members(self) -> int:
        """K."""
        return int(self.inclusion_KN.shape[0])

    def subset(self, member: int) -> npt.NDArray[np.int64]:
        """Positions of a member's examples in the data set, ascending."""
        return np.flatnonzero(self.inclusion_KN[member]).astype(np.int64)

    def to_value(self) -> dict[str, Any]:
        """The design as plain data."""
        bits = base64.b64encode(np.packbits(self.inclusion_KN, axis=1).tobytes()).decode()
        shape = list(self.inclusion_KN.shape)
        return {"shape": shape, "bits": bits, "seeds": self.seeds_K.tolist(), "target_seed": self.target_seed}

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> Ensemble:
        """The inverse of :meth:`to_value`."""
        members, examples = value["shape"]
        rows = np.frombuffer(base64.b64decode(value["bits"]), np.uint8).reshape(members, -1)
        inclusion_KN = np.unpackbits(rows, axis=1, count=examples).astype(np.bool_)
        return cls(inclusion_KN, np.array(value["seeds"], np.int64), int(value["target_seed"]))

    def first(self, members: int) -> Ensemble:
        """The first members, as many as given."""
        return Ensemble(self.inclusion_KN[:members], self.seeds_K[:members], self.target_seed)

    @property
    def digest(self) -> str:
        """SHA-256 of subsets and seeds."""
        h = hashlib.sha256(repr(self.inclusion_KN.shape).encode())
        h.update(np.packbits(self.inclusion_KN, axis=1).tobytes())
        h.update(self.seeds_K.astype("<i8").tobytes())
        h.update(str(self.target_seed).encode())
        return h.hexdigest()


def plan_ensemble(n_train: int, members: int, subset_ratio: float, seed: int, min_subset: int = 1) -> Ensemble:
    """Draw ``members`` independent subsets and seeds.

    Each subset is a uniform draw without replacement of exactly ``round(subset_ratio * n_train)`` examples (Python's
    rounding: halves to even), the same size for every member, as in Pan et al. 2025 (arXiv 2505.23223), where
    members are fine-tunes on random subsets of a fixed ratio. Independent draws beat complementary and balanced ones
    at small K. Member k's stream is ``SeedSequence(seed, spawn_key=(k,))``, so that it does not depend on how many
    members there are: a larger ensemble begins with the smaller one.

    ``min_subset``: the fewest examples that the provider takes. Raises ConfigurationError where a subset would be
    smaller than that, empty, or the whole training set.
    """
    if n_train < 2 or members < 1 or not 0 < subset_ratio < 1:
        raise ConfigurationError(
            f"an ensemble needs at least 2 training examples, 1 member and a subset_ratio between 0 and 1; got "
            f"{n_train} examples, {members} members, ratio {subset_ratio}."
        )
    size = round(subset_ratio * n_train)
    if size < max(min_subset, 1):
        need = max(min_subset, 1)
        change = f"Raise ensemble.subset_ratio to at least {need / n_train:.3g}, or add" if need < n_train else "Add"
        raise ConfigurationError(
            f"subsets would have {size} of {n_train} examples, fewer than the {need} that a fine-tune needs. {change} "
            "examples."
        )
    if size >= n_train:
        raise ConfigurationError(
            f"subsets would hold all {n_train} examples, and members that saw the same data tell nothing about it. "
            "Lower ensemble.subset_ratio, or add examples."
        )
    inclusion_KN = np.zeros((members, n_train), dtype=np.bool_)
    seeds_K = np.zeros(members, dtype=np.int64)
    for k in range(members):
        stream = _stream(seed, k)
        seeds_K[k] = stream.integers(2**31)
        # The smallest random keys: Generator.choice promises less about staying the same over NumPy versions.
        keys = stream.random(n_train)
        inclusion_KN[k] = keys <= np.partition(keys, size - 1)[size - 1]
        if inclusion_KN[k].sum() > size:  # two equal keys: the first one goes first
            inclusion_KN[k] = False
            inclusion_KN[k, np.argsort(keys, kind="stable")[:size]] = True
    return Ensemble(inclusion_KN, seeds_K, int(_stream(seed, 2**32 - 1).integers(2**31)))


def _stream(seed: int, key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(key,))))
