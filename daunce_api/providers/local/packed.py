"""LoRA training passes without padding, for models whose layers are known to the last operation.

What is replaced: the layers of Llama's family (``FAMILIES``), by :mod:`daunce_api.providers.local.fused`. When: in
training passes of adapters of their linear layers, in float32 on a CPU, where nothing else is hooked in. Why it is
safe: names and shapes must be those that are known, and before its first use the replacement's hidden states and
gradients are compared with the model's own; where they differ, or anything is not as expected, the model is left
alone. Scoring never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .fused import FinalNorm, FusedLinear, Norm, Projections, Rest, Segments
from .padded import Attention, Padded, lay_out, long_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .lora import ActiveLora, AdaptedModel, Positions

FAMILIES = {
    "LlamaForCausalLM": ("LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"),
    "MistralForCausalLM": ("MistralDecoderLayer", "MistralAttention", "MistralMLP", "MistralRMSNorm"),
    "Qwen2ForCausalLM": ("Qwen2DecoderLayer", "Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"),
}
"""Class of the model, and of its layers, their attention, their network, and their norms."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")
TOLERANCE = 1e-4
"""Of the comparison, relative to the norm of what is compared; rounding is below 1e-5 (SmolLM2: 7e-6)."""


@dataclass(frozen=True)
class _Pass:
    """The packed tokens of one pass."""

    ids: Tensor
    column: Tensor
    """Position of each token in its row."""
    layout: Padded
    last: Padded
    """Of the last layer, which computes only what is wanted after attention."""
    wanted: Tensor
    """Packed tokens whose hidden states are asked for."""
    segments: Segments
    wanted_segments: Segments
    flat: Tensor
    """Place of each token in the padded batch."""


class PackedDecoder:
    """Hidden states of a known model under LoRA adapters, from packed tokens."""

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool) -> None:
        self._model: Any = model.get_submodule("model")
        self._checkpointing = checkpointing
        self._names = {id(m): n for n, m in model.named_modules()}
        attention = self._model.layers[0].self_attn
        self._width = int(attention.head_dim)
        self._heads = attention.q_proj.weight.shape[0] // self._width
        self._key_heads = attention.k_proj.weight.shape[0] // self._width

    def hidden(self, inputs: Tensor, positions: Positions, active: ActiveLora) -> Tensor:
        """As :meth:`AdaptedModel.hidden`; no position may occur twice, and positions are in the order of rows."""
        this = self._pass(inputs, positions, active)
        cos, sin = self._model.rotary_emb(
            self._model.embed_tokens.weight, torch.arange(inputs.shape[1], device=inputs.device)[None]
        )
        half = self._width // 2
        cos, sin = (t[0, :, :half].index_select(0, this.column)[:, None] for t in (cos, sin))
        x = self._model.embed_tokens(this.ids)
        layers = self._model.layers
        for i, layer in enumerate(layers):
            arguments = (layer, x, cos, sin, this, active, i + 1 == len(layers))
            x = (
                checkpoint(self._layer, *arguments, use_reentrant=False)
                if self._checkpointing
                else self._layer(*arguments)
            )
        hidden: Tensor = FinalNorm.apply(x, _norm(self._model.norm))  # type: ignore[no-untyped-call]
        return hidden

    def _layer(
        self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, this: _Pass, active: ActiveLora, last: bool
    ) -> Tensor:
        attention, network = layer.self_attn, layer.mlp
        linear, weights = self._linears([getattr(attention, n) for n in ATTENTION], this, active, last=False)
        packed = Projections.apply(x, _norm(layer.input_layernorm), linear, cos, sin, *weights)  # type: ignore[no-untyped-call]
        layout = this.last if last else this.layout
        attend = Attention.apply if layout.short else long_attention
        context = attend(packed, layout, float(attention.scaling))
        residual = x.index_select(0, this.wanted) if last else x
        modules = [attention.o_proj, *(getattr(network, n) for n in NETWORK)]
        linear, weights = self._linears(modules, this, active, last=last)
        norm = _norm(layer.post_attention_layernorm)
        out: Tensor = Rest.apply(context, residual, norm, linear, *weights)  # type: ignore[no-untyped-call]
        return out

    def _linears(
        self, modules: Sequence[Any], this: _Pass, active: ActiveLora, *, last: bool
    ) -> tuple[list[FusedLinear], list[Tensor | None]]:
        linear, weights = [], []
        for module in modules:
            name = self._names[id(module)]
            a, b = active.weights.get(name, (None, None))
            if a is not None and b is not None and a.dim() == 2:
                a, b = a[None], b[None]
            mask = None
            if active.masks and name in active.masks:
                mask = active.masks[name].flatten(0, 1)[this.flat]
                mask = mask[this.wanted] if last else mask
            segments = this.wanted_segments if last else this.segments
            linear.append(FusedLinear(module.weight, module.bias, active.scaling, segments, mask))
            weights += [a, b]
        return linear, weights

    def _pass(self, inputs: Tensor, positions: Positions, active: ActiveLora) -> _Pass:
        row, column = positions.row.numpy(), positions.column.numpy()
        lengths = np.zeros(len(inputs), dtype=np.int64)
        np.maximum.at(lengths, row, column + 1)  # what follows the last position is never read
        starts = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(owner)) - starts[owner]
        member = np.zeros(len(lengths), dtype=np.int64) if active.rows is None else active.rows.numpy()
        flat = torch.from_numpy(owner * inputs.shape[1] + place)
        layout = lay_out(lengths, self._heads, self._key_heads, self._width)
        wanted = torch.from_numpy(starts[row] + column)
        return _Pass(
            inputs.flatten()[flat],
            torch.from_numpy(place),
            layout,
            layout.wanting(wanted),
            wanted,
            _runs(member[owner]),
            _runs(member[row]),
            flat,
        )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))


