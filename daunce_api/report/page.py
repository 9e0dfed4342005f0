"""``write_report``: everything about a run in one HTML file.

The file opens from disk, asks the network for nothing and runs no script but its own: its content-security policy lists
the hashes of what it carries. Texts reach the page only as text nodes, never as markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from .._util.files import write
from ..attribution import Attribution
from ..attribution.texts import Conversation, conversation
from ..data.dataset import Dataset
from ..fix import Proposal, marked, propose
from ..fix.folder import kept_fixes, kept_outcome
from ..run import Run
from ..status import RunStatus
from .glance import first_notes, glance, more_notes, state_of, unit
from .overview import TrainView, loss_picture, quality_curve, train_view
from .pack import Arrays, fitting_block, policy
from .ranked import Listings, listings
from .sources import SourceScores, source_scores
from .tokens import add_tokens, token_view

MAX_TESTS = 500
MAX_TRAIN = 20_000
MAX_PAGE = 9_800_000
"""Characters of the page, as far as cutting long texts can keep it below that."""
_LEAST_TEXT = 1_000_000
_PARTNERS = 3
_NOTES = 8
_SCRIPTS = ("base.js", "list.js", "tokens.js", "share.js", "answers.js", "training.js", "plots.js", "main.js")
_STATE = re.compile(r'<meta name="daunce-state" content="([^"]*)">')
_HEAD = 20_000


REPORT_NAME = "report.html"
"""Inside the run folder."""


def write_report(
    attribution: Attribution,
    path: Path,
    *,
    run: RunStatus | None = None,
    warnings: Sequence[str] = (),
    proposal: Proposal | None = None,
    outcome: Mapping[str, Any] | None = None,
    others: Sequence[tuple[str, Attribution]] = (),
) -> Path:
    """Write the report of an attribution.

    Args:
        attribution: what is shown.
        path: of the HTML file; an existing one is replaced atomically, and the new one says so where their scores are
            not comparable.
        run: state of the run; without it the provider and model in ``attribution.facts`` are shown.
        warnings: what was noticed in the data, one sentence each.
        proposal: what to remove, where answers are marked as unwanted.
        outcome: what retraining without those examples did, as :meth:`daunce_api.fix.retraining.Outcome.to_json` has
            it; shown with a proposal.
        others: pages of other answers of the run, which other members have scored: addresses and attributions.

    Returns:
        the path.

    Raises:
        NotEnoughMembersError: fewer than two members are scored.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    state = _state_in(path)
    page = report_html(attribution, run, warnings, proposal=proposal, outcome=outcome, others=others, previous=state)
    write(path, page)
    return path


def write_report_of(run: Run, attribution: Attribution, output: Path | None = None) -> Path:
    """Write the HTML report of a run and return its path (default: ``report.html`` in the run folder).

    Answers that fewer members have scored form groups of their own, with other scales: each of these groups has its own
    page beside (``report-2.html``, ...), and the pages link to each other. ``attribution``: of the group on the first
    page. Raises StoreError where a page cannot be written.
    """
    path = output or run.run_dir / REPORT_NAME
    status = run.status()
    rest = [group for group in run.attributions() if group.test.ids != attribution.test.ids]
    groups = [attribution, *rest]
    paths = [path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, len(groups) + 1)]
    for group, page in zip(groups, paths, strict=True):
        others = [(p.name, other) for p, other in zip(paths, groups, strict=True) if other is not group]
        write_report(group, page, run=status, warnings=run.warnings, others=others, **removal_of(run, group))
    return path


def removal_of(run: Run, attribution: Attribution) -> dict[str, Any]:
    """``proposal`` and ``outcome`` of :func:`write_report` for a group of a run's answers; neither where none of them
    is marked as unwanted."""
    unwanted, wanted = marked(run, attribution)
    if not unwanted:
        return {}
    return {"proposal": propose(attribution, unwanted, wanted), "outcome": kept_outcome(*kept_fixes(run.run_dir))}


