"""Tokens, money and time of a run, before anything is spent."""

from __future__ import annotations

from .plan import Missing, Plan
from .planning import make_plan, plan_of_missing
from .prices import Hosting, JobCosts, Price

__all__ = ["Hosting", "JobCosts", "Missing", "Plan", "Price", "make_plan", "plan_of_missing"]
