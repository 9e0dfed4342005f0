"""Tokens in the form that the page reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..attribution import Side
from .pack import Arrays
from .tokens import TokenView


def add_tokens(arrays: Arrays, view: TokenView, columns: Sequence[int], shown: Sequence[int]) -> dict[str, Any]:
    """Put the numbers of a view into the arrays.

    Args:
        columns, shown: positions of the answers and training examples that the page has, in its order.

    Returns:
        the rest, as plain data: ``depth``, ``why``, ``final_only``; by side, the [before, after] of each text that has
        any, or the index of what stands in its place; ``instead``, those texts.
    """
    instead: list[str] = []
    content: dict[str, Any] = {
        "depth": view.depth,
        "why": view.why,
        "final_only": view.final_only,
        "instead": instead,
    }
    sides: tuple[tuple[Side, Sequence[int]], ...] = (("test", columns), ("train", shown))
    for side, positions in sides:
        around: dict[int, Any] = {}
        counts = [0]
        lengths: list[int] = []
        for place, position in enumerate(positions):
            spelling = view.spelled[side].get(int(position))
            if spelling is None:
                counts.append(0)
                continue
            counts.append(len(spelling.lengths))
            lengths += spelling.lengths
            if spelling.instead is not None:
                around[place] = len(instead)
                instead.append(spelling.instead)
            elif spelling.before or spelling.after:
                around[place] = [spelling.before, spelling.after]
        content[side] = around
        arrays.add(f"{side}_token_edges", np.cumsum(counts), "i")
        arrays.add(f"{side}_token_lengths", np.minimum(lengths, 2**16 - 1), "h")
    arrays.add("token_loss", np.concatenate([view.loss[j] for j in columns]), "f")
    for name, parts in (("pro", view.proponents), ("opp", view.opponents)):
        if parts is not None:
            arrays.add(f"{name}_test_parts", parts.test, "b")
            arrays.add(f"{name}_test_edges", parts.test_edges, "i")
            arrays.add(f"{name}_train_parts", parts.train, "b")
            arrays.add(f"{name}_train_edges", parts.train_edges, "i")
            arrays.add(f"{name}_token_scale", parts.scale, "f")
    return content
