"""What the doctor found, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .._util.text import terminal_text


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``ok`` is None where it is neither good nor bad, or could not be determined."""

    name: str
    ok: bool | None
    detail: str


@dataclass(slots=True)
class Findings:
    """What the doctor found. ``sigma_token`` and ``sigma_example`` are standard deviations of one measurement in nats;
    ``advice`` says what to change, ``tried`` whether log-probabilities were requested."""

    checks: list[Check] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    sigma_token: float | None = None
    sigma_example: float | None = None
    seconds_per_request: float | None = None
    requests_per_second: float | None = None
    tried: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing was found that stops a run."""
        return all(check.ok is not False for check in self.checks)

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        self.checks.append(Check(name, ok, detail))

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """Lines for people; nothing of a server's text is obeyed by the terminal."""
        marks = {True: "ok  ", False: "FAIL", None: "-   "}
        lines = [f"{marks[c.ok]}  {c.name}: {terminal_text(c.detail)}" for c in self.checks]
        lines += ["", *(f"Change: {terminal_text(a)}" for a in self.advice)] if self.advice else []
        usable = "This endpoint can be used." if self.tried else "No problems found; log-probabilities were not tested."
        lines += ["", usable if self.ok else "This endpoint cannot be used as it is configured."]
        return "\n".join(lines)
