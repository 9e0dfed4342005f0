"""The report of a run: one HTML file that needs nothing else, and the view of an `Attribution` in a notebook."""

from __future__ import annotations

from ..attribution.notebook import notebook_html, rows_html
from .facts import QualityPoint, RunFacts
from .page import write_report

__all__ = ["QualityPoint", "RunFacts", "notebook_html", "rows_html", "write_report"]
