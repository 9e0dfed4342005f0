"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from .candidates import Candidates, Retrained
from .facts import RunFacts
from .page import write_report

__all__ = ["Candidates", "Retrained", "RunFacts", "write_report"]
