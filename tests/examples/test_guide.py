"""The guide: pages that are there, links that lead somewhere, and a reference of names that exist."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from example_support import ROOT

GUIDE = ROOT / "examples" / "guide"
DOCS = GUIDE / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
PATH = re.compile(r"`((?:examples|tests|fixtures|daunce_api)/[\w./-]+)`")
USES = ROOT / "examples" / "uses"
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("api*.md")))
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), *USES.glob("**/*.md"), ROOT / "examples" / "ci" / "README.md"])


def test_every_page_is_in_the_navigation_and_there_are_not_too_many() -> None:
    settings = yaml.safe_load((GUIDE / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = [page for entry in settings["nav"] for page in entry.values()]
    named = [p for e in entries for p in ([e] if isinstance(e, str) else [q for inner in e for q in inner.values()])]
    assert sorted(named) == sorted(p.name for p in DOCS.glob("*.md"))
    assert 5 <= len(entries) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, _ in LINK.findall(text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path


def test_the_reference_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE)
    assert len(names) > 10
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_reference_has_what_people_call() -> None:
    """The documented ways in: Python names of the commands, of evaluation, and of what a config can point to."""
    for name in (
        "plan.Plan",
        "status.RunStatus",
        "evaluation.experiments",
        "evaluation.retrieval",
        "attribution.similarity",
        "fix.propose",
        "evaluation.interchange",
        "evaluation.removal",
        "providers.replay.record",
        "providers.replay.replay",
        "providers.local.task.ClassifierTask",
    ):
        assert f"\n::: daunce_api.{name}\n" in REFERENCE, name


def test_the_first_page_leads_to_every_use() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    table = text.partition("## Worked uses")[2].partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 7
    named = {(DOCS / target).resolve() for target, _ in LINK.findall("\n".join(rows))}
    assert {*USES.glob("*/README.md"), ROOT / "examples" / "ci" / "README.md"} < named
    assert USES / "notebook" / "attribute.ipynb" in named


def test_evaluate_is_explained_where_reports_are() -> None:
    text = (DOCS / "report.md").read_text(encoding="utf-8").partition("## Is the ranking right?")[2]
    for words in ("`--retrieval labels.json`", "`--lds`", "`--removal`", '{"q-17": ["faq-3", "faq-8"]', "A dash means"):
        assert words in text


def test_the_tests_install_what_builds_the_guide() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [requirement.partition(">")[0] for requirement in extras["docs"]] == [
        "mkdocs-material",
        "mkdocstrings[python]",
    ]
    assert "daunce-api[all,docs]" in extras["test"]


def test_the_guide_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("mkdocs", "mkdocstrings", "material"):
        pytest.importorskip(name)
    # In a process of its own: CPython 3.11's ast.parse can fail in one in which a recursion limit was met.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", GUIDE / "mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [*command, "-d", tmp_path / "site"], env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    reference = "".join(page.read_text(encoding="utf-8") for page in site.glob("api*/index.html"))
    for name in ("report.write_report", "evaluation.experiments.lds_table", "attribution.similarity.embedding_scores"):
        assert f'id="daunce_api.{name}"' in reference
    assert 'href="uses/backdoor/"' in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "uses" / "backdoor" / "index.html").is_file()
