"""Fresh weights of many members: the bits of modules that are constructed under each seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from daunce_api.providers.local.fresh import FreshWeights

SEEDS = (3, 7, 2**40 + 1, 0, 7)


def constructed(factory: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(factory().state_dict())


class Counted:
    """A factory and how often it was called."""

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        self.factory, self.calls = factory, 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        return self.factory()


def initialised(change: Callable[[nn.Linear], object]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        with torch.no_grad():
            change(model[0])
        return model

    return factory


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class Drawn(nn.Linear):
    """A weight that is made of random numbers, not filled with them."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.position = nn.Parameter(torch.randn(3))
        self.register_buffer("fixed", torch.arange(3.0) * 2)


REPEATED = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 4, bias=False)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)),
    "normalised": lambda: nn.Sequential(nn.Embedding(9, 20, padding_idx=2), nn.LayerNorm(6), nn.GroupNorm(2, 6)),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 8),
    "recurrent": lambda: nn.LSTM(3, 5),
    "initialised in place": initialised(lambda layer: nn.init.normal_(nn.init.xavier_uniform_(layer.weight), std=0.3)),
    "part of a weight": initialised(lambda layer: layer.weight[1:3, ::2].normal_()),
    "nothing random": lambda: nn.BatchNorm1d(3),
}
CONSTRUCTED = {
    "orthogonal": initialised(lambda layer: nn.init.orthogonal_(layer.weight)),
    "rejected and drawn again": initialised(lambda layer: nn.init.trunc_normal_(layer.weight, a=-0.1, b=0.1)),
    "by another draw": initialised(lambda layer: layer.weight.mul_(torch.rand(1))),
    "by what was drawn": initialised(lambda layer: layer.weight.div_(layer.weight.norm())),
    "decided by what was drawn": initialised(
        lambda layer: layer.bias.zero_() if layer.weight[2, 0] > 0 else None  # not so for the first two seeds
    ),
    "by random numbers of others": initialised(lambda layer: layer.weight.fill_(np.random.default_rng().random())),
    "by the seed": initialised(lambda layer: layer.weight.fill_(torch.initial_seed() % 1000)),
    "seed of its own": initialised(lambda layer: (torch.manual_seed(1), layer.weight.normal_())),
    "generator of its own": initialised(lambda layer: layer.weight.normal_(generator=torch.Generator())),
    "made of random numbers": Drawn,
    "in other precision": lambda: nn.Linear(6, 4).double(),
    "tied": tied,
}


@pytest.mark.parametrize("name", [*REPEATED, *CONSTRUCTED])
def test_every_member_has_the_bits_of_its_own_construction(name: str):
    factory = Counted((REPEATED | CONSTRUCTED)[name])
    fresh = FreshWeights(factory)
    before = torch.get_rng_state()
    stacked = fresh.of(SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert factory.calls == 2 if name in REPEATED else factory.calls > len(SEEDS)
    if name == "by random numbers of others":
        return  # no two constructions agree
    again = fresh.of(SEEDS[2:])
    for k, seed in enumerate(SEEDS):
        expected = constructed(factory, seed)
        assert stacked.keys() == expected.keys()
        for weight, value in expected.items():
            torch.testing.assert_close(stacked[weight][k], value, rtol=0, atol=0)
            if k >= 2:
                torch.testing.assert_close(again[weight][k - 2], value, rtol=0, atol=0)


def test_a_single_seed_is_constructed():
    factory = Counted(REPEATED["linear"])
    fresh = FreshWeights(factory)
    fresh.of([4, 4])
    assert factory.calls == 2
    fresh.of([4, 5])
    assert factory.calls == 4
    fresh.of([6])
    assert factory.calls == 4
