"""``daunce view``: a local page over all runs in a folder: live state, reports, and two runs side by side."""

from __future__ import annotations

from .runs import Runs, find_runs
from .server import serve, view_app

__all__ = ["Runs", "find_runs", "serve", "view_app"]
