"""Members of classifiers that are unlike the usual: whole-number inputs, random layers, own losses, tied weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from classifier_problem import N, problem
from torch import Tensor, nn

from daunce_api.providers.local.classifier import Classifier, ClassifierSettings, Members
from daunce_api.providers.objective import Objective, noise

K = 4


class Pixels(nn.Linear):
    """Images as bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype) / 255)


@pytest.mark.parametrize("kind", ["influence", "fisher"])
def test_images_of_bytes_are_perturbed_as_their_floats_are(kind: str):
    inputs, labels, inclusion = problem(6, members=K)
    as_bytes = ((inputs.clamp(-2, 2) + 2) * 60).to(torch.uint8)
    classifier = Classifier(lambda: Pixels(6, 4))
    start = classifier.fresh(3)
    trained = [
        classifier.train(
            given,
            labels,
            inclusion,
            range(K),
            ClassifierSettings(n_epochs=2, batch_size=8),
            start=start,
            objective=Objective(kind, rho=2.0),
        )
        for given in (as_bytes, as_bytes.float())
    ]
    for name, value in trained[1].parameters.items():
        torch.testing.assert_close(trained[0].parameters[name], value, rtol=0, atol=0)
        assert (value - start[name]).abs().max() > 1e-3


class Shaken(nn.Linear):
    """Dropout that no layer tells of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


RANDOM = {
    "layer": lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)),
    "function": lambda: Shaken(6, 4),
}


@pytest.mark.parametrize("name", RANDOM)
def test_members_with_dropout_do_not_depend_on_their_group(name: str):
    inputs, labels, inclusion = problem(6, members=K)
    chosen = ClassifierSettings(n_epochs=2, batch_size=8)
    classifier = Classifier(RANDOM[name])
    together = classifier.train(inputs, labels, inclusion, range(K), chosen)
    for k in range(K):
        alone = classifier.train(inputs, labels, inclusion[k : k + 1], [k], chosen)
        for weight, value in alone.parameters.items():
            torch.testing.assert_close(together.parameters[weight][k], value[0], rtol=0, atol=0)
    # Each has masks of its own.
    start = classifier.fresh(0)
    same = classifier.train(inputs, labels, inclusion[[0, 0]], [1, 2], chosen, start=start)
    once = classifier.train(inputs, labels, inclusion[:1], [1], ClassifierSettings(batch_size=N), start=start)
    other = classifier.train(inputs, labels, inclusion[:1], [2], ClassifierSettings(batch_size=N), start=start)
    assert (same.parameters.keys()) == start.keys()
    assert any((once.parameters[n] - other.parameters[n]).abs().max() > 1e-4 for n in start)


@pytest.mark.parametrize("name", RANDOM)
def test_a_perturbed_objective_has_no_dropout_and_trains_members_together(name: str, monkeypatch: pytest.MonkeyPatch):
    inputs, labels, inclusion = problem(6, members=K)
    classifier = Classifier(RANDOM[name])
    start = classifier.fresh(3)
    counts: list[int] = []
    fit = classifier._fit
    monkeypatch.setattr(
        classifier, "_fit", lambda members, *rest: (counts.append(len(members)), fit(members, *rest))[1]
    )
    still = Objective("influence", rho=0.0)
    members = classifier.train(inputs, labels, inclusion, range(K), ClassifierSettings(), start=start, objective=still)
    assert counts == [K]
    assert all((value - start[weight]).abs().max() < 1e-5 for weight, value in members.parameters.items())


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)


@pytest.mark.parametrize("kind", ["influence", "fisher"])
def test_a_perturbed_objective_is_around_the_tasks_own_loss(kind: str):
    inputs, labels, inclusion = problem(6, members=K)
    inputs = inputs.double()
    objective = Objective(kind, rho=2.0, gamma=0.6)
    classifier = Classifier(lambda: nn.Linear(6, 4, bias=False).double(), loss=smoothed)
    start = classifier.fresh(3)
    subset, rate = np.flatnonzero(inclusion[0]), 1e-2
    chosen = ClassifierSettings(n_epochs=2, batch_size=N, learning_rate=rate)
    members = classifier.train(inputs, labels, inclusion[:1], [9], chosen, start=start, objective=objective)
    xi, x, y = torch.from_numpy(noise(len(subset), 9)), inputs[subset], labels[subset]
    z_0, weights = x @ start["weight"].T, start["weight"].clone()
    target = 0.8 * nn.functional.one_hot(y, 4).double() + 0.05
    for _ in range(2):  # the second step has left theta_0, so that it has a loss term
        live = weights.clone().requires_grad_()
        z = x @ live.T
        shift = ((z_0.softmax(1) - target) * (z - z_0)).sum(1)
        if kind == "influence":
            moved = (target * (z_0.log_softmax(1) - z.log_softmax(1))).sum(1)
            value = 0.6 * moved - (1 + 2.0 * (2 * xi - 1)) * shift
        else:
            p, p_0 = z.softmax(1)[range(22), y], z_0.softmax(1)[range(22), y]
            moved = (p / (1 - p)).log() - (p_0 / (1 - p_0)).log()
            value = 0.6 * moved**2 - 2.0 * (2 * xi - 1) * shift
        weights = weights - rate * torch.autograd.grad(value.mean(), live)[0]
    torch.testing.assert_close(members.parameters["weight"][0], weights, rtol=1e-10, atol=1e-12)


def twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def normalised_twice() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(4, 4), layer, nn.ReLU(), nn.Linear(4, 4), layer)


def shared_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def members_of(
    classifier: Classifier, inputs: Tensor, labels: Tensor, inclusion: np.ndarray, **options: Any
) -> Members:
    chosen = ClassifierSettings(n_epochs=2, batch_size=22, learning_rate=0.2)
    return classifier.train(inputs, labels, inclusion, range(K), chosen, **options)


@pytest.mark.parametrize("factory", [twice, normalised_twice, shared_weight])
def test_weights_that_a_model_holds_twice_are_trained_as_one(factory: Callable[[], nn.Module]):
    inputs, labels, inclusion = problem(4, members=K)
    classifier = Classifier(factory)
    members = members_of(classifier, inputs, labels, inclusion)
    losses = classifier.measure(members, inputs, labels)
    for k in (0, K - 1):
        model = factory()
        model.load_state_dict(classifier.fresh(k))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        subset = np.flatnonzero(inclusion[k])
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[subset]), labels[subset]).backward()
            optimizer.step()
        state = members.state(k)
        classifier.check(state)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
        model.eval()
        with torch.no_grad():
            expected = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        np.testing.assert_allclose(losses[k], expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(-classifier.log_probabilities(state, inputs, labels), losses[k], atol=1e-5)
    perturbed = members_of(classifier, inputs, labels, inclusion, start=members.state(0), objective=Objective("fisher"))
    assert any((v[0] - members.parameters[n][0]).abs().max() > 1e-4 for n, v in perturbed.parameters.items())
