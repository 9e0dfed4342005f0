"""How many members are trained at once, and how many tokens go through the model at once, within a memory limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..objective import ObjectiveKind
from .batching import PACKED_TOKENS
from .head import SLICE_ELEMENTS
from .lora import Active, ActiveFull, ActiveLora, AdaptedModel, Positions
from .padded import SHORT

CPU_TOKENS = 2048
"""Padded tokens of a pass on a CPU; 4,096 and 8,192 were no faster with the embedded model."""
CUDA_TOKENS = 32768
COPIES = 5
"""Float32 copies of a member's adapter: weights, gradient, two moments of AdamW, and the start."""
HEAD_COPIES: Mapping[ObjectiveKind, int] = {"subset": 5, "influence": 11, "fisher": 13}
"""Float32 copies of a slice of logits that are alive at once in a pass through the head."""
FULL_BYTES = 20
"""Bytes that a full fine-tune takes a weight beside the base model: weights, float32 copies where the model is held in
half precision, gradient, two moments of AdamW, and the start."""
MASK_COPIES = 3
"""Float32 copies of what is adapted, where there is dropout: the masks, and the masked inputs that backward needs."""
ACTIVATION_FACTOR = 2.0
"""Memory of a pass over what is saved for the backward pass: gradients, temporaries, the allocator's own losses."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``members`` trained at once, ``max_tokens`` padded tokens a forward pass, ``keep_bytes`` for the hidden states of
    theta_0, and the ``estimate`` in bytes of all that beside the frozen model itself."""

    members: int
    max_tokens: int
    keep_bytes: int
    estimate: int


def plan_memory(
    model: AdaptedModel,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    *,
    wanted: int,
    longest: int,
    limit: int,
    dropout: bool = False,
    objective: ObjectiveKind = "subset",
) -> MemoryPlan:
    """The largest plan of at most ``wanted`` members that ``limit`` bytes allow.

    One member and one row of the ``longest`` example are planned even where they need more than the limit.
    """
    per_member = 4 * COPIES * rank * sum(n_in + n_out for n_in, n_out in shapes.values())
    per_token = _activation_bytes(model, _adapted(model, shapes, rank), longest)
    if dropout:
        per_token += 4 * MASK_COPIES * sum(n_in for n_in, _ in shapes.values())
    most = PACKED_TOKENS if model.packs(shapes) else _most_tokens(model)
    max_tokens, pass_bytes = _plan_pass(model, per_token, longest, limit - per_member, objective, most)
    left = limit - per_member - pass_bytes
    keep_bytes = max(0, left // 4)
    members = 1 + max(0, min(wanted - 1, (left - keep_bytes) // per_member))
    return MemoryPlan(members, max_tokens, keep_bytes, members * per_member + pass_bytes + keep_bytes)


def plan_full_memory(
    model: AdaptedModel, *, longest: int, limit: int, objective: ObjectiveKind = "subset"
) -> MemoryPlan:
    """The plan of one full fine-tune; it needs what it needs for weights and optimiser even above the limit."""
    weights = FULL_BYTES * sum(t.numel() for t in model.own_weights.values())
    trained = ActiveFull(model.own_weights, trained=True)
    per_token = _activation_bytes(model, trained, longest)
    max_tokens, pass_bytes = _plan_pass(model, per_token, longest, limit - weights, objective, _most_tokens(model))
    keep_bytes = max(0, (limit - weights - pass_bytes) // 4)
    return MemoryPlan(1, max_tokens, keep_bytes, weights + pass_bytes + keep_bytes)


def _most_tokens(model: AdaptedModel) -> int:
    return CPU_TOKENS if model.device.type == "cpu" else CUDA_TOKENS


def _plan_pass(
    model: AdaptedModel, per_token: float, longest: int, left: int, objective: ObjectiveKind, most: int
) -> tuple[int, int]:
    """Tokens of a forward pass, at most ``most``, that takes at most half of ``left`` bytes, and the bytes that it
    takes."""
    vocabulary = model.output.vocabulary

    def pass_bytes(tokens: int) -> int:
        return int(tokens * per_token) + 4 * HEAD_COPIES[objective] * min(SLICE_ELEMENTS, tokens * vocabulary)

    max_tokens = most
    while max_tokens > longest and pass_bytes(max_tokens) > left / 2:
        max_tokens = max_tokens * 3 // 4
    max_tokens = max(longest, max_tokens)
    return max_tokens, pass_bytes(max_tokens)


def activation_bytes_per_token(
    model: AdaptedModel, shapes: Mapping[str, tuple[int, int]], rank: int, longest: int
) -> float:
    """What the layers take in training per token of rows of at most ``longest`` tokens: ``ACTIVATION_FACTOR`` times
    what a row saves for its backward pass, which is counted."""
    return _activation_bytes(model, _adapted(model, shapes, rank), longest)


def _adapted(model: AdaptedModel, shapes: Mapping[str, tuple[int, int]], rank: int) -> ActiveLora:
    weights = {
        name: (torch.zeros(1, rank, n_in, requires_grad=True), torch.zeros(1, n_out, rank, requires_grad=True))
        for name, (n_in, n_out) in shapes.items()
    }
    return ActiveLora(model.placed(weights), 1.0, torch.zeros(1, dtype=torch.long, device=model.device))


def _activation_bytes(model: AdaptedModel, active: Active, longest: int) -> float:
    """Bytes a token: with checkpointing what is kept at the layers' boundaries, and what one layer saves when it is
    computed again."""
    with model.training():
        saved = _saved_bytes(model, active, min(longest, SHORT))
    if model.checkpointing:  # outside of training mode nothing is checkpointed
        saved += _saved_bytes(model, active, min(longest, SHORT)) / max(1, int(model.model.config.num_hidden_layers))
    return ACTIVATION_FACTOR * max(1.0, saved)


def _saved_bytes(model: AdaptedModel, active: Active, width: int) -> float:
    """Bytes a token that a forward pass saves for its backward pass, counted on a row of ``width``: where
    the probabilities of attention are kept, it grows with that."""
    adapters = active.weights.values() if isinstance(active, ActiveLora) else ()
    own = (*model.own_weights.values(), *(t for pair in adapters for t in pair))
    known = {t.untyped_storage().data_ptr() for t in own}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    at = torch.arange(width, device=model.device)
    inputs = torch.zeros_like(at)[None]
    positions = Positions(torch.zeros_like(at), at, torch.zeros_like(at))
    with model.using(active), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        hidden = model.hidden(inputs, positions)
    return (sum(saved.values()) + hidden.nbytes) / width


def default_limit(device: torch.device, workers: int) -> int:
    """Bytes that a worker may use beside the model: half of what is free now, shared by the workers."""
    return _free(device) // (2 * workers)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    return min([int(psutil.virtual_memory().available), *_container_rest()])


def _container_rest(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What this process's container has left, where it has a limit (cgroup 2)."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return [] if limit == "max" else [max(0, int(limit) - int(used))]
    except (OSError, ValueError):
        return []
