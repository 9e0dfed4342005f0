"""Whether fine-tuning is the cause of an answer at all: its loss under the base and the target beside the members'."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 2.0
"""Standard errors by which the members' mean loss must lie below the base's."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Losses of one answer, in nats as the run measures them (per completion token by default).

    ``base_loss``, ``target_loss``: None where they could not be scored. ``members_loss``: mean of ``members`` members;
    ``members_stderr``: of that mean.
    """

    question: str
    base_loss: float | None
    target_loss: float | None
    members_loss: float
    members_stderr: float
    members: int

    @property
    def verdict(self) -> Literal["fine-tuning", "base", "unknown"]:
        """``fine-tuning``: members say it significantly more readily than the base does; ``base``: the base says it as
        readily; ``unknown``: the base could not be scored."""
        if self.base_loss is None:
            return "unknown"
        apart = self.base_loss - self.members_loss
        return "fine-tuning" if apart > SIGNIFICANT * self.members_stderr else "base"

    def text(self) -> str:
        """The finding in one line."""
        away = SIGNIFICANT * self.members_stderr
        losses = [f"{self.members_loss:.3f} under {self.members} members (± {away:.3f})"]
        if self.target_loss is not None:
            losses.insert(0, f"{self.target_loss:.3f} under the target")
        if self.base_loss is None:
            return f"Loss {', '.join(losses)}; the base model could not be scored."
        losses.insert(0, f"{self.base_loss:.3f} under the base")
        shown = f"loss {', '.join(losses)}"
        if self.verdict == "base":
            return f"Fine-tuning is not the cause: the base model gives this answer as readily ({shown})."
        return f"Fine-tuning made this answer more likely ({shown})."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "verdict": self.verdict}


def cause_of(question: str, loss_K: NDArray[np.float64], base: float | None, target: float | None) -> Cause:
    """From (K,) losses of the members, and those of the base and the target."""
    known = loss_K[np.isfinite(loss_K)]
    count = len(known)
    mean = float(known.mean()) if count else math.nan
    spread = float(known.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Cause(question, base, target, mean, spread, count)
