"""From answers marked wanted and unwanted to training data without the cause: what to remove, and whether it helped."""

from __future__ import annotations

from .proposal import Proposal, candidates, marked, propose, propose_for

__all__ = ["Proposal", "candidates", "marked", "propose", "propose_for"]
