"""The crash storm in short; ``python -m tests.reliability.storm --kills 300 --server-kills 30`` is the long form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daunce_api import RunConfig

from .crashes import crash_storm
from .harness import Provider


def test_a_client_killed_again_and_again_pays_for_nothing_twice(
    provider: Provider, quiet: tuple[RunConfig, dict[str, Any]], tmp_path: Path
) -> None:
    tally = crash_storm(tmp_path, kills=4, seed=1, shared=(provider, quiet[1]))
    assert tally.client_kills == 4
    print(tally.text())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_client_and_server_killed_again_and_again(tmp_path: Path) -> None:
    tally = crash_storm(tmp_path, kills=12, server_kills=4, seed=2)
    assert (tally.client_kills >= 12, tally.server_kills >= 4) == (True, True)
    print(tally.text())
