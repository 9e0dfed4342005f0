"""Markdown table and plot from the cells that are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.field.cells import Method, cell_path, read_cell

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS-peers.md"
PLOT = ROOT / "examples" / "guide" / "docs" / "peers.svg"
TITLES = {
    "digits": "Digits, fine-tuned MLP (1,000 examples)",
    "fashion": "Fashion-MNIST, MLP from scratch (5,000 examples)",
    "resnet": "Fashion-MNIST, ResNet-9 from scratch (2,000 examples)",
    "lm": "Language model, LoRA fine-tune (160 definitions from several sources)",
}
OURS = ("black box", "white box")
HEADER = (
    "| method | needs | LDS, default [95 %] | LDS, best of a grid (optimistic) | seconds | peak MiB |\n"
    + "|---" * 6
    + "|"
)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the highest LDS."""
    judged = [row for row in rows if "lds" in row]
    return max(judged, key=lambda row: float(row["lds"])) if judged else None


def seconds(row: dict[str, Any]) -> float:
    """CPU seconds of one thread, training of members or further models included."""
    return float(row["cpu_seconds"]) + float(row["trained_seconds"])


def line(method: Method, content: dict[str, Any] | None, refusal: str) -> str:
    """One row of the table."""
    start = f"| {method.name} | {method.needs} | "
    if refusal:
        return start + f"cannot: {refusal} | - | - | - |"
    if content is None:
        return start + "not run | - | - | - |"
    first, top = content["rows"][0], best(content["rows"])
    if "lds" in first:
        shown = f"{first['lds']:.3f} [{first['low']:.3f}, {first['high']:.3f}]"
        if first["not_finite"]:
            shown += f" ({first['not_finite']:.0%} not finite)"
    else:
        shown = f"fails: {first['error'][:60]}"
    tuned = "-"
    if top is not None and len(content["rows"]) > 1:
        changed = {k: v for k, v in top["setting"].items() if v != first["setting"].get(k)}
        tuned = f"{top['lds']:.3f}" + (f" ({', '.join(f'{k} {v}' for k, v in changed.items())})" if changed else "")
    timed = first if "lds" in first else top
    if timed is None:
        return start + f"{shown} | - | - | - |"
    return start + f"{shown} | {tuned} | {_short(seconds(timed))} | {timed['peak_mib']:.0f} |"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def rows_of(
    task: str, methods: Iterable[Method], root: Path | None = None
) -> list[tuple[Method, dict[str, Any] | None]]:
    """Methods with their cells, best default first; those without a result last. A name has one row: a second method
    of the name stands where the first does not apply."""
    chosen: dict[str, Method] = {}
    for method in methods:
        if method.name not in chosen or chosen[method.name].refuses(task):
            chosen[method.name] = method
    pairs = [
        (m, None if m.refuses(task) else read_cell(task, m.key, root))
        for m in chosen.values()
        if not m.name.startswith("members from")
    ]
    return sorted(pairs, key=lambda pair: -_value(pair[1]))


def _value(content: dict[str, Any] | None) -> float:
    return float(content["rows"][0].get("lds", -2.0)) if content else -3.0


def by_members(name: str) -> bool:
    """Whether a row belongs into the table of members: all of ours below the largest ensemble."""
    return name.startswith("black box") and not name.endswith(", K = 100")


def markdown(task: str, methods: Sequence[Method], root: Path | None = None) -> str:
    """One task's table, our rows in bold; below it what does not apply or was not run on this task."""
    pairs = [(m, content) for m, content in rows_of(task, methods, root) if not by_members(m.name)]
    lines, refused, missing = [HEADER], [], []
    for method, content in pairs:
        refusal = method.refuses(task)
        if refusal:
            refused.append(f"{method.name} ({refusal})")
        elif content is None:
            missing.append(method.name)
        else:
            text = line(method, content, refusal)
            if method.name.startswith(OURS):
                text = text.replace(f"| {method.name} |", f"| **{method.name}** |", 1)
            lines.append(text)
    if refused:
        lines.append("\nDoes not apply: " + "; ".join(refused) + ".")
    if missing:
        lines.append("\nNot run: " + "; ".join(missing) + ".")
    return "\n".join(lines)


