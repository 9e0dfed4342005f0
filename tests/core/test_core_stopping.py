from __future__ import annotations

import pytest

from daunce_api.core import self_lds
from daunce_api.core.forecast import Curve
from daunce_api.core.quality import SelfLDS
from daunce_api.core.stopping import AtLeast, Plateau, Reached
from daunce_api.errors import ConfigurationError
from tests.core.problems import linear_problem


def _look(members: int, value: float, b: float = 50.0) -> SelfLDS:
    return SelfLDS(
        value, value - 0.05, value + 0.05, "whitened", members, value, 1.0, Curve(value**-2 - b / members, b)
    )


def test_a_value_is_reached_by_the_estimate_or_surely() -> None:
    history = [_look(10, 0.4), _look(20, 0.62)]
    assert Reached(0.6).met(history[:1]) is None
    assert "20 members" in (Reached(0.6).met(history) or "")
    assert Reached(0.6, surely=True).met(history) is None
    assert Reached(0.6).met([]) is None


def test_a_plateau_needs_a_flat_curve_and_no_recent_gain() -> None:
    steep, flat = _look(40, 0.6), _look(80, 0.605, b=1.0)
    assert Plateau(0.01).met([_look(40, 0.6), flat]) is not None
    assert Plateau(0.01).met([flat]) is None, "one look is not a plateau"
    assert Plateau(0.01).met([flat, steep]) is None, "the curve still rises"
    assert Plateau(0.01).met([_look(40, 0.5), flat]) is None, "the last round still gained"
    blind = SelfLDS(0.0, -0.1, 0.1, "whitened", 20, 0.0, 1.0, None)
    assert Plateau(0.01).met([blind, blind]) is None, "a run that shows nothing yet has no plateau"


def test_conditions_compose() -> None:
    history = [_look(10, 0.62)]
    assert (Reached(0.6) & AtLeast(20)).met(history) is None
    assert (Reached(0.6) & AtLeast(10)).met(history) is not None
    assert (Reached(0.9) | AtLeast(10)).met(history) == "10 members"
    assert (Reached(0.9) | Plateau(0.1)).met(history) is None
    assert AtLeast(1).met([]) is None


def test_a_real_run_stops_before_its_last_member() -> None:
    problem = linear_problem(members=200)
    looks = [self_lds(problem.train[:k], problem.test[:k], problem.inclusion[:k]) for k in range(20, 201, 20)]
    rule = (Reached(0.999) | Plateau(0.01)) & AtLeast(30)
    stopped = next(n for n in range(1, len(looks) + 1) if rule.met(looks[:n]))
    assert 30 <= looks[stopped - 1].members < 200
    assert looks[-1].value - looks[stopped - 1].value < 0.03


@pytest.mark.parametrize("make", [lambda: Reached(0.0), lambda: Reached(1.0), lambda: Plateau(0.0)])
def test_impossible_targets_are_refused(make: object) -> None:
    with pytest.raises(ConfigurationError):
        make()  # type: ignore[operator]
