"""How an `Attribution` looks in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from .tables import ranking_table

if TYPE_CHECKING:
    from .measurements import Measurements

_TESTS = 5
_TOP = 3


def notebook_html(attribution: Measurements) -> str:
    """A small HTML view: what was computed and how good it is, and the first few answers with their strongest examples.

    Inline styles only, colours by ``currentColor``, so that it fits light and dark notebooks; all text is escaped.
    """
    quality, choice = attribution.self_lds, attribution.choice
    head = (
        f"{len(attribution.members)} members · {len(attribution.train):,} training × {len(attribution.test):,} test "
        f"examples · {choice.estimator.name}"
    )
    if earlier := checkpoints(attribution):
        head += f" · {earlier}"
    if quality is not None:
        head += f" · self-LDS {quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}]"
    shown, rows = attribution.test[:_TESTS], []
    places = list(range(len(shown)))
    rankings = [attribution.ranking(_TOP, opponents=opponents, columns=places) for opponents in (False, True)]
    for j, example in enumerate(shown):
        cells = [_text(example.completion_text(), example.id)]
        for ranking in rankings:
            table = ranking_table(attribution, ranking.at([j]))
            found = table[table["score"] < 0 if ranking.opponents else table["score"] > 0]
            cells.append("".join(_entry(row) for row in found.to_dict("records")) or "none")
        rows.append("<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>")
    titles = "".join(f'<th style="{_CELL}">{t}</th>' for t in ("Answer", "Helped most by", "Hurt most by"))
    rest = len(attribution.test) - len(shown)
    more = f"<p style='opacity:.7'>and {rest:,} more test examples; .top(id) ranks any of them</p>" if rest > 0 else ""
    return (
        f'<div style="max-width:70em"><p><strong>Attribution</strong> · {escape(head)}<br>'
        '<span style="opacity:.7">A positive score helps the answer, a negative one hurts it; faint ones are '
        'not significant (5 %, per pair).</span></p><table style="border-collapse:collapse;width:100%">'
        f"<tr>{titles}</tr>{''.join(rows)}</table>"
        f"{more}</div>"
    )


def checkpoints(attribution: Measurements) -> str:
    """What earlier checkpoints add to the members' losses, and whether the estimator uses it; "" without them."""
    earlier = attribution.earlier
    if earlier is None:
        return ""
    rows = int((np.isfinite(earlier.train_loss_SKN).any(axis=2) & np.isfinite(earlier.test_loss_SKM).any(axis=2)).sum())
    if not attribution.choice.setting.checkpoints:
        return f"{rows} earlier checkpoints were scored and are not used"
    return f"{rows} earlier checkpoints add as many rows of losses"


def rows_html(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A small table of names and values, in the same style; all text is escaped."""
    cells = "".join(
        f'<tr><th style="{_CELL};white-space:nowrap">{escape(name)}</th><td style="{_CELL}">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return (
        f'<div style="max-width:70em"><p><strong>{escape(title)}</strong></p>'
        f'<table style="border-collapse:collapse">{cells}</table></div>'
    )


_CELL = "text-align:left;vertical-align:top;padding:.4em .8em .4em 0;border-bottom:1px solid rgba(128,128,128,.3)"


def _text(text: str, label: str, limit: int = 120) -> str:
    short = text if len(text) <= limit else text[:limit] + " …"
    return f"<code>{escape(label)}</code><br>{escape(short)}"


def _entry(row: Mapping[Any, Any]) -> str:
    style = "margin-bottom:.3em" + ("" if row["distinguishable"] else ";opacity:.5")
    text = _text(row["completion"], row["id"], 80)
    return f'<div style="{style}"><strong>{row["score"]:+.3g}</strong> {text}</div>'
