"""Members of classifiers: many at a time, against plain PyTorch and direct formulas."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from classifier_problem import N, problem
from torch import Tensor, nn

from daunce_api.errors import ConfigurationError, RejectedError
from daunce_api.providers.local.classifier import (
    Classifier,
    ClassifierSettings,
    bytes_per_member,
    example_cross_entropy,
    margin,
)
from daunce_api.providers.objective import Objective, noise
from daunce_api.providers.randomness import ORDER, stream

K = 5


def load_example(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vision = load_example("vision_models")


class Branching(nn.Linear):
    """A model whose control flow depends on the data: vmap cannot run it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.abs().sum().item() > 0 else -x)


def plain_training(
    model: nn.Module, inputs: Tensor, labels: Tensor, subset: np.ndarray, seed: int, chosen: ClassifierSettings
) -> nn.Module:
    model.train()
    if chosen.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(model.parameters(), weight_decay=chosen.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), momentum=chosen.momentum, weight_decay=chosen.weight_decay, lr=1.0
        )
    random = stream(seed, ORDER)
    positions = np.flatnonzero(subset)
    total = chosen.n_epochs * -(-len(positions) // chosen.batch_size)
    step = 0
    for _ in range(chosen.n_epochs):
        order = positions[random.permutation(len(positions))]
        for first in range(0, len(order), chosen.batch_size):
            batch = order[first : first + chosen.batch_size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.param_groups[0]["lr"] = chosen.rate(step, total)
            optimizer.step()
            step += 1
    return model


SETTINGS = [
    ClassifierSettings(n_epochs=2, batch_size=8),
    ClassifierSettings(n_epochs=2, batch_size=8, momentum=0.9, learning_rate=0.03, weight_decay=0.1, schedule="cosine"),
    ClassifierSettings(n_epochs=1, batch_size=8, optimizer="adamw", learning_rate=1e-3, schedule="linear"),
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("shape", [(6,), (1, 8, 8)], ids=["mlp", "resnet9"])
def test_members_equal_plain_training_of_each(chosen: ClassifierSettings, shape: tuple[int, ...]):
    def factory() -> nn.Module:
        model: nn.Module = vision.MLP(6, 5, 4) if len(shape) == 1 else vision.ResNet9(channels=1, classes=4, width=2)
        return model

    inputs, labels, inclusion = problem(*shape, members=K)
    classifier = Classifier(factory)
    members = classifier.train(inputs, labels, inclusion, range(K), chosen)
    assert len(members) == K
    losses = classifier.measure(members, inputs, labels, batch=7)
    assert losses.shape == (K, N)
    for k in (0, 3):
        model = factory()
        model.load_state_dict(classifier.fresh(k))
        plain_training(model, inputs, labels, inclusion[k], k, chosen).eval()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(members.state(k)[name], value, rtol=2e-4, atol=2e-5)
        with torch.no_grad():
            expected = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        np.testing.assert_allclose(losses[k], expected, rtol=2e-3, atol=2e-4)


def test_models_that_cannot_be_batched_are_trained_one_at_a_time():
    inputs, labels, inclusion = problem(6, members=K)
    chosen = ClassifierSettings(n_epochs=2, batch_size=8)
    losses = []
    for factory in (lambda: Branching(6, 4), lambda: nn.Linear(6, 4)):
        classifier = Classifier(factory)
        members = classifier.train(inputs, labels, inclusion, range(K), chosen)
        losses.append(classifier.measure(members, inputs, labels))
        assert classifier._together == {True: factory().__class__ is nn.Linear}
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


class Doubled(nn.Sequential):
    """A sequence that does not run as one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].register_forward_hook(lambda _, __, out: 2 * out)
    return model


PLAIN = {
    "nested, with a shape to flatten": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Identity(), nn.Linear(5, 4)
    ),
    "positions beside the examples": lambda: nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 4)),
}
OTHERS = {
    "no bias": lambda: nn.Sequential(nn.Linear(6, 4, bias=False)),
    "own forward": lambda: Doubled(nn.Linear(6, 4)),
    "hook": hooked,
    "normalised": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 4)),
    "part of a shape flattened": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(6, 4), nn.Flatten()),
    "parametrized": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
}


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_members_together_are_members_alone_whatever_the_module(name: str):
    factory = (PLAIN | OTHERS)[name]
    shape = (2, 3) if name in PLAIN else (1, 6) if "shape" in name else (6,)
    inputs, labels, inclusion = problem(*shape, members=K)
    chosen = ClassifierSettings(n_epochs=2, batch_size=8, momentum=0.5)
    classifier = Classifier(factory)
    together, alone = (
        classifier.train(inputs, labels, inclusion, range(K), chosen, memory_limit=limit) for limit in (None, 1)
    )
    for weight, value in alone.parameters.items():
        torch.testing.assert_close(together.parameters[weight], value, rtol=1e-4, atol=1e-6)
    losses = [classifier.measure(m, inputs, labels) for m in (together, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)


def test_the_memory_limit_decides_how_many_are_trained_at_once(monkeypatch: pytest.MonkeyPatch):
    inputs, labels, inclusion = problem(6, members=K)
    chosen = ClassifierSettings(n_epochs=1, batch_size=8)
    one = bytes_per_member(nn.Linear(6, 4), inputs[:8], chosen)
    weights = 4 * (6 * 4 + 4)
    assert one >= 2 * weights + 4 * 8 * (6 + 4)
    assert one == bytes_per_member(nn.Linear(6, 4), inputs.repeat(100, 1)[:8], chosen)  # others' inputs are not its own
    counts = []
    whole = Classifier(lambda: nn.Linear(6, 4)).train(inputs, labels, inclusion, range(K), chosen)
    classifier = Classifier(lambda: nn.Linear(6, 4))
    fit = classifier._fit
    monkeypatch.setattr(
        classifier, "_fit", lambda members, *rest: (counts.append(len(members)), fit(members, *rest))[1]
    )
    parts = classifier.train(inputs, labels, inclusion, range(K), chosen, memory_limit=2 * one + 1)
    assert counts == [2, 2, 1]
    for name, value in whole.parameters.items():
        torch.testing.assert_close(parts.parameters[name], value)


def test_margin_and_loss_are_the_formulas():
    logits = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(9) % 5
    p = logits.softmax(1)[torch.arange(9), labels]
    torch.testing.assert_close(margin(logits, labels), p.log() - (1 - p).log())
    torch.testing.assert_close(example_cross_entropy(logits, labels), -p.log())


@pytest.mark.parametrize("kind", ["influence", "fisher"])
def test_one_step_of_a_perturbed_objective_is_its_gradient(kind: str):
    inputs, labels, inclusion = problem(6, dtype=torch.float64, members=K)
    objective = Objective(kind, rho=2.0, gamma=0.6)
    classifier = Classifier(lambda: nn.Linear(6, 4, bias=False).double())
    start = classifier.fresh(3)
    rate = 1e-2
    one_step = ClassifierSettings(batch_size=N, learning_rate=rate)
    # The first step leaves theta_0, so that the second one, also compared, has a loss term.
    two_steps = ClassifierSettings(n_epochs=2, batch_size=N, learning_rate=rate)
    weights = start["weight"].clone()
    logits_0 = inputs @ start["weight"].T
    for chosen in (one_step, two_steps):
        members = classifier.train(inputs, labels, inclusion[:1], [9], chosen, start=start, objective=objective)
        subset = np.flatnonzero(inclusion[0])
        xi = torch.from_numpy(noise(len(subset), 9))
        live = weights.clone().requires_grad_()
        z, z_0, y = (inputs @ live.T)[subset], logits_0[subset], labels[subset]
        p, p_0 = z.softmax(1)[range(22), y], z_0.softmax(1)[range(22), y]
        shift = ((z_0.softmax(1) - nn.functional.one_hot(y, 4)) * (z - z_0)).sum(1)
        if kind == "influence":
            value = 0.6 * (p_0.log() - p.log()) - (1 + 2.0 * (2 * xi - 1)) * shift
        else:
            moved = (p / (1 - p)).log() - (p_0 / (1 - p_0)).log()
            value = 0.6 * moved**2 - 2.0 * (2 * xi - 1) * shift
        weights = weights - rate * torch.autograd.grad(value.mean(), live)[0]
        torch.testing.assert_close(members.parameters["weight"][0], weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [Objective("influence", rho=2.0, gamma=0.6), Objective("fisher", rho=2.0)])
def test_a_members_first_step_is_the_sum_of_the_examples_gradients_by_its_weights(objective: Objective):
    inputs, labels, inclusion = problem(6, dtype=torch.float64, members=K)
    classifier = Classifier(lambda: nn.Linear(6, 4, bias=False).double())
    start = classifier.fresh(1)
    one_step = ClassifierSettings(n_epochs=1, batch_size=N, learning_rate=0.1)
    members = classifier.train(inputs, labels, inclusion, range(K), one_step, start=start, objective=objective)
    weight = start["weight"].clone().requires_grad_()
    losses = example_cross_entropy(inputs @ weight.T, labels)
    gradients = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
    weights = objective.weights_KN(inclusion, np.arange(K))
    assert weights is not None
    factors = torch.from_numpy(weights - 22 / N)
    assert (factors[torch.from_numpy(~inclusion)] == 0).all()
    expected = start["weight"] - 0.1 / 22 * torch.einsum("kn,nco->kco", factors, gradients)
    torch.testing.assert_close(members.parameters["weight"], expected, rtol=1e-9, atol=1e-12)


def test_members_that_no_noise_moves_have_no_weights_of_their_own():
    inclusion = np.ones((1, 3), dtype=bool)
    for objective in (Objective(), Objective("influence", rho=0.0)):
        assert objective.weights_KN(inclusion, np.arange(1)) is None


def test_without_noise_the_influence_objective_stays_at_the_start():
    inputs, labels, inclusion = problem(1, 8, 8, members=K)
    classifier = Classifier(lambda: vision.ResNet9(channels=1, classes=4, width=2))
    start = classifier.fresh(3)
    chosen = ClassifierSettings(n_epochs=2, batch_size=8)
    moved = []
    for rho in (0.0, 1.0):
        objective = Objective("influence", rho=rho)
        members = classifier.train(inputs, labels, inclusion, range(K), chosen, start=start, objective=objective)
        moved.append(max((members.parameters[n] - start[n]).abs().max().item() for n in members.parameters))
        assert all(torch.equal(b[0], start[n]) for n, b in members.buffers.items())
    assert moved[0] < 1e-5
    assert moved[1] > 1e-4


def test_impossible_requests_are_refused():
    inputs, labels, inclusion = problem(6, members=K)
    classifier = Classifier(lambda: nn.Linear(6, 4))
    with pytest.raises(ConfigurationError, match="start="):
        classifier.train(inputs, labels, inclusion, range(K), ClassifierSettings(), objective=Objective("fisher"))
    with pytest.raises(ConfigurationError, match="needs a seed"):
        classifier.train(inputs, labels, inclusion, range(K - 1), ClassifierSettings())
    uneven = inclusion.copy()
    uneven[0] = True
    with pytest.raises(ConfigurationError, match="same size"):
        classifier.train(inputs, labels, uneven, range(K), ClassifierSettings())
    with pytest.raises(RejectedError, match="diverged"):
        classifier.train(inputs * 1e20, labels, inclusion, range(K), ClassifierSettings(learning_rate=1e30, n_epochs=3))
