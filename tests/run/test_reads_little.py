"""Commands that look at a run read what they show: no training text is encoded, no further example parsed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Run
from daunce_api.data import kept
from daunce_api.plan import inputs


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A finished run that was looked at once."""
    folder = shutil.copytree(finished, tmp_path / "run")
    run = Run.open(folder)
    run.attribution().top("q0")
    return folder


def forbidden(name: str) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise AssertionError(name)

    return call


def test_a_second_look_encodes_nothing_and_parses_few_examples(
    run_dir: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, first, _ = cli("top", run_dir, "--test", "q1", "-k", 3)
    assert code == 0
    parsed: list[str] = []
    example_of = kept.example_of

    def counted(record: Any, identity: str, line: int) -> Any:
        parsed.append(identity)
        return example_of(record, identity, line)

    monkeypatch.setattr(kept, "example_of", counted)
    for name in ("encode_dataset", "open_tokenizer", "make_plan"):
        monkeypatch.setattr(inputs, name, forbidden(name))
    assert cli("top", run_dir, "--test", "q1", "-k", 3)[1] == first
    assert {name for name in parsed if name.startswith("t")} == {name for name in parsed if f" {name} " in f" {first} "}
    parsed.clear()
    assert cli("status", run_dir)[0] == 0
    assert [name for name in parsed if name.startswith("t")] == []


def test_without_what_is_kept_the_answers_are_the_same(run_dir: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    before = [cli(*command, run_dir, "--json")[1] for command in (("top",), ("status",))]
    shutil.rmtree(run_dir / "derived")
    for path in (run_dir / "data").glob("*.index.npz"):
        path.unlink()
    assert [cli(*command, run_dir, "--json")[1] for command in (("top",), ("status",))] == before


def test_token_ids_outlive_the_tokenizer(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "open_tokenizer", forbidden("open_tokenizer"))
    run = Run.open(run_dir)
    assert run.status().members_scored == 4
    assert list(run.attribution().top("q0", k=2)["rank"]) == [1, 2]