def members_table(tasks: Sequence[str], methods: Sequence[Method], root: Path | None = None) -> str:
    """LDS of black-box members by their number: a row for each task, start and estimator."""
    counts = (10, 25, 50, 100)
    lines = ["| black box, LDS | " + " | ".join(f"K = {k}" for k in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for task in tasks:
        cells = {m.name: content for m, content in rows_of(task, methods, root) if m.name.startswith("black box")}
        for kind in dict.fromkeys(name.rpartition(", K = ")[0] for name in sorted(cells)):
            found = [cells.get(f"{kind}, K = {k}") for k in counts]
            if any(found):
                shown = [_default(content) if content else "-" for content in found]
                lines.append(f"| {task}, {kind.removeprefix('black box, ')} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _default(content: dict[str, Any]) -> str:
    first = content["rows"][0]
    return f"{first['lds']:.3f}" if "lds" in first else "fails"


def anywhere(tasks: Sequence[str], methods: Sequence[Method], root: Path | None = None) -> list[Method]:
    """Methods with a cell on at least one task."""
    return [m for m in methods if any(read_cell(task, m.key, root) is not None for task in tasks)]


def verdicts(tasks: Sequence[str], methods: Sequence[Method], root: Path | None = None) -> list[str]:
    """What became of the goals, from the default settings in the cells."""

    def value(task: str, *words: str) -> float | None:
        found = [
            _value(content)
            for method, content in rows_of(task, methods, root)
            if content is not None and all(word in method.name for word in words)
        ]
        return max((v for v in found if v > -2), default=None)

    out = []
    for ending in ("auto, K = 100", "auto + checkpoints, K = 100"):
        for other in ("TRAK-10", "gradient cosine", "EK-FAC"):
            parts = []
            for task in tasks:
                ours, theirs = value(task, "black box", ending), value(task, other)
                if ours is None or theirs is None:
                    parts.append(f"{task} not measured")
                else:
                    parts.append(f"{task} {ours:.3f} against {theirs:.3f} ({'above' if ours > theirs else 'below'})")
            out.append(f"* black box, {ending} (better start) against the best default of {other}: " + "; ".join(parts))
    parts = []
    for task in tasks:
        white = value(task, "white box")
        above = [
            m.name
            for m, content in rows_of(task, methods, root)
            if white is not None and not m.name.startswith("white box") and _value(content) > white
        ]
        if white is None:
            parts.append(f"{task} fails" if value(task, "random") is not None else f"{task} not measured")
        else:
            parts.append(f"{task} {white:.3f}, place {len(above) + 1}" + (f" (first: {above[0]})" if above else ""))
    out.append("* best white box, auto, by default settings: " + "; ".join(parts))
    return [text + "." for text in out]


SHORT = (
    "black box, from base, auto, K = 100",
    "black box, from base, auto + prior, K = 10",
    "black box, from base, auto + prior, K = 25",
    "black box, from base, auto + prior, K = 100",
    "black box, from base, auto + checkpoints, K = 100",
    "black box, from target, auto, K = 100",
    "black box, from target, auto + prior, K = 10",
    "black box, from target, auto + prior, K = 25",
    "black box, from target, auto + prior, K = 100",
    "black box, from target, auto + checkpoints, K = 100",
    "white box, influence, auto, K = 100",
    "white box, fisher, auto, K = 100",
    "TRAK-10 (traker)",
    "TRAK-1 (traker)",
    "dattri TRAK-10",
    "EK-FAC (kronfluence)",
    "EK-FAC (kronfluence), damping None",
    "dattri IF-CG",
    "dattri LoGra",
    "dattri TracIn",
    "bergson",
    "gradient dot",
    "gradient cosine",
    "BM25",
    "embeddings, all-MiniLM-L6-v2",
    "random",
)


def summary(tasks: Sequence[str], methods: Sequence[Method], root: Path | None = None) -> str:
    """The README's table: default LDS and, in brackets, the best of a grid; a task a column."""
    cells = {(task, m.name): content for task in tasks for m, content in rows_of(task, methods, root)}
    refusals = {(task, m.name) for task in tasks for m, _ in rows_of(task, methods, root) if m.refuses(task)}
    known = {name for _, name in cells}
    lines = ["| LDS, default (best of a grid) | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name in SHORT:
        if name not in known:
            continue
        shown = []
        for task in tasks:
            content = cells.get((task, name))
            if content is None:
                shown.append("cannot" if (task, name) in refusals else "not run")
                continue
            top = best(content["rows"])
            default = _default(content)
            more = f" ({top['lds']:.3f})" if top is not None and len(content["rows"]) > 1 else ""
            shown.append(default + more)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(tasks: Sequence[str], methods: Sequence[Method], path: Path) -> None:
    """LDS at default settings against seconds, one panel a task, legible on light and dark pages."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "peers", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    grey = "#808080"
    figure, panels = plt.subplots(2, 2, figsize=(11, 8.6))
    ours = sorted({m.name.rpartition(", K = ")[0] for m in methods if m.name.startswith(OURS)})
    colours = dict(zip(ours, plt.get_cmap("tab10").colors, strict=False))
    handles = {}
    for panel, task in zip(panels.flat, tasks, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        others: list[tuple[float, float, str]] = []
        for method, content in rows_of(task, methods):
            if content is None or "lds" not in content["rows"][0] or method.name == "random":
                continue
            row = content["rows"][0]
            point = max(seconds(row), 1e-3), float(row["lds"])
            if method.name.startswith(OURS):
                lines.setdefault(method.name.rpartition(", K = ")[0], []).append(point)
            else:
                others.append((*point, method.name))
        for name, points in sorted(lines.items()):
            (handles[name],) = panel.plot(
                *zip(*sorted(points), strict=True), "o-", markersize=3, linewidth=1, color=colours[name], label=name
            )
        panel.set_xscale("log")
        drawn = [x for points in lines.values() for x, _ in points] + [x for x, _, _ in others]
        middle = (min(drawn) * max(drawn)) ** 0.5
        for x, y, name in others:
            left = x > middle
            panel.plot(x, y, "x", color="#c46210", markersize=5)
            panel.annotate(
                name,
                (x, y),
                color=grey,
                fontsize=6,
                xytext=(-4 if left else 4, -6 if "dattri" in name else 3),
                textcoords="offset points",
                ha="right" if left else "left",
            )
        panel.set_title(TITLES[task], color=grey, fontsize=9)
        panel.set_xlabel("CPU seconds of one thread, training of members included", color=grey, fontsize=7)
        panel.set_ylabel("LDS, default settings", color=grey, fontsize=7)
        panel.tick_params(colors=grey, labelsize=7)
        panel.patch.set_alpha(0)
        for spine in panel.spines.values():
            spine.set_color(grey)
    figure.legend(
        [handles[name] for name in sorted(handles)],
        sorted(handles),
        loc="lower center",
        ncols=4,
        fontsize=7,
        frameon=False,
        labelcolor=grey,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="svg", transparent=True, metadata={"Date": None})
    part.replace(path)


def write_all(tasks: Sequence[str]) -> None:
    """RESULTS-peers.md (what follows its marker) and the plot.

    Raises SystemExit, and leaves both files alone, where a task has no cell: nothing stands behind an empty table.
    """
    from tests.benchmarks.peers import methods

    listed = methods()
    for task in tasks:
        if not anywhere([task], listed):
            raise SystemExit(
                f"No cell of {task} is in {cell_path(task, '').parent}, so nothing was written. `python -m "
                "tests.benchmarks.peers run` makes them; DAUNCE_BENCHMARK_CACHE names another cache."
            )
    found = anywhere(tasks, listed)
    text = RESULTS.read_text() if RESULTS.exists() else "# Side by side with the field\n\n<!-- tables -->\n"
    head = text.partition("<!-- tables -->")[0] + "<!-- tables -->\n"
    parts = ["\n## In short\n", summary(tasks, found), "\n## Goals\n", *verdicts(tasks, found)]
    for task in tasks:
        parts += [f"\n## {TITLES[task]}\n", markdown(task, found)]
    parts += ["\n## By the number of members\n", members_table(tasks, found)]
    plot(tasks, found, PLOT)  # first: what can fail leaves the text as it was
    RESULTS.write_text(head + "\n".join(parts) + "\n")
