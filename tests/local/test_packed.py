"""Training without padding: each part against the plain formula, the whole against the model's own layers, and when the
model is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import RejectedError
from daunce_api.providers.local import fused, packed, padded
from daunce_api.providers.local.batching import consecutive_rows
from daunce_api.providers.local.fused import FinalNorm, FusedLinear, Norm, Projections, Rest
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.lora import AdaptedModel
from daunce_api.providers.local.padded import Attention, lay_out, long_attention
from daunce_api.providers.local.trainees import Member
from daunce_api.providers.local.training import train_members
from daunce_api.providers.objective import Objective

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = LoraSettings(rank=4, alpha=8.0, n_epochs=2, batch_size=5, learning_rate=5e-3, targets=ALL)
SEGMENTS = [(1, 0, 3), (0, 3, 5), (1, 5, 6)]
MEMBER = torch.tensor([1, 1, 1, 0, 0, 1])
TOKENS, HIDDEN = 6, 8


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(n_in: int, n_out: int, *, bias: bool = False, masked: bool = False) -> FusedLinear:
    mask = (torch.rand(TOKENS, n_in, dtype=torch.float64) > 0.3) / 0.7 if masked else None
    return FusedLinear(random(n_out, n_in), random(n_out) if bias else None, 0.5, SEGMENTS, mask)


def adapter(of: FusedLinear) -> list[Tensor]:
    n_out, n_in = of.weight.shape
    return [random(2, 3, n_in).requires_grad_(), random(2, n_out, 3).requires_grad_()]


def plain_linear(of: FusedLinear, x: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    out = x @ of.weight.T + (0 if of.bias is None else of.bias)
    if a is None or b is None:
        return out
    masked = x if of.mask is None else x * of.mask
    return out + of.scaling * torch.einsum("ti,tri,tor->to", masked, a[MEMBER], b[MEMBER])


def plain_norm(x: Tensor, norm: Norm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def assert_the_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    weight = random(*expected.shape)
    for one, other in zip(
        *(torch.autograd.grad((t * weight).sum(), inputs, retain_graph=True) for t in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("first", [False, True])
def test_projections(masked: bool, adapted: tuple[int, ...], first: bool):
    """``first``: the embeddings of the first layer have no gradient."""
    norm, x = Norm(random(HIDDEN), 1e-5), random(TOKENS, HIDDEN).requires_grad_(not first)
    layers = [layer(HIDDEN, n, bias=True, masked=masked) for n in (8, 4, 4)]
    weights: list[Any] = [t for i, one in enumerate(layers) for t in (adapter(one) if i in adapted else [None, None])]
    angle = random(TOKENS, 1, 2)
    found = Projections.apply(x, norm, layers, angle.cos(), angle.sin(), *weights)
    parts = [
        plain_linear(one, plain_norm(x, norm), *pair)
        for one, pair in zip(layers, zip(weights[::2], weights[1::2], strict=True), strict=True)
    ]
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    for i in (0, 1):
        heads = parts[i].view(TOKENS, -1, 4)
        parts[i] = (heads * cos + torch.cat([-heads[..., 2:], heads[..., :2]], -1) * sin).flatten(1)
    inputs = [*([] if first else [x]), *(w for w in weights if w is not None)]
    assert_the_same(found, torch.cat(parts, 1), inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adapted", [(0, 1, 2, 3), (0,), (1, 3), ()])
def test_what_follows_attention(masked: bool, adapted: tuple[int, ...]):
    norm = Norm(random(HIDDEN), 1e-5)
    context, residual = random(TOKENS, 6).requires_grad_(), random(TOKENS, HIDDEN).requires_grad_()
    layers = [layer(n_in, n_out, masked=masked) for n_in, n_out in ((6, HIDDEN), (HIDDEN, 5), (HIDDEN, 5), (5, HIDDEN))]
    weights: list[Any] = [t for i, one in enumerate(layers) for t in (adapter(one) if i in adapted else [None, None])]
    found = Rest.apply(context, residual, norm, layers, *weights)
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    x = residual + plain_linear(layers[0], context, *pairs[0])
    gate, up = (plain_linear(layers[i], plain_norm(x, norm), *pairs[i]) for i in (1, 2))
    expected = x + plain_linear(layers[3], silu(gate) * up, *pairs[3])
    assert_the_same(found, expected, [context, residual, *(w for w in weights if w is not None)])


def test_the_final_norm():
    norm, x = Norm(random(HIDDEN), 1e-5), random(TOKENS, HIDDEN).requires_grad_()
    assert_the_same(FinalNorm.apply(x, norm), plain_norm(x, norm), [x])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("attend", [Attention.apply, long_attention])
@pytest.mark.parametrize("overhead", [1, 1000])
def test_attention_of_rows_of_several_lengths(
    key_heads: int, attend: Callable[..., Tensor], overhead: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(padded, "BLOCK_OVERHEAD_TOKENS", overhead)
    lengths, heads, width = [3, 7, 1, 7, 4], 4, 3
    layout = lay_out(np.array(lengths), heads, key_heads, width)
    assert len(layout.shapes) == (4 if overhead == 1 else 1)
    layout.masks.data = layout.masks.double()
    wanted = torch.tensor([2, 4, 9, 10, 12, 21])
    x = random(sum(lengths), (heads + 2 * key_heads) * width).requires_grad_()
    rows = []
    for row in x.split(lengths):
        parts = row.view(len(row), -1, width).transpose(0, 1).split([heads, key_heads, key_heads])
        q, k, v = (t.repeat_interleave(heads // len(t), 0) for t in parts)
        rows.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7).transpose(0, 1).flatten(1))
    assert_the_same(attend(x, layout, 0.7), torch.cat(rows), [x])
    assert_the_same(attend(x, layout.wanting(wanted), 0.7), torch.cat(rows)[wanted], [x])


def train(
    model: LanguageModel, members: list[Member], settings: LoraSettings, **options: Any
) -> tuple[Any, np.ndarray]:
    shapes = model.adapter_shapes(settings.targets)
    weights, losses, _ = train_members(model.adapted, members, shapes, settings, max_tokens=300, **options)
    return weights, np.array(losses)


@pytest.fixture
def alone(model: LanguageModel, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The same model, never packed."""
    other = LanguageModel.load(model_folder)
    monkeypatch.setattr(other.adapted, "_decoder", lambda names: None)
    return other


