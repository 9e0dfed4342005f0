"""The report of a run: what the store knows of it, beside its attribution."""

from __future__ import annotations

from pathlib import Path

from .attribution import Attribution
from .report import RunFacts, write_report
from .run import Run
from .status import failures_of
from .store import RunStore
from .usage import usage_of

REPORT_NAME = "report.html"
"""Inside the run folder."""


def write_report_of(run: Run, attribution: Attribution, output: Path | None = None) -> Path:
    """Write the HTML report of a run and return its path (default: ``report.html`` in the run folder).

    Raises StoreError where it cannot be written.
    """
    path = output or run.run_dir / REPORT_NAME
    return write_report(attribution, path, run=facts_of(run, attribution))


def facts_of(run: Run, attribution: Attribution) -> RunFacts:
    """The run at a glance, from its store."""
    with RunStore.open(run.run_dir, read_only=True) as store:
        transitions = store.transitions()
        used = usage_of(store, run.material.encoded, priced=run.material.priced)
        failures = failures_of(store)
        halted = [t.detail for t in transitions if t.subject == "halted"]
        return RunFacts(
            name=run.run_dir.name if run.config.name == "run" else run.config.name,
            provider=run.config.backend.kind,
            model=run.config.backend.model,
            started_at=used.started_at,
            finished_at=used.finished_at,
            members_asked=run.config.ensemble.members,
            members_trained=len(attribution.members),
            members_failed=len(failures),
            dollars=used.usd,
            training_tokens=used.trained_tokens,
            scoring_tokens=used.scored_tokens,
            seconds=used.seconds,
            job_seconds=used.job_seconds,
            warnings=run.warnings,
            failures=failures,
            stopped=halted[-1] if halted else "",
        )
