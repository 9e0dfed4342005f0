"""The load test in short; ``python -m tests.reliability.storm --load-seconds 600`` is the long form."""

from __future__ import annotations

from .harness import Provider
from .load import load


def test_no_answer_is_lost_or_crossed_under_64_connections(provider: Provider) -> None:
    assert provider.server is not None
    found = load(provider.server, 1)
    print(found.text())
    assert found.rounds >= 3
    assert max(found.growth) < 30
