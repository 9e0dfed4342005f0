"""Whether fine-tuning is the cause of an answer at all: its loss under the base and the target beside the members'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 2.0
"""Standard errors by which the members' mean loss must lie below the base's."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Losses of one answer, in nats as the run measures them (per completion token by default).

    ``base``, ``target``: None where they could not be scored. ``members``: mean of K members; ``stderr``: of that mean.
    """

    question: str
    base: float | None
    target: float | None
    members: float
    stderr: float
    count: int

    @property
    def verdict(self) -> Literal["fine-tuning", "base", "unknown"]:
        """``fine-tuning``: members say it significantly more readily than the base does; ``base``: the base says it as
        readily; ``unknown``: the base could not be scored."""
        if self.base is None:
            return "unknown"
        return "fine-tuning" if self.base - self.members > SIGNIFICANT * self.stderr else "base"

    def text(self) -> str:
        """The finding in one line."""
        losses = [f"{self.members:.3f} under {self.count} members (± {SIGNIFICANT * self.stderr:.3f})"]
        if self.target is not None:
            losses.insert(0, f"{self.target:.3f} under the target")
        if self.base is None:
            return f"Loss {', '.join(losses)}; the base model could not be scored."
        losses.insert(0, f"{self.base:.3f} under the base")
        shown = f"loss {', '.join(losses)}"
        if self.verdict == "base":
            return f"Fine-tuning is not the cause: the base model gives this answer as readily ({shown})."
        return f"Fine-tuning made this answer more likely ({shown})."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "question": self.question,
            "verdict": self.verdict,
            "base_loss": self.base,
            "target_loss": self.target,
            "members_loss": self.members,
            "members_stderr": self.stderr,
            "members": self.count,
        }


def cause_of(question: str, loss_K: NDArray[np.float64], base: float | None, target: float | None) -> Cause:
    """From (K,) losses of the members, and those of the base and the target."""
    known = loss_K[np.isfinite(loss_K)]
    count = len(known)
    mean = float(known.mean()) if count else math.nan
    spread = float(known.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Cause(question, base, target, mean, spread, count)
