"""A small classification problem, and halves of it for members."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

N = 40


def problem(*shape: int, members: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, np.ndarray]:
    """Inputs (N, *shape), labels (N,) of four classes, and inclusion of 22 examples a member (members, N)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, *shape, generator=generator, dtype=dtype)
    labels = torch.randint(0, 4, (N,), generator=generator)
    random = np.random.default_rng(1)
    inclusion = np.zeros((members, N), dtype=bool)
    for row in inclusion:
        row[random.permutation(N)[:22]] = True
    return inputs, labels, inclusion