def report_html(
    attribution: Attribution,
    run: RunStatus | None = None,
    warnings: Sequence[str] = (),
    *,
    proposal: Proposal | None = None,
    outcome: Mapping[str, Any] | None = None,
    others: Sequence[tuple[str, Attribution]] = (),
    previous: str = "",
) -> str:
    """The report as a string; see :func:`write_report`. ``previous``: state of an earlier report, to compare with."""
    columns = list(range(min(len(attribution.test), MAX_TESTS)))
    ranked, train, sources = (
        listings(attribution, columns),
        train_view(attribution),
        source_scores(attribution, columns),
    )
    content, arrays = _content(attribution, run, columns, ranked, train, sources, proposal)
    texts = [content[side][name] for side in ("train", "test") for name in ("prompt", "answer")]
    texts.append(content["systems"])
    if content["tokens"] is not None:
        texts.append(content["tokens"]["instead"])
    style = _static("report.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_static(name) for name in _SCRIPTS) + "\n})();"
    numbers = arrays.block()
    rest = len(numbers) + len(script) + len(style)
    block, cut = fitting_block(content, texts, max(MAX_PAGE - rest, _LEAST_TEXT))
    return _template().render(
        title="attribution" if run is None else run.title,
        attribution=attribution,
        tiles=glance(attribution, run, train.significant, ranked.overlap),
        state=state_of(attribution),
        removal="" if proposal is None else _removal_text(proposal),
        outcome=outcome,
        retrained=[] if proposal is None or outcome is None else _retrained(attribution, outcome),
        others=others,
        unit=unit(attribution),
        heat_note=sources.note,
        most_notes=_NOTES,
        first_notes=first_notes(attribution, run, previous),
        more_notes=more_notes(
            attribution, warnings, shown_tests=len(columns), cut=cut, shown_train=len(content["train"]["id"])
        ),
        policy=policy([script], [style]),
        style=style,
        script=script,
        data=block,
        numbers=numbers,
        provider=str(attribution.facts.get("provider", "")) if run is None else run.provider,
        model=str(attribution.facts.get("model", "")) if run is None else run.model,
    )


def _removal_text(proposal: Proposal) -> str:
    """How the training examples are ranked for removal, and what is proposed."""
    against = f" against {len(proposal.wanted)} wanted" if proposal.wanted else ""
    proposed = (
        f"Proposed for removal: {len(proposal.positions)} ({proposal.reason}); daunce fix writes the cleaned file."
        if proposal.removed
        else f"Nothing is proposed for removal: {proposal.reason}"
    )
    return (
        f"By how much each example pushes the {len(proposal.unwanted)} unwanted{against} answers, in standard errors; "
        f"near-duplicates count together. {proposed}"
    )


def _content(
    attribution: Attribution,
    run: RunStatus | None,
    columns: list[int],
    ranked: Listings,
    view: TrainView,
    heat: SourceScores,
    proposal: Proposal | None,
) -> tuple[dict[str, Any], Arrays]:
    tokens = token_view(attribution, columns, ranked.proponents.index_Mk, ranked.opponents.index_Mk)
    first_N = view.self_influence_N if proposal is None else proposal.z_N
    shown = _shown_train(attribution, ranked, first_N)
    position = np.full(len(attribution.train) + 1, -1)  # the last entry answers for index -1
    position[shown] = np.arange(shown.size)
    systems: dict[str, int] = {}
    train = _examples(attribution.train, shown, attribution.labels("train"), systems)
    test = _examples(attribution.test, columns, attribution.labels("test"), systems)
    names = {name for name in (*heat.rows, *heat.columns) if isinstance(name, str)}
    sources = sorted(names.union(train["source"], test["source"]))
    number: dict[Any, int | None] = {None: None} | {name: n for n, name in enumerate(sources)}
    for side in (train, test):
        side["source"] = [number[name] for name in side["source"]]
    arrays = Arrays()
    for name, listing in (("pro", ranked.proponents), ("opp", ranked.opponents)):
        arrays.add(f"{name}_index", position[listing.index_Mk], "i")
        for what, numbers in (("score", listing.score_Mk), ("low", listing.low_Mk), ("high", listing.high_Mk)):
            arrays.add(f"{name}_{what}", numbers, "f")
        arrays.add(f"{name}_clear", listing.clear_Mk, "b")
        arrays.add(f"{name}_bm25", listing.bm25_rank_Mk, "i")
        if listing.prior_Mk is not None:
            arrays.add(f"{name}_prior", listing.prior_Mk, "f")
    arrays.add("mean_score", view.mean_score_N[shown], "f")
    arrays.add("self_influence", view.self_influence_N[shown], "f")
    if proposal is not None:
        arrays.add("effect", first_N[shown], "f")
        arrays.add("proposed", np.isin(shown, proposal.positions), "b")
    arrays.add("included", view.included_N[shown], "i")
    partners = {"helps": _partners(attribution, opponents=False), "hurts": _partners(attribution, opponents=True)}
    found = np.unique(np.concatenate([index[shown] for index, _ in partners.values()]))
    elsewhere = found[found >= len(columns)]  # answers that the page has no room for: their ids alone
    place = np.concatenate([np.arange(len(attribution.test)), [-1]])
    place[elsewhere] = len(columns) + np.arange(elsewhere.size)
    for name, (index, score) in partners.items():
        arrays.add(f"{name}_index", place[index[shown]], "i")
        arrays.add(f"{name}_score", score[shown], "f")
    test_loss = np.ma.masked_invalid(attribution.test_loss_KM[:, columns])
    arrays.add("test_loss", test_loss.mean(axis=0).filled(np.nan), "f")
    arrays.add("test_spread", test_loss.std(axis=0).filled(np.nan), "f")
    picture, limit, widths = loss_picture(attribution)
    arrays.add("picture", picture, "b")
    content = {
        "train": train,
        "test": test,
        "elsewhere": [attribution.test[int(j)].id for j in elsewhere],
        "sources": sources,
        "systems": list(systems),
        "tokens": None if tokens is None else add_tokens(arrays, tokens, columns, shown.tolist()),
        "curve": quality_curve(attribution),
        "expected": _expected(attribution),
        "members_asked": None if run is None else run.members_asked,
        "stopped": run is not None and bool(run.stopped),
        "picture": {"limit": limit, "widths": widths, "members": len(attribution.members)},
        "heat": {
            # Numbers of sources, or positions of answers; null for all others together.
            "row_source": [number[name] for name in heat.rows],
            "column_source": [] if heat.of_answers else [number[name] for name in heat.columns],
            "column_answer": heat.columns if heat.of_answers else [],
            "total": _plain(heat.total_ST),
            "stderr": _plain(heat.stderr_ST),
            "rows_count": heat.rows_count,
            "columns_count": heat.columns_count,
            "threshold": heat.threshold,
        },
        "arrays": arrays.directory,
    }
    return content, arrays