def _runs(member: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    ends = [*(np.flatnonzero(np.diff(member)) + 1).tolist(), len(member)]
    return [(int(member[first]), first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]


def packed_decoder(model: AdaptedModel, names: frozenset[str]) -> PackedDecoder | None:
    """The decoder for adapters of the modules ``names``; None where this model is to be left alone."""
    if not names or not _is_known(model.model, names):
        return None
    decoder = PackedDecoder(model.model, checkpointing=model.checkpointing)
    return decoder if _is_the_same(model, decoder, names) else None


def _is_known(model: Any, names: frozenset[str]) -> bool:
    classes = FAMILIES.get(type(model).__name__)
    weights = [*model.parameters()]
    if classes is None or {(w.dtype, w.device.type) for w in weights} != {(torch.float32, "cpu")}:
        return False
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        return False
    layer_class, attention_class, network_class, norm_class = classes
    adaptable = set()
    for name, layer in model.model.layers.named_children():
        found = (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        expected = (layer_class, attention_class, network_class, norm_class, norm_class)
        linear = {f"self_attn.{n}": getattr(layer.self_attn, n, None) for n in (*ATTENTION, "o_proj")}
        linear |= {f"mlp.{n}": getattr(layer.mlp, n, None) for n in NETWORK}
        if tuple(type(m).__name__ for m in found) != expected or any(type(m) is not nn.Linear for m in linear.values()):
            return False
        if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return False
        adaptable |= {f"model.layers.{name}.{n}" for n in linear}
    return names <= adaptable and type(model.model.norm).__name__ == norm_class and not _is_hooked(model)


def _is_hooked(model: nn.Module) -> bool:
    """Whether modules hold hooks or other forwards than their class's, beside ``AdaptedModel``'s own hooks."""
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or module._backward_hooks or module._backward_pre_hooks:
            return True
        if any(getattr(hook, "__module__", "") != "daunce_api.providers.local.lora" for hook in hooks):
            return True
    return False


def _is_the_same(model: AdaptedModel, decoder: PackedDecoder, names: frozenset[str]) -> bool:
    """Whether hidden states and the adapters' gradients are the model's own, on rows of several lengths and members."""
    from .lora import ActiveLora, Positions

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {}
    for name in sorted(names):
        n_out, n_in = model.modules[name].weight.shape
        a, b = random(2, 2, n_in) / n_in**0.5, random(2, n_out, 2) / 2
        weights[name] = (a.requires_grad_(), b.requires_grad_())
    lengths = torch.tensor([5, 11, 3])
    ids = torch.randint(model.model.config.vocab_size, (3, 11), generator=generator)
    row = torch.arange(3).repeat_interleave(lengths)[::2]
    column = torch.cat([torch.arange(n) for n in lengths.tolist()])[::2]
    positions = Positions(row, column, torch.zeros_like(row))
    active = ActiveLora(weights, 0.5, torch.tensor([0, 0, 1]))
    flat = [t for pair in weights.values() for t in pair]
    with model.using(active), torch.enable_grad():
        own = model.hidden(ids, positions)
        for_hidden = random(*own.shape)
        expected = (own, *torch.autograd.grad((own * for_hidden).sum(), flat))
        hidden = decoder.hidden(ids, positions, active)
        found = (hidden, *torch.autograd.grad((hidden * for_hidden).sum(), flat))
    return all(bool((e - f).norm() <= TOLERANCE * e.norm()) for e, f in zip(expected, found, strict=True))
