"""Value and gradient of every objective, against direct double-precision formulas on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_training import train_members
from torch import Tensor
from transformers import AutoModelForCausalLM

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import ConfigurationError
from daunce_api.providers.local import losses
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.lora import ActiveLora, AdaptedModel, Batch
from daunce_api.providers.local.losses import row_values, token_nats, token_statistics
from daunce_api.providers.local.options import LocalOptions
from daunce_api.providers.local.train import Member
from daunce_api.providers.objective import Objective, noise
from daunce_api.providers.options import parse_options

SCALING = 2.0


@pytest.fixture(params=[1 << 22, 600], ids=["one slice", "slices"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CPU_LOGITS", request.param)


@pytest.fixture(scope="module")
def double(model_folder: Path) -> AdaptedModel:
    causal = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    return AdaptedModel(causal.eval().requires_grad_(False))


def random_weights(model: LanguageModel, seed: int, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(torch.randn(s, generator=generator, dtype=torch.float64) * scale for s in ((3, n_in), (n_out, 3)))
        for name, (n_in, n_out) in model.adapter_shapes(None).items()
    }


@pytest.fixture(params=[None, 1.5])
def logits(
    double: AdaptedModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Tensor], Tensor]:
    """The model's logits by the formula, once it scales and caps them."""
    assert double.head_width == double.config.vocab_size
    monkeypatch.setattr(double, "cap", request.param)
    monkeypatch.setattr(double, "factor", 0.7)

    def of(hidden: Tensor) -> Tensor:
        raw = hidden @ double.head.weight.T * 0.7
        return raw if request.param is None else request.param * torch.tanh(raw / request.param)

    return of


def tokens(double: AdaptedModel) -> Batch:
    """Seven tokens of one row."""
    target = torch.randint(0, double.head_width, (7,))
    return Batch(torch.zeros(1, 7), torch.zeros(7, dtype=torch.long), torch.arange(7), target, [7])


