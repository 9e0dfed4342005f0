"""The parts of a decoder layer with hand-written gradients, for LoRA training on packed tokens.

Tokens of all rows lie one after the other, without padding, and a member's tokens are neighbours: the base weights see
one product for all members, an adapter one product for its own tokens. Each part saves what its gradient needs and
nothing else, adds into results instead of making new ones, and has no gradient for the frozen weights.
:mod:`daunce_api.providers.local.packed` says which models are computed with these parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Segments = Sequence[tuple[int, int, int]]
"""(member, first token, past the last token) of each stretch of packed tokens that belongs to one member."""


@dataclass(frozen=True)
class FusedLinear:
    """A frozen linear layer with the members' updates of it: ``x W^T + bias + scaling (mask * x) A_k^T B_k^T``.

    ``weight`` (out, in); A (K, rank, in) and B (K, out, rank) come with each call, None where it is not adapted;
    ``mask`` (tokens, in) is the dropout of the update's input.
    """

    weight: Tensor
    bias: Tensor | None
    scaling: float
    segments: Segments
    mask: Tensor | None

    def forward(self, x: Tensor, a: Tensor | None, b: Tensor | None, out: Tensor, plus: Tensor | None) -> Tensor | None:
        """Fill ``out`` (tokens, out) with ``plus`` and the layer's values; returns x A^T (tokens, rank)."""
        if plus is None:
            torch.mm(x, self.weight.T, out=out)
        else:
            torch.addmm(plus, x, self.weight.T, out=out)
        if self.bias is not None:
            out += self.bias
        if a is None or b is None:
            return None
        inner = x.new_empty(len(x), a.shape[1])
        masked = x if self.mask is None else x * self.mask
        for k, first, last in self.segments:
            torch.mm(masked[first:last], a[k].T, out=inner[first:last])
            out[first:last].addmm_(inner[first:last], b[k].T, alpha=self.scaling)
        return inner

    def backward(
        self,
        gradient: Tensor,
        x: Tensor | None,
        inner: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        into: Tensor | None,
        *,
        add: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of A and B. That of x fills ``into``, or is added to it; None: it is not wanted."""
        if into is not None:
            into.addmm_(gradient, self.weight, beta=1 if add else 0)
        if a is None or b is None or x is None or inner is None:
            return None, None
        # B and its gradient lie transposed: thin products are up to four times as fast that way round on a CPU.
        turned = b.mT.contiguous()
        of_a, of_turned = torch.zeros_like(a), torch.zeros_like(turned)
        masked = x if self.mask is None else x * self.mask
        for k, first, last in self.segments:
            own = gradient[first:last]
            of_inner = torch.mm(own, turned[k].T).mul_(self.scaling)
            of_turned[k].addmm_(inner[first:last].T, own, alpha=self.scaling)
            of_a[k].addmm_(of_inner.T, masked[first:last])
            if into is None:
                continue
            if self.mask is None:
                into[first:last].addmm_(of_inner, a[k])
            else:
                into[first:last].addcmul_(of_inner @ a[k], self.mask[first:last])
        return of_a, of_turned.mT


@dataclass(frozen=True)
class Norm:
    """Root mean square norm: ``x weight / sqrt(mean(x^2) + eps)``."""

    weight: Tensor
    eps: float

    def inverse(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean(x^2) + eps) of each token (tokens, 1); NaN where that mean overflows.

        By the plain formula an overflow gives zero: no gradient, and a finite loss that hides that training diverged.
        """
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = length.square_().div_(x.shape[-1]).add_(self.eps)
        return mean.rsqrt().add_(mean * 0)

    def value(self, x: Tensor, inverse: Tensor) -> Tensor:
        return (x * inverse).mul_(self.weight)

    def backward(self, gradient: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
        """The gradient of x; ``gradient`` is used up."""
        gradient.mul_(self.weight)
        along = torch.linalg.vecdot(gradient, x)[:, None].mul_(inverse.pow(3)).div_(-x.shape[-1])
        return gradient.mul_(inverse).addcmul_(x, along)


class FinalNorm(torch.autograd.Function):
    """The norm before the output head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        inverse = norm.inverse(x)
        ctx.norm = norm
        ctx.save_for_backward(x, inverse)
        return norm.value(x, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.norm.backward(gradient.clone(), *ctx.saved_tensors), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotary embedding of heads (tokens, heads, width): the pair (x_i, x_{i + width / 2}) turned by its angle, with
    ``cos`` and ``sin`` (tokens, 1, width / 2); ``back`` turns the other way, which is the gradient."""
    first, second = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    of_first, of_second = out.chunk(2, -1)
    sign = 1 if back else -1
    torch.mul(first, cos, out=of_first).addcmul_(second, sin, value=sign)
    torch.mul(second, cos, out=of_second).addcmul_(first, sin, value=-sign)
    return out


def _pairs(weights: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    return zip(weights[::2], weights[1::2], strict=True)


class Projections(torch.autograd.Function):
    """Norm, the projections to queries, keys and values with their updates, and the rotary embedding.

    x (tokens, hidden) becomes (tokens, (heads + 2 key heads) width); ``weights`` are A and B of each of the three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Norm,
        layers: Sequence[FusedLinear],
        cos: Tensor,
        sin: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        inverse = norm.inverse(x)
        normed = norm.value(x, inverse)
        widths = [layer.weight.shape[0] for layer in layers]
        out = x.new_empty(len(x), sum(widths))
        inner = [
            layer.forward(normed, a, b, part, None)
            for layer, part, (a, b) in zip(layers, torch.split(out, widths, 1), _pairs(weights), strict=True)
        ]
        turned = out[:, : widths[0] + widths[1]]
        heads = turned.view(len(x), -1, 2 * cos.shape[-1])
        heads.copy_(rotate(heads, cos, sin))
        ctx.norm, ctx.layers, ctx.widths, ctx.count = norm, layers, widths, len(inner)
        ctx.save_for_backward(x, inverse, cos, sin, *inner, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, inverse, cos, sin, *rest = ctx.saved_tensors
        inner, weights = rest[: ctx.count], rest[ctx.count :]
        normed = ctx.norm.value(x, inverse)
        turned = ctx.widths[0] + ctx.widths[1]
        heads = gradient[:, :turned].view(len(x), -1, 2 * cos.shape[-1])
        qk = rotate(heads, cos, sin, back=True).flatten(1)
        parts = (*torch.split(qk, ctx.widths[:2], 1), gradient[:, turned:])
        of_normed = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weights: list[Tensor | None] = []
        for i, (layer, part, (a, b)) in enumerate(zip(ctx.layers, parts, _pairs(weights), strict=True)):
            of_weights += layer.backward(part, normed, inner[i], a, b, of_normed, add=i > 0)
        of_x = None if of_normed is None else ctx.norm.backward(of_normed, x, inverse)
        return (of_x, None, None, None, None, *of_weights)


class Rest(torch.autograd.Function):
    """What follows attention: the output projection, the residual, and the gated network (SiLU) with its residual.

    ``context`` (tokens, heads x width) and ``residual`` (tokens, hidden) become (tokens, hidden); ``layers`` and
    ``weights`` are those of the output, gate, up and down projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        residual: Tensor,
        norm: Norm,
        layers: Sequence[FusedLinear],
        *weights: Tensor | None,
    ) -> Tensor:
        output, gate, up, down = layers
        of_output, of_gate, of_up, of_down = _pairs(weights)
        x = torch.empty_like(residual)
        inner = [output.forward(context, *of_output, x, residual)]
        inverse = norm.inverse(x)
        normed = norm.value(x, inverse)
        gated, upper = (x.new_empty(len(x), layer.weight.shape[0]) for layer in (gate, up))
        inner += [gate.forward(normed, *of_gate, gated, None), up.forward(normed, *of_up, upper, None)]
        active = silu(gated)
        out = torch.empty_like(residual)
        inner += [down.forward(active * upper, *of_down, out, x)]
        ctx.norm, ctx.layers = norm, layers
        kept = context if inner[0] is not None else None
        ctx.save_for_backward(kept, x, inverse, gated, upper, active, *inner, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        context, x, inverse, gated, upper, active, *rest = ctx.saved_tensors
        inner, weights = rest[:4], rest[4:]
        output, gate, up, down = ctx.layers
        of_output, of_gate, of_up, of_down = _pairs(weights)
        product = None if inner[3] is None else active * upper
        of_product = torch.empty_like(active)
        grads_down = down.backward(gradient, product, inner[3], *of_down, of_product)
        of_upper = of_product * active
        of_gated = torch.ops.aten.silu_backward(of_product.mul_(upper), gated)
        normed = None if inner[1] is None and inner[2] is None else ctx.norm.value(x, inverse)
        of_normed = torch.empty_like(x)
        grads_gate = gate.backward(of_gated, normed, inner[1], *of_gate, of_normed)
        grads_up = up.backward(of_upper, normed, inner[2], *of_up, of_normed, add=True)
        of_x = ctx.norm.backward(of_normed, x, inverse).add_(gradient)
        of_context = x.new_empty(len(x), output.weight.shape[1])
        grads_output = output.backward(of_x, context, inner[0], *of_output, of_context)
        return (of_context, of_x, None, None, *grads_output, *grads_gate, *grads_up, *grads_down)
