"""Steps by hand of plain networks, in double precision, against autograd and torch's optimisers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from classifier_problem import problem
from torch import Tensor, nn

from daunce_api.providers.local.class_losses import ExampleLoss, example_cross_entropy
from daunce_api.providers.local.classifier import Classifier, ClassifierSettings, Members
from daunce_api.providers.objective import Objective

K = 3
MOMENTUM = ClassifierSettings(
    n_epochs=2, batch_size=8, momentum=0.9, learning_rate=0.05, weight_decay=0.1, schedule="cosine"
)
SETTINGS = {
    "sgd": ClassifierSettings(n_epochs=2, batch_size=8),
    "decay": ClassifierSettings(n_epochs=2, batch_size=8, weight_decay=0.1, schedule="linear"),
    "momentum": MOMENTUM,
    "adamw": ClassifierSettings(
        n_epochs=2, batch_size=8, optimizer="adamw", learning_rate=1e-2, weight_decay=0.1, schedule="linear"
    ),
}


def double(*layers: nn.Module) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        ends = nn.Linear(6, 12), nn.Linear(12, 4)
        return nn.Sequential(nn.Flatten(), ends[0], *layers, ends[1]).double()

    return factory


NETWORKS = {
    "relu": double(nn.ReLU()),
    "in place after a function of its input": double(nn.GELU(), nn.ELU(inplace=True)),
    "tanh": double(nn.Tanh()),
    "sigmoid": double(nn.Sigmoid()),
    "silu": double(nn.SiLU()),
    "gelu by tanh": double(nn.GELU(approximate="tanh")),
    "leaky": double(nn.LeakyReLU(0.3)),
    "elu": double(nn.ELU(0.7)),
    "two in a row": double(nn.Tanh(), nn.LeakyReLU(0.2)),
    "positions": lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 4)).double(),
}


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)


def both_ways(
    factory: Callable[[], nn.Module],
    chosen: ClassifierSettings,
    *,
    loss: ExampleLoss = example_cross_entropy,
    objective: Objective | None = None,
    members: int = K,
) -> tuple[Members, Members]:
    """Members by hand and by autograd."""
    inputs, labels, inclusion = problem(2, 3, members=members, dtype=torch.float64)
    trained = []
    for by_hand in (True, False):
        classifier = Classifier(factory, loss=loss)
        assert classifier._plain is not None
        if not by_hand:
            classifier._plain = None
        start = None if objective is None else classifier.fresh(1)
        trained.append(
            classifier.train(
                inputs, labels, inclusion, range(members), chosen, start=start, objective=objective or Objective()
            )
        )
    return trained[0], trained[1]


def assert_equal(members: tuple[Members, Members]) -> None:
    by_hand, expected = members
    for name, value in expected.parameters.items():
        torch.testing.assert_close(by_hand.parameters[name], value, rtol=1e-9, atol=1e-12)
        assert not by_hand.parameters[name].requires_grad


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layers_gradient_is_autograds(network: str):
    assert_equal(both_ways(NETWORKS[network], MOMENTUM))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("members", [1, K])
def test_every_optimisers_step_is_torchs(settings: str, members: int):
    assert_equal(both_ways(NETWORKS["relu"], SETTINGS[settings], members=members))


@pytest.mark.parametrize("loss", [example_cross_entropy, smoothed])
@pytest.mark.parametrize("kind", ["subset", "influence", "fisher"])
def test_every_objective_and_loss_is_minimised(kind: str, loss: ExampleLoss):
    objective = None if kind == "subset" else Objective(kind, rho=2.0, gamma=0.6)  # type: ignore[arg-type]
    assert_equal(both_ways(NETWORKS["tanh"], SETTINGS["sgd"], loss=loss, objective=objective))


def test_logits_that_are_far_apart_give_finite_gradients():
    inputs, labels, inclusion = problem(6, members=K)
    classifier = Classifier(lambda: nn.Sequential(nn.Linear(6, 4)))
    chosen = ClassifierSettings(batch_size=22, learning_rate=1e-3)
    members = classifier.train(inputs * 1e4, labels, inclusion, range(K), chosen)
    weight, bias = (classifier.fresh(0)[name].double() for name in ("0.weight", "0.bias"))
    subset = np.flatnonzero(inclusion[0])
    x = (inputs[subset] * 1e4).double()
    p = (x @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels[subset], 4)
    torch.testing.assert_close(members.parameters["0.bias"][0].double(), bias - 1e-3 * p.mean(0), rtol=1e-4, atol=1e-5)
    assert (members.parameters["0.weight"][0] - weight).abs().max() > 1
