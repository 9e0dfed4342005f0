"""The report of a run: what the store knows of it, beside its attribution."""

from __future__ import annotations

from pathlib import Path

from ..attribution import Attribution
from ..run import Run
from ..status import RunStatus
from .facts import RunFacts
from .page import write_report

REPORT_NAME = "report.html"
"""Inside the run folder."""


def write_report_of(
    run: Run, attribution: Attribution, output: Path | None = None, *, status: RunStatus | None = None
) -> Path:
    """Write the HTML report of a run and return its path (default: ``report.html`` in the run folder).

    ``status``: the run's, where it is known already. Raises StoreError where it cannot be written.
    """
    return write_report(attribution, output or run.run_dir / REPORT_NAME, run=facts_of(run, status or run.status()))


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
