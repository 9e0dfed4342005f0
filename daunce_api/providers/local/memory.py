"""What fits into memory, in bytes and in tokens: which sequences share a padded pass, how many members are trained at
once, and what happens when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from .engines import WorkerLostError
from .lora import AdaptedModel

CPU_TOKENS = 1024
"""Padded tokens of a training pass on a CPU; see RESULTS-local.md for others."""
CPU_PASS_BYTES = 1 << 30
"""What a training pass may take on a CPU by :func:`token_bytes`: large models gain nothing from longer passes."""
GPU_TOKENS = 16384
SCORED_TOKENS = 512
"""Of a scoring pass on a CPU, which gains nothing from more."""
WASTE = 96
"""Padding, in tokens, that costs as much as one more pass. It decides about speed alone."""

Scored = tuple[Sequence[int], Sequence[int]]
"""Token ids, and the indices (from 1) of those whose log-probabilities are wanted."""


def passes_of(lengths: Sequence[int], max_tokens: int, alone_above: int | None = None) -> list[list[int]]:
    """Indices of ``lengths`` above 0 in passes of at most ``max_tokens`` padded tokens (a longer single row is a pass
    of its own), the longest first: a pass ends where its padding would cost more than another pass. The same lengths
    give the same passes. Rows above ``alone_above`` are alone."""
    passes: list[list[int]] = []
    longest, waste = 0, 0
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        waste += longest - lengths[i]
        full = not passes or (len(passes[-1]) + 1) * longest > max_tokens or waste > WASTE
        if full or (alone_above is not None and longest > alone_above):
            passes.append([])
            longest, waste = lengths[i], 0
        passes[-1].append(i)
    return passes


T = TypeVar("T")


def within_memory(work: Callable[[], T]) -> T:
    """What ``work`` returns. Raises WorkerLostError, with the memory given back, where it ran out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
    # Outside of the handler: the frames of the failed work, which hold its tensors, are gone.
    gc.collect()
    torch.cuda.empty_cache()
    raise WorkerLostError("a local worker ran out of memory; the task can be repeated", out_of_memory=True)


def default_budget(device: torch.device, workers: int) -> int:
    """Bytes that a worker may use beside the model: half of what is free now, shared by the workers of a CPU."""
    return free_bytes(device) // (2 * (workers if device.type == "cpu" else 1))


def free_bytes(device: torch.device) -> int:
    """Of a GPU, or of this machine or container."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    return min([int(psutil.virtual_memory().available), *_container_rest()])


def _container_rest(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What this process's container (cgroup 2) has left, where it has a limit."""
    try:
        most, now, stat = ((root / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
        return [max(0, int(most) - int(now) + cached)]  # the kernel takes back cached files
    except (OSError, ValueError):  # no container, or "max": no limit
        return []


@dataclass(frozen=True, slots=True)
class Limits:
    """``members`` trained at once, and padded ``tokens`` of a pass."""

    members: int
    tokens: int

    def smaller(self, longest: int) -> Limits | None:
        """What to try when memory ran out: half the members, then half the tokens; None where one row of the
        ``longest`` example is all there is."""
        if self.members > 1:
            return Limits(-(-self.members // 2), self.tokens)
        return Limits(1, max(longest, self.tokens // 2)) if self.tokens > longest else None


def limits_of(
    model: AdaptedModel, member_bytes: int, *, members: int, longest: int, budget: int, tokens: int | None
) -> Limits:
    """As many of ``members`` as half of a ``budget`` in bytes holds, and as many tokens a pass as the rest of it, at
    most ``tokens`` (None: the device's usual); at least one member and one row of the ``longest`` example."""
    on_cpu = model.device.type == "cpu"
    together = max(1, min(members, budget // 2 // max(1, member_bytes)))
    left = budget - together * member_bytes
    if on_cpu and tokens is None:
        left = min(left, CPU_PASS_BYTES)
    most = min(tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS), int(left // token_bytes(model, longest)))
    return Limits(together, max(longest, most))


def token_bytes(model: AdaptedModel, longest: int) -> float:
    """About what one token of a training pass takes: the inputs that a layer's products and functions keep for
    backward (after Korthikanti et al., 2022), of one layer and the boundaries of all where they are checkpointed, and
    as much again for gradients and temporaries."""
    config = model.config
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = getattr(config, "moe_intermediate_size", None)
    inner = inner * int(config.num_experts_per_tok) if inner else getattr(config, "intermediate_size", None)
    inner = 4 * width if inner is None else max(inner) if isinstance(inner, (list, tuple)) else int(inner)
    layer = 14 * width + 4 * inner
    if getattr(config, "_attn_implementation", None) == "eager":
        layer += 2 * int(config.num_attention_heads) * longest
    kept = layers * width + layer if model.checkpointing else layers * layer
    return 1.5 * kept * (2 if model.model.dtype in (torch.bfloat16, torch.float16) else 4)
