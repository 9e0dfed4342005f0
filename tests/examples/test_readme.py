"""What the README, the guide and the pages of the uses tell people to type is what the program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from example_support import ROOT

from daunce_api.cli import app
from daunce_api.config import RunConfig

PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "examples" / "guide" / "docs").glob("*.md"),
        *(ROOT / "examples").glob("uses/**/*.md"),
        ROOT / "examples" / "ci" / "README.md",
    ]
)
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|&&|\brun:) *(daunce [^`&#|\n]*)", re.MULTILINE)
SECTIONS = set(RunConfig.model_fields)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Bodies of a page's code blocks in these languages."""
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield body


def commands(page: Path) -> list[str]:
    """Every ``daunce ...`` of a page: in shell and YAML blocks, and in inline code."""
    text = page.read_text(encoding="utf-8")
    found = [
        c
        for body in blocks(page, "bash", "sh", "console", "yaml")
        for c in COMMAND.findall(re.sub(r"\\\n\s*", " ", body))
    ]
    prose = FENCE.sub("", text)
    found += re.findall(r"`(daunce [^`\n]+)`", prose)
    return [c.strip() for c in found]


def parse(command: str) -> None:
    """Let the command line parse a command, without running it."""
    name, *arguments = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    with group.make_context("daunce", [name, *arguments], resilient_parsing=True) as context:
        sub = group.get_command(context, name)
        assert sub is not None, f"there is no command {name!r}"
        needed = [p for p in sub.params if p.required]
        # In prose a command may stand for itself, without its arguments.
        if arguments or not needed:
            sub.make_context(name, list(arguments), parent=context)


CASES = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{p.parent.name}/{p.name}: {c}" for p, c in CASES])
def test_commands_parse(page: Path, command: str) -> None:
    parse(command)


def test_commands_are_found_and_wrong_ones_noticed() -> None:
    assert "daunce run run.yaml" in commands(ROOT / "README.md")
    assert len(commands(ROOT / "README.md")) > 10
    for wrong in ("daunce rune run.yaml", "daunce run run.yaml --recrod DIR", "daunce top RUN -k five --test q"):
        with pytest.raises((typer.TyperException, AssertionError)):
            parse(wrong)


def configs(page: Path) -> list[dict[str, Any]]:
    """YAML blocks whose keys are sections of a config; a part of one is completed with a data section."""
    found = []
    for body in blocks(page, "yaml"):
        content = yaml.safe_load(body)
        if isinstance(content, dict) and set(content) & SECTIONS:
            found.append({"data": {"train": "train.jsonl", "test": "test.jsonl"}, **content})
    return found


@pytest.mark.parametrize("page", PAGES, ids=[f"{p.parent.name}/{p.name}" for p in PAGES])
def test_configs_are_valid(page: Path) -> None:
    for content in configs(page):
        RunConfig.from_mapping(content)


def test_configs_are_found() -> None:
    assert sum(len(configs(page)) for page in PAGES) >= 5


def test_config_files_of_the_examples_are_valid() -> None:
    found = sorted((ROOT / "examples").glob("*.yaml")) + sorted((ROOT / "examples").glob("uses/*/*.yaml"))
    assert len(found) >= 3
    for path in found:
        config = RunConfig.from_yaml(path)
        if "uses" in path.parts:
            assert config.data.train.is_file()
            assert config.data.test.is_file()


@pytest.mark.parametrize("page", PAGES, ids=[f"{p.parent.name}/{p.name}" for p in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_comparison_is_the_measured_one() -> None:
    """Every row of the folded tables stands in the results, task by task."""
    measured = (ROOT / "tests" / "benchmarks" / "RESULTS-peers.md").read_text()
    folded = (
        (ROOT / "examples" / "guide" / "docs" / "evidence.md")
        .read_text()
        .partition("<details>")[2]
        .partition("</details>")[0]
    )
    for name in ("Digits", "Fashion-MNIST, MLP", "Fashion-MNIST, ResNet-9", "Language model"):
        shown = folded.partition(f"**{name}")[2].partition("\n\n**")[0]
        section = measured.partition(f"## {name}")[2].partition("\n## ")[0]
        rows = [line for line in shown.splitlines() if line.startswith("|")]
        assert len(rows) > 15
        assert rows == [line for line in section.splitlines() if line.startswith("|")]
