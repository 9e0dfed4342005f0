"""The report of a run: what the store knows of it, beside its attribution."""

from __future__ import annotations

from pathlib import Path

from .attribution import Attribution
from .pipeline import Run
from .report import RunFacts, write_report
from .store import RunStore

REPORT_NAME = "report.html"
"""Inside the run folder."""


def write_report_of(run: Run, attribution: Attribution, output: Path | None = None) -> Path:
    """Write the HTML report of a run and return its path (default: ``report.html`` in the run folder)."""
    return write_report(attribution, output or run.run_dir / REPORT_NAME, run=facts_of(run, attribution))


def facts_of(run: Run, attribution: Attribution) -> RunFacts:
    """The run at a glance, from its store."""
    with RunStore.open(run.run_dir, read_only=True) as store:
        transitions = store.transitions()
        left_out = [t for t in transitions if t.subject.startswith("left out")]
        halted = [t.detail for t in transitions if t.subject == "halted"]
        jobs = store.jobs()
        return RunFacts(
            name=run.config.name,
            provider=run.config.backend.kind,
            model=run.config.backend.model,
            started_at=transitions[0].time if transitions else "",
            finished_at=transitions[-1].time if transitions else "",
            members_asked=run.config.ensemble.members,
            members_trained=len(attribution.members),
            members_failed=len({t.subject for t in left_out}),
            dollars=store.spent(),
            training_tokens=sum(job.trained_tokens or 0 for job in jobs),
            warnings=run.warnings,
            failures=tuple(f"{t.subject.removeprefix('left out ')}: {t.detail}" for t in left_out),
            stopped=halted[-1] if halted else "",
        )
