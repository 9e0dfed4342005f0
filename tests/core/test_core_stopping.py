from __future__ import annotations

import pytest

from daunce_api.core import SelfLDS, StopRule
from daunce_api.core.quality import Curve
from daunce_api.errors import ConfigurationError
from tests.core.problems import linear_problem, self_lds


def _look(members: int, value: float, b: float = 50.0) -> SelfLDS:
    curve = Curve(value**-2 - b / members, b)
    return SelfLDS(value, value - 0.05, value + 0.05, "whitened", members, value, 1.0, curve)


def test_a_value_is_reached_by_the_estimate_or_surely() -> None:
    history = [_look(10, 0.4), _look(20, 0.62)]
    assert StopRule(0.6).reason(history[:1]) is None
    assert "20 members" in (StopRule(0.6).reason(history) or "")
    assert StopRule(0.6, surely=True).reason(history) is None
    assert StopRule(0.6).reason([]) is None
    assert StopRule(0.6, min_members=21).reason(history) is None


def test_a_plateau_needs_a_flat_curve_and_no_recent_gain() -> None:
    steep, flat = _look(40, 0.6), _look(80, 0.605, b=1.0)
    rule = StopRule(plateau=0.01)
    assert rule.reason([_look(40, 0.6), flat]) is not None
    assert rule.reason([flat]) is None, "one look is not a plateau"
    assert rule.reason([flat, steep]) is None, "the curve still rises"
    assert rule.reason([_look(40, 0.5), flat]) is None, "the last round still gained"
    blind = SelfLDS(0.0, -0.1, 0.1, "whitened", 20, 0.0, 1.0, None)
    assert rule.reason([blind, blind]) is None, "a run that shows nothing yet has no plateau"


def test_a_real_run_stops_before_its_last_member() -> None:
    problem = linear_problem(members=160, train=80, test=12)
    looks = [self_lds(problem.train[:k], problem.test[:k], problem.inclusion[:k]) for k in range(20, 161, 20)]
    rule = StopRule(0.999, plateau=0.01, min_members=30)
    stopped = next(n for n in range(1, len(looks) + 1) if rule.reason(looks[:n]))
    assert 30 <= looks[stopped - 1].members < 160
    assert looks[-1].value - looks[stopped - 1].value < 0.03


@pytest.mark.parametrize("limits", [{}, {"self_lds": 0.0}, {"self_lds": 1.0}, {"plateau": 0.0}])
def test_impossible_targets_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        StopRule(**limits)
