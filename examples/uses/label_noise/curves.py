"""Precision-recall curves as a small SVG, legible on light and dark pages; needs no plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, LEFT, TOP, SIDE = 620, 340, 56, 16, 280
GREY = "#767676"
# Colours that differ for colour-blind readers too; dashes tell apart curves that lie on each other.
STYLES = (("#2a78c8", ""), ("#d9730d", ""), ("#1a9a6c", ""), ("#b757a6", "6 4"), (GREY, "2 3"))


def precision_recall(hits_DN: NDArray[np.int64], relevant: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) recall and precision at every rank, means over draws; ``hits_DN``: found by then in each draw."""
    hits_N = hits_DN.mean(axis=0)
    return hits_N / relevant, hits_N / np.arange(1, hits_N.size + 1)


def draw(path: Path, curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> None:
    """Write at most five named curves, (recall, precision) each, with a legend in their order."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="sans-serif" font-size="12">',
        "<title>Precision against recall of rankings that look for wrong labels</title>",
    ]
    for tenth in range(0, 11, 2):
        x, y = LEFT + SIDE * tenth / 10, TOP + SIDE * (1 - tenth / 10)
        parts.append(f'<path d="M{LEFT} {y:g}h{SIDE}" stroke="{GREY}" stroke-opacity=".25" fill="none"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end" fill="{GREY}">{tenth / 10:g}</text>')
        parts.append(f'<text x="{x:g}" y="{TOP + SIDE + 18}" text-anchor="middle" fill="{GREY}">{tenth / 10:g}</text>')
    middle = TOP + SIDE / 2
    parts.append(
        f'<text x="{LEFT + SIDE / 2:g}" y="{TOP + SIDE + 38}" text-anchor="middle" fill="{GREY}">recall</text>'
    )
    parts.append(
        f'<text transform="translate(16 {middle:g}) rotate(-90)" text-anchor="middle" fill="{GREY}">precision</text>'
    )
    for number, ((name, (recall, precision)), (colour, dash)) in enumerate(zip(curves.items(), STYLES, strict=False)):
        new = np.flatnonzero(np.diff(np.floor(recall * SIDE), prepend=-1) > 0)  # a point a unit of the picture
        points = " ".join(
            f"{LEFT + SIDE * r:.1f},{TOP + SIDE * (1 - p):.1f}"
            for r, p in zip(recall[new], precision[new], strict=True)
        )
        line = f'stroke="{colour}" stroke-width="2" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
        x, y = LEFT + SIDE + 24, TOP + 12 + 22 * number
        parts.append(f'<polyline points="{points}" {line}/>')
        parts.append(f'<path d="M{x} {y}h26" {line}/>')
        parts.append(f'<text x="{x + 34}" y="{y + 4}" fill="{GREY}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
