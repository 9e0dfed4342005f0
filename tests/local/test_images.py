"""Members that see images: channels last, side by side as channels, and what is left to vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from classifier_problem import problem
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from daunce_api.providers.local.classifier import Classifier, ClassifierSettings
from daunce_api.providers.local.images import SideBySide, channels_last, channels_last_weights

K = 3
POOLING: dict[str, Callable[[Tensor], Any]] = {
    "halves": nn.MaxPool2d(2),
    "whole": nn.AdaptiveMaxPool2d(1),
    "padded": nn.MaxPool2d(3, stride=2, padding=1),
    "dilated": nn.MaxPool2d(2, stride=1, dilation=2),
    "rounded up": nn.MaxPool2d(3, ceil_mode=True),
    "with positions": lambda x: functional.max_pool2d(x, 2, return_indices=True)[0],
    "mean": nn.AvgPool2d(2),
    "mean of all": nn.AdaptiveAvgPool2d(1),
    "rows": nn.MaxPool1d(2),
}


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", POOLING)
def test_pooling_of_members_and_its_gradients_are_torchs_of_each_ties_included(name: str, last: bool):
    shape = (4, 5, 6) if name == "rows" else (4, 5, 6, 6)
    x = torch.randint(0, 3, (K, *shape), generator=torch.Generator().manual_seed(0)).double()
    if last and len(shape) == 4:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    x.requires_grad_()
    with SideBySide():
        together = vmap(POOLING[name])(x)
    alone = [POOLING[name](x[k].contiguous()) for k in range(K)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-15)
    weights = torch.rand(together.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((together * weights).sum(), x)
    (expected,) = torch.autograd.grad((torch.stack(alone) * weights).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_normalisation_of_members_is_torchs_of_each(training: bool, options: dict[str, Any]):
    layer = nn.BatchNorm2d(5, **options).double().train(training)
    random = torch.Generator().manual_seed(0)
    state = {
        n: torch.rand(K, *t.shape, dtype=t.dtype, generator=random) if t.is_floating_point() else t.repeat(K)
        for n, t in layer.state_dict().items()
    }
    parameters = {n: state[n].requires_grad_() for n, _ in layer.named_parameters()}
    x = torch.randn(K, 4, 5, 6, 6, dtype=torch.float64, generator=random, requires_grad=True)
    each = [{n: t[k].detach().clone().requires_grad_(n in parameters) for n, t in state.items()} for k in range(K)]
    with SideBySide():
        together = vmap(lambda held, inputs: functional_call(layer, held, (inputs,)))(state, x)
    weights = torch.rand(x.shape, dtype=x.dtype, generator=random)
    gradients = torch.autograd.grad((together * weights).sum(), [x, *parameters.values()])
    for k in range(K):
        inputs = x[k].detach().requires_grad_()
        alone = functional_call(layer, each[k], (inputs,))
        torch.testing.assert_close(together[k], alone)
        expected = torch.autograd.grad((alone * weights[k]).sum(), [inputs, *(each[k][n] for n in parameters)])
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine[k], theirs)
        for name, tensor in each[k].items():
            torch.testing.assert_close(state[name][k], tensor)


class Viewed(nn.Module):
    """Takes a feature map apart in a way that channels last does not allow."""

    def __init__(self, apart: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(27, 4)
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.apart(functional.max_pool2d(self.norm(self.convolution(x)).relu(), 2)))
        return out


def viewed() -> nn.Module:
    return Viewed(lambda x: x.view(len(x), -1))


def flattened() -> nn.Module:
    return Viewed(lambda x: x.flatten(1))


def of_constants() -> nn.Module:
    return Viewed(lambda x: (x + functional.max_pool2d(torch.ones(1, 3, 6, 6).to(x), 2)).flatten(1))


@pytest.mark.parametrize("factory", [viewed, flattened, of_constants])
def test_members_together_are_members_alone_in_any_layout(factory: Callable[[], nn.Module]):
    inputs, labels, inclusion = problem(2, 8, 8, dtype=torch.float64, members=K)
    chosen = ClassifierSettings(n_epochs=2, batch_size=8, momentum=0.9)
    trained = []
    for limit in (None, 1):
        classifier = Classifier(lambda: factory().double(), memory_limit=limit)
        trained.append(classifier.train(inputs, labels, inclusion, range(K), chosen))
        assert classifier._channels_last == (set() if factory is viewed else {"convolution.weight"})
        assert classifier._together == {True: True}
        assert classifier._side_by_side is (factory is not of_constants)
    plain = Classifier(lambda: factory().double())
    plain._channels_last, plain._side_by_side = frozenset(), False
    expected = plain.train(inputs, labels, inclusion, range(K), chosen)
    for members in trained:
        for name, value in (expected.parameters | expected.buffers).items():
            torch.testing.assert_close((members.parameters | members.buffers)[name], value)
        np.testing.assert_allclose(
            classifier.measure(members, inputs, labels), plain.measure(expected, inputs, labels), rtol=1e-9
        )
        assert all(t.is_contiguous() for t in members.state(1).values())


def test_convolutions_give_channels_last_to_what_follows():
    layer = nn.Conv2d(2, 4, 3)
    x = torch.randn(K, 2, 2, 8, 8)
    names = channels_last_weights(layer, x[0])
    assert names == {"weight"}
    state = channels_last({n: torch.stack([t] * K) for n, t in layer.state_dict().items()}, names)
    torch.testing.assert_close(state["weight"][0], layer.weight.detach())
    out = vmap(lambda held, inputs: functional_call(layer, held, (inputs,)))(state, x)
    assert out.movedim(0, 1).flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