def statistics_directly(
    logits: Tensor, target: Tensor, logits_0: Tensor, with_margin: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(len(target))
    p = logits.softmax(1)[rows, target]
    onehot = torch.nn.functional.one_hot(target, logits.shape[1])
    shift = ((logits_0.softmax(1) - onehot) * (logits - logits_0)).sum(1)
    return -p.log(), p.log() - (1 - p).log(), shift


@pytest.mark.usefixtures("slices")
def test_token_statistics_and_their_gradients(double: AdaptedModel, logits: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    hidden = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    hidden_0 = torch.randn(7, 32, dtype=torch.float64)
    batch = tokens(double)
    target = batch.target
    weight = torch.randn(3, 7, dtype=torch.float64)

    expected = torch.stack(statistics_directly(logits(hidden), target, logits(hidden_0)))
    (gradient,) = torch.autograd.grad((weight * expected).sum(), hidden)
    nats, margin, shift, *at_0 = token_statistics(double, hidden, hidden_0, batch, None)
    got = torch.stack([nats, margin, shift])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad((weight * got).sum(), hidden)[0], gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(at_0, list(statistics_directly(logits(hidden_0), target, logits(hidden_0))[:2]))


@pytest.mark.usefixtures("slices")
def test_the_loss_alone_and_its_gradient(double: AdaptedModel, logits: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    hidden = (torch.randn(7, 32, dtype=torch.float64) * 20).requires_grad_()
    batch = tokens(double)
    target = batch.target
    expected = -logits(hidden).log_softmax(1)[torch.arange(7), target]
    weight = torch.randn(7, dtype=torch.float64)
    got = token_nats(double, hidden, batch)
    torch.testing.assert_close(got, expected)
    gradients = (torch.autograd.grad((weight * nats).sum(), hidden)[0] for nats in (got, expected))
    torch.testing.assert_close(*gradients)


def directly(
    double: AdaptedModel,
    objective: Objective,
    example: EncodedExample,
    weights: ActiveLora,
    start: ActiveLora | None,
    xi: float,
) -> Tensor:
    def target_logits(lora: ActiveLora | None) -> Tensor:
        with double.using(lora):
            return double.logits(torch.tensor([example.ids]))[[t - 1 for t in example.targets]]

    target = torch.tensor([example.ids[t] for t in example.targets])
    with torch.no_grad():
        logits_0 = target_logits(start)
    logits = target_logits(weights)
    nats, margin, shift = (v.mean() for v in statistics_directly(logits, target, logits_0))
    nats_0, margin_0, _ = (v.mean() for v in statistics_directly(logits_0, target, logits_0))
    if objective.kind == "subset":
        return nats
    if objective.kind == "influence":
        return objective.gamma * (nats - nats_0) - (1 + objective.rho * (2 * xi - 1)) * shift
    return objective.gamma * (margin - margin_0) ** 2 - objective.rho * (2 * xi - 1) * shift


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("kind", ["subset", "influence", "fisher"])
def test_objectives_equal_the_formulas(
    double: AdaptedModel, model: LanguageModel, examples: list[EncodedExample], kind: str
):
    objective = Objective(kind, rho=3.0, gamma=0.7)
    start = ActiveLora(random_weights(model, 1, 0.2), SCALING)
    weights = {n: (a.requires_grad_(), b.requires_grad_()) for n, (a, b) in random_weights(model, 2, 0.2).items()}
    flat = [t for pair in weights.values() for t in pair]
    chosen, xi = examples[:3], [0.1, 0.8, 0.6]
    batch = Batch.of([(e.ids, e.targets) for e in chosen], double.device)
    with double.using(ActiveLora(weights, SCALING)):
        values, _ = row_values(double, objective, batch, xi, start)
        gradient = torch.autograd.grad((values * torch.tensor([1.0, 2.0, -1.0])).sum(), flat)
    expected = torch.stack(
        [
            directly(double, objective, e, ActiveLora(weights, SCALING), start, x)
            for e, x in zip(chosen, xi, strict=True)
        ]
    )
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-8)
    for got, want in zip(
        gradient, torch.autograd.grad((expected * torch.tensor([1.0, 2.0, -1.0])).sum(), flat), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rho", "zero"), [(0.0, True), (1.0, False)])
def test_the_influence_gradient_vanishes_at_the_start_without_noise(
    double: AdaptedModel, model: LanguageModel, examples: list[EncodedExample], rho: float, zero: bool
):
    weights = {n: (a.requires_grad_(), b.requires_grad_()) for n, (a, b) in random_weights(model, 1, 0.2).items()}
    flat = [t for pair in weights.values() for t in pair]
    active = ActiveLora(weights, SCALING)
    batch = Batch.of([(e.ids, e.targets) for e in examples], double.device)
    with double.using(active):
        values, _ = row_values(double, Objective("influence", rho=rho), batch, noise(len(examples), 4).tolist(), active)
        gradient = torch.autograd.grad(values.sum(), flat)
    largest = max(g.abs().max().item() for g in gradient)
    assert (largest < 1e-12) == zero
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)


def test_every_objective_trains(model: LanguageModel, examples: list[EncodedExample]):
    chosen = LoraSettings(rank=3, n_epochs=2, learning_rate=1e-4)
    start = {n: (a.float(), b.float()) for n, (a, b) in random_weights(model, 1, 0.1).items()}
    moved = {}
    for kind, rho in (("influence", 5.0), ("fisher", 5.0), ("subset", 0.0)):
        trained, losses = train_members(
            model.adapted,
            [Member(examples, 3)],
            model.adapter_shapes(None),
            chosen,
            start,
            objective=Objective(kind, rho=rho),
            max_tokens=512,
        )
        moved[kind, rho] = max((trained[0][n][1] - b).abs().max().item() for n, (_, b) in start.items())
        assert losses[0][0] > 1
    assert min(moved.values()) > 1e-4
    assert len(set(moved.values())) == 3


def test_noise_is_uniform_and_a_members_own():
    xi = noise(20_000, 3)
    assert 0 <= xi.min() <= xi.max() < 1
    np.testing.assert_allclose([xi.mean(), xi.var()], [1 / 2, 1 / 12], atol=0.01)
    assert not np.array_equal(xi[:5], noise(5, 4))
    np.testing.assert_array_equal(xi[:5], noise(5, 3))


@pytest.mark.parametrize("wrong", [{"kind": "other"}, {"rho": -1.0}, {"gamma": 0.0}])
def test_impossible_objectives_are_refused_in_python(wrong: dict[str, Any]):
    with pytest.raises(ConfigurationError):
        Objective(**wrong)


@pytest.mark.parametrize("wrong", [{"objective": "other"}, {"rho": -1.0}, {"gamma": 0.0}])
def test_impossible_objectives_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        parse_options(LocalOptions, wrong, "backend.options")
