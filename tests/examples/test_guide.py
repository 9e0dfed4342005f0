"""The guide: pages that are there, links that lead somewhere, and a reference of names that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml
from example_support import ROOT

GUIDE = ROOT / "examples" / "guide"
DOCS = GUIDE / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
PATH = re.compile(r"`((?:examples|tests|fixtures|daunce_api)/[\w./-]+)`")
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "examples" / "uses").glob("**/*.md")])


def test_every_page_is_in_the_navigation_and_there_are_not_too_many() -> None:
    settings = yaml.safe_load((GUIDE / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [page for entry in settings["nav"] for page in entry.values()]
    assert sorted(named) == sorted(p.name for p in DOCS.glob("*.md"))
    assert 5 <= len(named) <= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, _ in LINK.findall(text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path


def test_the_reference_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_guide_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pytest.importorskip("mkdocs.commands.build")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    config = importlib.import_module("mkdocs.config")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    settings = config.load_config(str(GUIDE / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    commands.build(settings)
    assert "write_report" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
