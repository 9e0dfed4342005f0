"""What the server's processes get of the environment."""

from __future__ import annotations

import pytest

from daunce_api._util.environment import worker_environment


def test_keys_stay_out_and_what_python_needs_stays_in(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = dict.fromkeys(("OPENAI_API_KEY", "DAUNCE_SERVE_API_KEY", "MY_TOKEN", "AWS_SECRET"), "sk-secret")
    needed = {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HF_HOME": "/models", "LC_ALL": "C", "PYTHONPATH": "/mine"}
    for name, value in {**secrets, **needed}.items():
        monkeypatch.setenv(name, value)
    environment = worker_environment()
    assert not set(secrets) & set(environment)
    assert "sk-secret" not in environment.values()
    assert environment.pop("PYTHONPATH").endswith(needed.pop("PYTHONPATH"))
    assert needed.items() <= environment.items()