@pytest.mark.parametrize("kind", ["subset", "influence"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("short", [128, 8])
def test_training_is_that_of_the_models_own_layers(
    model: LanguageModel,
    alone: LanguageModel,
    examples: list[EncodedExample],
    kind: str,
    dropout: float,
    short: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(padded, "SHORT", short)
    assert model.adapted.packs(model.adapter_shapes(ALL))
    assert not alone.adapted.packs(alone.adapter_shapes(ALL))
    settings = replace(SETTINGS, dropout=dropout)
    members = [Member(examples[k : 18 + k], k) for k in range(2)]
    (one, losses), (other, expected) = (train(m, members, settings, objective=Objective(kind)) for m in (model, alone))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for a, b in zip(one, other, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda v, **sizes: Qwen2ForCausalLM(Qwen2Config(vocab_size=v, **sizes)),
        lambda v, **sizes: MistralForCausalLM(MistralConfig(vocab_size=v, sliding_window=None, **sizes)),
    ],
    ids=["qwen2", "mistral"],
)
def test_other_families_are_packed(make: Callable[..., Any]):
    causal = make(
        50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    for name, parameter in causal.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    adapted = AdaptedModel(causal.eval().requires_grad_(False))
    names = [n for n in adapted.modules if n.endswith(ALL)]
    assert adapted.packs(names)
    causal.config.use_sliding_window, causal.config.sliding_window = True, 16
    assert not AdaptedModel(causal).packs(names)


def test_a_model_that_computes_something_else_is_left_alone(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    names = LanguageModel.load(model_folder).adapter_shapes(ALL)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "silu", torch.nn.functional.gelu)
        assert not LanguageModel.load(model_folder).adapted.packs(names)
    with monkeypatch.context() as patch:  # another gradient alone
        patch.setattr(Norm, "backward", lambda self, gradient, x, inverse: gradient.mul_(inverse))
        assert not LanguageModel.load(model_folder).adapted.packs(names)
    hooked = LanguageModel.load(model_folder).adapted
    hooked.model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output)
    assert not hooked.packs(names)
    patched = LanguageModel.load(model_folder).adapted
    patched.model.model.layers[1].mlp.forward = patched.model.model.layers[1].mlp.forward
    assert not patched.packs(names)
    with monkeypatch.context() as patch:
        llama = packed.FAMILIES["LlamaForCausalLM"]
        patch.setitem(packed.FAMILIES, "LlamaForCausalLM", (*llama[:2], "OtherMLP", llama[3]))
        assert not LanguageModel.load(model_folder).adapted.packs(names)
    plain = LanguageModel.load(model_folder).adapted
    assert plain.packs(names)
    assert not plain.packs([*names, "lm_head"])
    assert not plain.packs([])
    assert not LanguageModel.load(model_folder, dtype="bfloat16").adapted.packs(names)
    gpt2 = AdaptedModel(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)))
    assert not gpt2.packs(["transformer.h.0.attn.c_attn"])


def test_only_training_is_packed(model: LanguageModel, examples: list[EncodedExample], monkeypatch: pytest.MonkeyPatch):
    model.adapted.packs(model.adapter_shapes(ALL))
    calls = []
    original = packed.PackedDecoder.hidden

    def spy(*args: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(packed.PackedDecoder, "hidden", spy)
    model.target_logprobs([(e.ids, e.targets) for e in examples[:3]])
    assert not calls
    train(model, [Member(examples[:5], 1)], SETTINGS, objective=Objective("influence"))  # theta_0 by the model itself
    assert calls == [True] * 2


@pytest.mark.parametrize("rate", [1e10, 1e20, 1e30])
def test_divergence_is_noticed(model: LanguageModel, examples: list[EncodedExample], rate: float):
    settings = replace(SETTINGS, learning_rate=rate, targets=("q_proj", "v_proj"))
    assert model.adapted.packs(model.adapter_shapes(settings.targets))
    with pytest.raises(RejectedError, match="diverged"):
        train(model, [Member(examples, 1)], settings)


def test_consecutive_rows():
    assert consecutive_rows([3, 3, 3, 3], max_tokens=6) == [[0, 1], [2, 3]]
    assert consecutive_rows([9, 1, 1, 1], max_tokens=6) == [[0], [1, 2, 3]]
    assert consecutive_rows([1] * 10, max_tokens=6) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert consecutive_rows([5], max_tokens=100) == [[0]]
