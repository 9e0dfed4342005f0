"""The public names, pinned: a name that comes or goes is a decision."""

from __future__ import annotations

import subprocess
import sys

import daunce_api
from daunce_api import core


def test_the_public_names_are_these() -> None:
    assert sorted(daunce_api.__all__) == [
        "Attribution",
        "Dataset",
        "DaunceError",
        "Example",
        "Message",
        "Run",
        "RunConfig",
        "__version__",
        "attribute",
    ]
    for name in daunce_api.__all__:
        assert getattr(daunce_api, name) is not None


def test_completion_shows_the_public_names() -> None:
    assert dir(daunce_api) == sorted(daunce_api.__all__)


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "daunce_api", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == daunce_api.__version__


def test_the_core_has_its_entry_points() -> None:
    assert {"scores", "choose", "estimate", "top", "group_scores", "self_influence"} <= set(core.__all__)
    for name in core.__all__:
        assert (getattr(core, name).__doc__ or "").strip() or name in ("ESTIMATORS", "QUESTIONS", "Question", "Rho")


def test_the_core_install_needs_no_torch() -> None:
    """Importing the package and its command line loads nothing of an extra."""
    code = (
        "import sys, daunce_api, daunce_api.cli, daunce_api.run, daunce_api.cli.template, daunce_api.core;"
        "extras = {'torch', 'transformers', 'peft', 'starlette', 'vcr', 'pyarrow'} & set(sys.modules);"
        "sys.exit(f'loaded {extras}' if extras else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
