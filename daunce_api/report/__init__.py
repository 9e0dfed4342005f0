"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from .page import Candidates, write_report

__all__ = ["Candidates", "write_report"]
