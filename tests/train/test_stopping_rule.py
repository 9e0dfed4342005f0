from __future__ import annotations

import pytest

from daunce_api.config import StopConfig
from daunce_api.core import SelfLDS
from daunce_api.core.quality import Curve
from daunce_api.errors import ConfigurationError
from daunce_api.train.stopping import Stopping, enough
from tests.core.problems import linear_problem, self_lds


def _look(members: int, value: float, b: float = 50.0) -> SelfLDS:
    curve = Curve(value**-2 - b / members, b)
    return SelfLDS(value, value - 0.05, value + 0.05, "whitened", members, value, 1.0, curve)


def test_a_value_is_reached_by_the_estimate_or_surely() -> None:
    history, reached = [_look(10, 0.4), _look(20, 0.62)], StopConfig(self_lds=0.6)
    assert enough(reached, history[:1]) is None
    assert "20 members" in (enough(reached, history) or "")
    assert enough(StopConfig(self_lds=0.6, surely=True), history) is None
    assert enough(reached, []) is None
    assert enough(StopConfig(self_lds=0.6, min_members=21), history) is None


def test_a_plateau_needs_a_flat_curve_and_no_recent_gain() -> None:
    steep, flat = _look(40, 0.6), _look(80, 0.605, b=1.0)
    rule = StopConfig(plateau=0.01)
    assert enough(rule, [_look(40, 0.6), flat]) is not None
    assert enough(rule, [flat]) is None, "one look is not a plateau"
    assert enough(rule, [flat, steep]) is None, "the curve still rises"
    assert enough(rule, [_look(40, 0.5), flat]) is None, "the last round still gained"
    blind = SelfLDS(0.0, -0.1, 0.1, "whitened", 20, 0.0, 1.0, None)
    assert enough(rule, [blind, blind]) is None, "a run that shows nothing yet has no plateau"


def test_a_real_run_stops_before_its_last_member() -> None:
    problem = linear_problem(members=100, train=50, test=12)
    looks = [self_lds(problem.train[:k], problem.test[:k], problem.inclusion[:k]) for k in range(20, 101, 20)]
    rule = StopConfig(self_lds=0.999, plateau=0.01, min_members=30)
    stopped = next(n for n in range(1, len(looks) + 1) if enough(rule, looks[:n]))
    assert 30 <= looks[stopped - 1].members < 100
    assert looks[-1].value - looks[stopped - 1].value < 0.03


def test_a_stop_without_a_condition_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs self_lds or plateau"):
        Stopping(StopConfig())
