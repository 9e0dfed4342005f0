"""What an evaluation found, as rows of figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One method of a table: its name and its figures, None where they are not known (a NaN becomes None)."""

    method: str
    figures: Mapping[str, float | None]

    def __post_init__(self) -> None:
        known = {name: None if v is None or math.isnan(v) else v for name, v in self.figures.items()}
        object.__setattr__(self, "figures", known)


@dataclass(frozen=True, slots=True)
class Table:
    """What an evaluation found.

    Attributes:
        name: ``lds``, ``retrieval`` or ``removal``.
        rows: one for each method, ours first.
        notes: on how much it rests, and how to read it.
    """

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``name``, ``rows`` (``method`` and its figures), ``notes``."""
        return asdict(self)

    def text(self) -> str:
        """Columns for a terminal."""
        names = list(self.rows[0].figures)
        width = max(len(row.method) for row in self.rows)
        lines = [" " * width + "".join(f"{name:>12}" for name in names)]
        for row in self.rows:
            cells = ("-" if value is None else f"{value:.3f}" for value in row.figures.values())
            lines.append(f"{row.method:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join([*lines, *self.notes])
