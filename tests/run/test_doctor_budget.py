"""What ``daunce doctor`` costs: said before anything is sent, capped, and written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from daunce_api import RunConfig
from daunce_api.cli import doctor
from daunce_api.cli.findings import Findings

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Looks at the endpoint that were made."""
    made: list[object] = []

    def examine(run: object, *, tiny: object = None) -> Findings:
        made.append(run)
        return Findings()

    monkeypatch.setattr(doctor, "examine", examine)
    return made


def written(make_config: Callable[..., RunConfig], folder: Path, **sections: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(make_config(**sections).model_dump(mode="json", exclude_none=True)))
    return path


def test_a_free_endpoint_is_looked_at_without_a_question(
    make_config: Callable[..., RunConfig], tmp_path: Path, cli: Cli, looks: list[object]
) -> None:
    code, out, _ = cli("doctor", written(make_config, tmp_path), "--json")
    assert (code, json.loads(out)["max_price_usd"], len(looks)) == (0, 0.0, 1)
    assert not list(tmp_path.glob("*.doctor.jsonl"))


def test_a_look_has_a_price_and_all_looks_together_a_cap(
    make_config: Callable[..., RunConfig], tmp_path: Path, cli: Cli, looks: list[object]
) -> None:
    path = written(make_config, tmp_path, budget={"price": {"input": 500.0, "output": 500.0}})
    code, _, err = cli("doctor", path)
    assert code == 2
    assert "at most $0." in err
    assert "add --yes" in err
    assert not looks
    code, out, _ = cli("doctor", path, "--yes", "--json")
    price = json.loads(out)["max_price_usd"]
    assert 0 < price < 1
    ledger = tmp_path / "run.yaml.doctor.jsonl"
    assert [json.loads(line)["usd"] for line in ledger.read_text().splitlines()] == [price]
    while (code := cli("doctor", path, "--yes")[0]) == 0:
        assert len(looks) < 20
    assert code == 3
    assert len(looks) == int(1 / price)
    assert cli("doctor", path, "--yes", "--max-usd", "5")[0] == 0
    ledger.write_text("{}")
    assert cli("doctor", path, "--yes")[0] == 4


def test_the_key_is_looked_for_before_any_question(
    make_config: Callable[..., RunConfig], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(make_config, tmp_path, budget={"price": {"training": 500.0, "input": 500.0, "output": 500.0}})
    monkeypatch.delenv("TEST_SERVER_KEY")
    for command in ("doctor", "run"):
        code, _, err = cli(command, path)
        assert code == 2
        assert "TEST_SERVER_KEY holds no API key" in err
        assert "--yes" not in err
