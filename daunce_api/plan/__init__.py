"""Tokens, money and time of a run, before anything is spent."""

from __future__ import annotations

from .plan import Plan
from .planning import make_plan
from .prices import Hosting, JobCosts, Price

__all__ = ["Hosting", "JobCosts", "Plan", "Price", "make_plan"]
