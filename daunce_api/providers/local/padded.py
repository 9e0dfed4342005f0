"""Attention of packed tokens: rows of similar length are padded to blocks, for attention alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .batching import split_rows

SHORT = 128
"""Longest row whose attention keeps its probabilities; above, torch's own attention is as fast and takes less
memory."""
BLOCK_OVERHEAD_TOKENS = 48
"""What one more block of rows is taken to cost, in tokens."""


@dataclass(frozen=True)
class Padded:
    """How packed tokens are laid out for attention: ``shapes`` (rows, width) of blocks of rows of similar length.

    A block holds the queries (rows, heads, width), then the keys and the values (rows, key heads, width) of its rows;
    blocks follow one another. ``gather`` names the packed head of every place of the blocks (padding repeats a row's
    last token, which no real token attends to), ``back`` the place of every packed head. ``out`` is the place of each
    head that is wanted among the queries of all blocks. ``masks`` (heads / key heads, longest, longest): see
    :meth:`mask`.
    """

    shapes: Sequence[tuple[int, int]]
    heads: int
    key_heads: int
    width: int
    masks: Tensor
    gather: Tensor
    back: Tensor
    out: Tensor

    def mask(self, length: int) -> Tensor:
        """What is added to the scores (heads / key heads x length, length) of each key head: -inf for later keys."""
        return self.masks[:, :length, :length].flatten(0, 1)

    def blocks(self, padded: Tensor, of_queries: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Queries, keys, values and what belongs to the queries, of each block; (rows x key heads, ..., width)."""
        at = at_query = 0
        group = self.heads // self.key_heads
        for rows, length in self.shapes:
            n, m = rows * self.heads * length, rows * self.key_heads * length
            ends = (at, at + n, at + n + m, at + n + 2 * m)
            queries, keys, values = (
                padded[first:last].view(rows * self.key_heads, -1, self.width)
                for first, last in itertools.pairwise(ends)
            )
            yield queries, keys, values, of_queries[at_query : at_query + n].view(-1, group * length, self.width)
            at += n + 2 * m
            at_query += n

    def wanting(self, tokens: Tensor) -> Padded:
        """The same with the heads of these packed tokens (n,) wanted."""
        return replace(self, out=self.out.view(-1, self.heads).index_select(0, tokens).flatten())

    @property
    def short(self) -> bool:
        """Whether :class:`Attention` is for these rows."""
        return max(length for _, length in self.shapes) <= SHORT

    @property
    def queries(self) -> int:
        """Places of queries in all blocks."""
        return self.heads * sum(rows * length for rows, length in self.shapes)


class Attention(torch.autograd.Function):
    """Causal attention of short rows: (tokens, (heads + 2 key heads) width) becomes (tokens wanted, heads x width).

    Probabilities are kept for the gradient, which for short rows is less than to compute them again.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, layout: Padded, scaling: float) -> Tensor:
        padded = packed.view(-1, layout.width).index_select(0, layout.gather)
        context = padded.new_empty(layout.queries, layout.width)
        kept = []
        for queries, keys, values, out in layout.blocks(padded, context):
            scores = torch.baddbmm(layout.mask(keys.shape[1]), queries, keys.mT, alpha=scaling)
            kept.append(torch.softmax(scores, -1, out=scores))
            torch.bmm(scores, values, out=out)
        ctx.layout, ctx.scaling = layout, scaling
        ctx.save_for_backward(padded, context, *kept)
        return context.index_select(0, layout.out).view(-1, layout.heads * layout.width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        padded, context, *kept = ctx.saved_tensors
        layout: Padded = ctx.layout
        of_context = torch.zeros_like(context).index_copy_(0, layout.out, gradient.reshape(-1, layout.width))
        along = torch.linalg.vecdot(of_context, context)
        of_padded = torch.empty_like(padded)
        at = 0
        for block, of_block, probabilities in zip(
            layout.blocks(padded, of_context), layout.blocks(of_padded, context), kept, strict=True
        ):
            queries, keys, values, of_out = block
            of_queries, of_keys, of_values, _ = of_block
            n = of_out.shape[0] * of_out.shape[1]
            torch.bmm(probabilities.mT, of_out, out=of_values)
            scores = torch.bmm(of_out, values.mT)
            scores.sub_(along[at : at + n].view(len(scores), -1, 1)).mul_(probabilities)
            of_queries.baddbmm_(scores, keys, beta=0, alpha=ctx.scaling)
            of_keys.baddbmm_(scores.mT, queries, beta=0, alpha=ctx.scaling)
            at += n
        return (
            of_padded.index_select(0, layout.back).view(-1, (layout.heads + 2 * layout.key_heads) * layout.width),
            None,
            None,
        )


def lay_out(lengths: NDArray[np.int64], heads: int, key_heads: int, width: int) -> Padded:
    """The layout of packed rows of these lengths; every head of every token is wanted."""
    starts = np.cumsum(lengths) - lengths
    total, all_heads = int(lengths.sum()), heads + 2 * key_heads
    shapes, gather, real, queries = [], [], [], []
    for group in split_rows(lengths.tolist(), max_tokens=1 << 60, overhead=BLOCK_OVERHEAD_TOKENS):
        rows = np.array(group)
        length = int(lengths[rows].max())
        shapes.append((len(rows), length))
        along = np.arange(length)
        token = starts[rows, None] + np.minimum(along, lengths[rows, None] - 1)
        inside = along < lengths[rows, None]
        for first, count in ((0, heads), (heads, key_heads), (heads + key_heads, key_heads)):
            head = np.arange(first, first + count)
            gather.append((token[:, None] * all_heads + head[:, None]).ravel())
            real.append(np.broadcast_to(inside[:, None], (len(rows), count, length)).ravel())
        queries.append((token[:, None] * heads + np.arange(heads)[:, None]).ravel())
    source = np.concatenate(gather)
    back = np.empty(total * all_heads, dtype=np.int64)
    places = np.flatnonzero(np.concatenate(real))
    back[source[places]] = places
    query = np.concatenate(queries)
    places = np.flatnonzero(np.concatenate(real[::3]))
    out = np.empty(total * heads, dtype=np.int64)
    out[query[places]] = places
    longest = min(SHORT, max(length for _, length in shapes))
    masks = torch.full((longest, longest), -torch.inf).triu_(1).expand(heads // key_heads, -1, -1)
    places_of = (torch.from_numpy(t) for t in (source, back, out))
    return Padded(shapes, heads, key_heads, width, masks, *places_of)


def long_attention(packed: Tensor, layout: Padded, scaling: float) -> Tensor:
    """The same by torch's own attention, which does not keep probabilities."""
    padded = packed.view(-1, layout.width)[layout.gather]
    group = layout.heads // layout.key_heads
    found = []
    for (rows, length), (queries, keys, values, _) in zip(
        layout.shapes, layout.blocks(padded, padded.new_empty(layout.queries, layout.width)), strict=True
    ):
        q, k, v = (t.view(rows, -1, length, layout.width) for t in (queries, keys, values))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        found.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).reshape(-1, layout.width))
    return torch.cat(found)[layout.out].view(-1, layout.heads * layout.width)
