"""The report of a run: what the store knows of it, beside its attribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from ..attribution import Attribution
from ..run import Run
from ..status import RunStatus
from .candidates import Candidates
from .facts import OtherGroup, RunFacts
from .page import write_report

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
    facts = facts_of(run, status or run.status())
    rest = [group for group in run.attributions() if group.test.ids != attribution.test.ids]
    groups = [attribution, *rest]
    paths = [path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, len(groups) + 1)]
    for n, (group, page) in enumerate(zip(groups, paths, strict=True)):
        links = other_groups(groups, [p.name for p in paths], n)
        write_report(group, page, run=facts, candidates=candidates(run, group), others=links)
    return path


def other_groups(groups: Sequence[Attribution], addresses: Sequence[str], shown: int) -> list[OtherGroup]:
    """Links from the page of one group of answers to those of the others."""
    return [
        OtherGroup(address, len(group.test), len(group.members))
        for n, (group, address) in enumerate(zip(groups, addresses, strict=True))
        if n != shown
    ]


def facts_of(run: Run, status: RunStatus) -> RunFacts:
    """The run at a glance."""
    return RunFacts(
        name=run.run_dir.name if status.name == "run" else status.name,
        provider=status.provider,
        model=status.model,
        started_at=status.started_at,
        finished_at=status.last_result_at,
        members_asked=status.members_asked,
        members_trained=status.members_scored,
        members_failed=status.members_failed,
        dollars=status.usd,
        training_tokens=status.trained_tokens,
        scoring_tokens=status.scored_tokens,
        seconds=status.seconds,
        job_seconds=status.job_seconds,
        warnings=run.warnings,
        failures=status.failures,
        stopped="" if status.complete else status.stopped,
    )
