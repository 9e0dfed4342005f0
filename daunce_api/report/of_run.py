"""The report of a run: what the store knows of it, beside its attribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..attribution import Attribution
from ..run import Run
from ..status import RunStatus
from .page import Candidates, write_report

REPORT_NAME = "report.html"
"""Inside the run folder."""

Ranked: TypeAlias = Callable[[Run, Attribution], Candidates | None]


def no_candidates(run: Run, attribution: Attribution) -> Candidates | None:
    """Where nobody ranks what to remove."""
    return None


def write_report_of(
    run: Run,
    attribution: Attribution,
    output: Path | None = None,
    *,
    status: RunStatus | None = None,
    candidates: Ranked = no_candidates,
) -> Path:
    """Write the HTML report of a run and return its path (default: ``report.html`` in the run folder).

    Answers that fewer members have scored form groups of their own, with other scales: each of these groups has its own
    page beside (``report-2.html``, ...), and the pages link to each other.

    Args:
        attribution: of the group on the first page.
        status: the run's, where it is known already.
        candidates: makes the removal ranking of a group, where answers in it are marked.

    Raises StoreError where a page cannot be written.
    """
    path = output or run.run_dir / REPORT_NAME
    status = status or run.status()
    rest = [group for group in run.attributions() if group.test.ids != attribution.test.ids]
    groups = [attribution, *rest]
    paths = [path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, len(groups) + 1)]
    for group, page in zip(groups, paths, strict=True):
        others = [(p.name, other) for p, other in zip(paths, groups, strict=True) if other is not group]
        shown = candidates(run, group)
        write_report(group, page, run=status, warnings=run.warnings, candidates=shown, others=others)
    return path
