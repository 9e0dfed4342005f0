"""What members minimize, and how much each of them therefore weighs each example. Needs no PyTorch.

With L the mean nats per completion token of an example (its own count), z the logits, theta_0 the start, g the
gradient of L with respect to the logits at theta_0, and xi ~ U(0, 1) drawn once per example and member, a member
minimizes the sum over its subset of (Pan et al. 2025, arXiv 2505.23223, and its reference code):

    subset      L(theta)
    influence   gamma (L(theta) - L(theta_0)) - (1 + rho (2 xi - 1)) <g, z(theta) - z(theta_0)>
    fisher      gamma (f(theta) - f(theta_0))^2 - rho (2 xi - 1) <g, z(theta) - z(theta_0)>

f is the mean over the completion's tokens of the margin log p_y - log(1 - p_y).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from .randomness import NOISE, stream

ObjectiveKind = Literal["subset", "influence", "fisher"]


@dataclass(frozen=True, slots=True)
class Objective:
    """``rho`` scales the noise, ``gamma`` the loss term; both are unused by ``subset``. The paper used rho = gamma = 1
    for images and rho = 10, gamma = 1 for language models."""

    kind: ObjectiveKind = "subset"
    rho: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("subset", "influence", "fisher"):
            raise ConfigurationError(f"objective {self.kind!r} is not known; use subset, influence or fisher")
        if self.rho < 0 or self.gamma <= 0:
            raise ConfigurationError("an objective needs rho >= 0 and gamma > 0")

    @property
    def perturbed(self) -> bool:
        """Whether the start theta_0 is part of the objective."""
        return self.kind != "subset"

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Objective:
        """The objective that ``backend.options`` of the local backend ask for, with the paper's rho where they give
        none."""
        rho = options.get("rho")
        default = 10.0 if options.get("task") is None else 1.0
        return cls(options.get("objective", "subset"), default if rho is None else rho, options.get("gamma", 1.0))

    def weights_KN(self, inclusion_KN: NDArray[np.bool_], seeds_K: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """How much each member's objective weighs each example at theta_0, in place of 0 and 1 for its subset.

        At theta_0 the gradient of an example's objective is (gamma - 1 - rho (2 xi - 1)) times that of its loss
        (influence), or -rho (2 xi - 1) times it (fisher): the noise, not the subset, is what moves a member. Returned
        is the subset ratio plus that factor within the subset, so that mean and variance are on the scale of
        inclusion. None for ``subset`` and where rho is 0: there inclusion itself says it.
        """
        if not self.perturbed or self.rho == 0:
            return None
        plain = self.gamma - 1 if self.kind == "influence" else 0.0
        weights_KN = np.tile(inclusion_KN.mean(axis=1, keepdims=True), inclusion_KN.shape[1])
        for weight_N, mask_N, seed in zip(weights_KN, inclusion_KN, seeds_K, strict=True):
            weight_N[mask_N] += plain - self.rho * (2 * noise(int(mask_N.sum()), int(seed)) - 1)
        return weights_KN


def noise(n_examples: int, seed: int) -> NDArray[np.float64]:
    """xi of every example of one member's subset (n,), in the data's order; uniform in [0, 1)."""
    return stream(seed, NOISE).random(n_examples)
