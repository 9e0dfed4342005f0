"""How rows of different lengths are put into padded batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

CALL_OVERHEAD_TOKENS = 96
"""What one more forward and backward pass is taken to cost, in tokens. It decides about speed alone."""

PACKED_TOKENS = 2048
"""Most tokens of a pass without padding."""


def split_rows(lengths: Sequence[int], *, max_tokens: int, overhead: int = CALL_OVERHEAD_TOKENS) -> list[list[int]]:
    """Indices of ``lengths`` in groups that cost least: each group costs rows x longest row + ``overhead`` tokens.

    Groups hold rows of neighbouring length and at most ``max_tokens`` padded tokens (a longer single row is a group
    of its own). Exact (dynamic programming over the sorted rows); the same lengths give the same groups.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best = [0.0]
    cut = [0]
    for end in range(1, len(order) + 1):
        cost, start = float("inf"), end - 1
        for first in range(end - 1, -1, -1):
            padded = (end - first) * lengths[order[first]]
            if padded > max_tokens and first < end - 1:
                break
            if best[first] + padded + overhead < cost:
                cost, start = best[first] + padded + overhead, first
        best.append(cost)
        cut.append(start)
    groups = []
    end = len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def consecutive_rows(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices of ``lengths`` in their order, in about equal groups of at most ``max_tokens`` tokens (a longer single
    row is a group of its own)."""
    wanted = sum(lengths) / max(1, math.ceil(sum(lengths) / max_tokens))
    groups: list[list[int]] = []
    held = max_tokens
    for i, length in enumerate(lengths):
        if held >= wanted or held + length > max_tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += length
    return groups
