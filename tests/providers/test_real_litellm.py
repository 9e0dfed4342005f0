"""A run behind LiteLLM's proxy, where one stands in front of `daunce serve` (examples/servers/litellm.sh FOLDER).

DAUNCE_LITELLM=http://127.0.0.1:4000 pytest -s -m long tests/providers/test_real_litellm.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_servers import MEMBERS, live, small_run

from daunce_api.cli.doctor import examine
from daunce_api.errors import StopError

URL, pytestmark = live("DAUNCE_LITELLM")
RECIPE = {"learning_rate_multiplier": 2.0}


def backend(path: str) -> dict[str, str]:
    return {"kind": "openai_wire", "model": "daunce-tiny", "base_url": f"{URL}{path}"}


def test_its_pass_through_carries_a_whole_run(tmp_path: Path) -> None:
    (tmp_path / "direct").mkdir()
    direct = small_run(tmp_path / "direct", {"kind": "embedded"}, RECIPE).execute()
    run = small_run(tmp_path, backend("/openai"), RECIPE)
    assert examine(run).ok
    through = run.execute()
    assert through.train_loss_KN.shape == (MEMBERS, 24)
    furthest = max(
        float(np.abs(through.train_loss_KN - direct.train_loss_KN).max()),
        float(np.abs(through.test_loss_KM - direct.test_loss_KM).max()),
    )
    print(f"\nthrough LiteLLM against the embedded server: at most {furthest:.2g} nats")
    assert furthest < 1e-4
    run.ask(prompt="What is carbon?", answer="A black element.")
    report = run.clean()
    assert report.kept == {}
    assert len(report.models) == 2 * MEMBERS  # the jobs' models of earlier epochs too
    assert len(report.files) == MEMBERS


def test_its_own_jobs_route_is_refused_with_the_address_that_works(tmp_path: Path) -> None:
    run = small_run(tmp_path, backend("/v1"), RECIPE)
    findings = examine(run)
    assert [c.name for c in findings.checks if c.ok is False] == ["fine-tuning jobs"]
    assert any("/openai" in advice for advice in findings.advice)
    with pytest.raises(StopError, match=r"Nothing was submitted.*/openai"):
        run.execute()