def _shown_train(attribution: Attribution, ranked: Listings, first_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positions of the training examples in the page: all, or those that are listed, and those that come first for
    removal or by self-influence."""
    count = len(attribution.train)
    if count <= MAX_TRAIN:
        return np.arange(count)
    listed = np.unique(np.concatenate([x.index_Mk.ravel() for x in (ranked.proponents, ranked.opponents)]))
    worst = np.argsort(-np.nan_to_num(first_N, nan=-np.inf), kind="stable")[:MAX_TRAIN]
    return np.union1d(listed[listed >= 0], worst)


def _expected(attribution: Attribution) -> list[list[float]]:
    """[members, self_lds, low, high] from the present members to twice as many; empty where it cannot be foreseen."""
    members, quality = len(attribution.members), attribution.self_lds
    if quality is None or quality.curve is None:
        return []
    counts = [int(n) for n in np.linspace(members, 2 * members, 9).round()]
    return [[n, float(quality.expected(n)), *quality.interval(n)] for n in counts]


def _partners(attribution: Attribution, *, opponents: bool) -> tuple[Any, Any]:
    """The test examples, of all, that each training example helps (or hurts) most; -1 where the sign is the other
    one."""
    ranking = attribution.ranking(_PARTNERS, opponents=opponents, stderr=False, per="train")
    score = np.nan_to_num(ranking.score_Mk)
    right = (ranking.index_Mk >= 0) & ((score < 0) if opponents else (score > 0))
    return np.where(right, ranking.index_Mk, -1), np.where(right, score, 0)


def _examples(dataset: Dataset, picks: Any, labels: list[str], systems: dict[str, int]) -> dict[str, list[Any]]:
    """Texts of some examples; system prompts are numbered in ``systems``, -1 = none."""
    parts = [conversation(dataset[int(i)]) for i in picks]
    return {
        "id": [dataset[int(i)].id for i in picks],
        "source": [labels[int(i)] for i in picks],
        "system": [systems.setdefault(part.system, len(systems)) if part.system else -1 for part in parts],
        "prompt": [part.question for part in parts],
        "answer": [part.answer for part in parts],
    }


def _retrained(attribution: Attribution, outcome: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Conversation]]:
    """The answers of this page before and after a retraining, with their texts."""
    known, test = set(attribution.test.ids), attribution.test
    found = [answer for answer in outcome["answers"] if answer["id"] in known]
    return [(answer, conversation(test[test.position(answer["id"])])) for answer in found]


def _state_in(path: Path) -> str:
    """The state that an earlier report says it was made of; "" without one."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = _STATE.search(file.read(_HEAD))
    except OSError:
        return ""
    return unescape(found[1]) if found else ""


def _plain(matrix: Any) -> list[list[float | None]]:
    return [[float(f"{v:.6g}") if np.isfinite(v) else None for v in row] for row in matrix]


@cache
def _static(name: str) -> str:
    return (files("daunce_api.report") / "static" / name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_static("report.html.j2"))
