"""The runs of a folder, and what the page shows of each: read from their stores, also while they are running."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..._util.text import command_line
from ...attribution import Attribution
from ...attribution.texts import conversation
from ...data.example import Verdict
from ...errors import ConfigurationError, DaunceError, NotEnoughMembersError
from ...fix import propose_for
from ...fix.folder import keep, kept_fixes, kept_outcome
from ...fix.proposal import finite
from ...run import Run
from ...store.run import FILE_NAME
from ..page import removal_of, report_html
from .compare import side_by_side

_DEPTH = 4
_MAX_RUNS = 500
_BRIEF = 400
_GROUPS = 100
"""Groups of a removal list that the page shows."""

T = TypeVar("T")


def find_runs(folder: Path) -> list[Path]:
    """Run folders in a folder, itself included, in order of their paths; runs inside of a run (evaluations) and links
    are left out."""
    return sorted(_walk(folder, _DEPTH))[:_MAX_RUNS]


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / FILE_NAME).is_file():
        yield folder
        return
    if depth == 0:
        return
    try:
        inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for path in inside:
        if not path.name.startswith("."):
            yield from _walk(path, depth - 1)


class Runs:
    """The runs of a folder by short ids. The methods may be called from several threads.

    Raises KeyError for an id that is not (or no longer) among the runs, and what opening a run raises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._kept: dict[tuple[str, str], tuple[tuple[float, ...], Any]] = {}
        self._paths: dict[str, Path] = {}

    def scan(self) -> dict[str, Path]:
        """Ids and paths of the runs that are there now."""
        self._paths = {hashlib.sha256(os.fsencode(path)).hexdigest()[:12]: path for path in find_runs(self.folder)}
        return self._paths

    def listed(self) -> list[dict[str, Any]]:
        """One row a run: name, folder, state, members, money, time, quality, or why it cannot be read."""
        return [self.state(identity) for identity in self.scan()]

    def state(self, identity: str) -> dict[str, Any]:
        """The row of one run."""
        return self._of(identity, "state", lambda: self._state(identity))

    def _state(self, identity: str) -> dict[str, Any]:
        path = self._path(identity)
        row: dict[str, Any] = {"id": identity, "folder": str(path.relative_to(self.folder)) or "."}
        try:
            status = self._run(identity).status()
            fixed = (kept_outcome(*kept_fixes(path)) or {}).get("verdict", "")
        except (DaunceError, OSError) as error:
            return row | {"name": path.name, "problem": str(error)}
        shown = {"title": status.title, "rows": status.rows(), "fixed": fixed}
        return row | status.to_json() | shown

    def questions(self, identity: str) -> list[dict[str, Any]]:
        """The answers to explain, with their verdicts."""
        run = self._run(identity)
        verdicts = run.questions.verdicts
        try:
            group = {i: n for n, found in enumerate(self.attributions(identity), start=1) for i in found.test.ids}
        except NotEnoughMembersError:
            group = {}
        return [
            {
                "id": example.id,
                "question": parts.question[:_BRIEF],
                "answer": parts.answer[:_BRIEF],
                "verdict": verdicts.get(example.id),
                "group": group.get(example.id),
            }
            for example in run.test
            for parts in [conversation(example)]
        ]

    def mark(self, identity: str, question: str, verdict: Verdict | None) -> dict[str, Any]:
        """Say that an answer is wanted or not, or take that back; see :meth:`daunce_api.Run.mark`."""
        Run.open(self._path(identity)).mark([question], verdict)
        return {"id": question, "verdict": verdict}

    def price(self, identity: str, turns: list[dict[str, str]], answer: str) -> dict[str, Any]:
        """What a further question costs, in words and dollars. Nothing is sent."""
        run = Run.open(self._path(identity))
        plan = run.asking(run.question(turns, answer))
        plan.check()
        return {"text": plan.text(), "usd": plan.usd, "costs": plan.costs_money}

    def ask(self, identity: str, turns: list[dict[str, str]], answer: str, usd: float | None) -> dict[str, Any]:
        """Ask a further question for at most ``usd`` (None = an unknown price was accepted); see
        :meth:`daunce_api.Run.ask`. Raises ConfigurationError where it costs more than that by now."""
        run = Run.open(self._path(identity))
        question = run.question(turns, answer)
        plan = run.asking(question)
        if usd is not None and (plan.usd is None or plan.usd > usd):
            raise ConfigurationError(f"The price has changed, and nothing was sent. {plan.text()}")
        run.ask(question)
        asked = question.ids[0]
        groups = [n for n, found in enumerate(self.attributions(identity), start=1) if asked in found.test.ids]
        return {"id": asked, "group": groups[0] if groups else None}

    def fix(self, identity: str) -> dict[str, Any]:
        """What to take out of a run with marked answers, as `daunce fix` finds and keeps it."""
        run = Run.open(self._path(identity))
        proposal = propose_for(run)
        train, folder = proposal.attribution.train, keep(run, proposal)
        groups = []
        for group in proposal.removed[:_GROUPS]:
            example = train[group.positions[0]]
            parts = conversation(example)
            groups.append(
                {
                    "id": example.id,
                    "examples": len(group.positions),
                    "question": parts.question[:_BRIEF],
                    "answer": parts.answer[:_BRIEF],
                    "effect": group.effect,
                    "z": finite(group.z),
                }
            )
        return {
            "reason": proposal.reason,
            "folder": None if folder is None else str(folder),
            "count": len(proposal.positions),
            "of": len(train),
            "groups": groups,
            "command": command_line("fix", str(run.run_dir), "--retrain"),
        }

    def report(self, identity: str, group: int = 1) -> str:
        """The report's page, for the first or another group of answers that the same members have scored.

        Raises NotEnoughMembersError while fewer than two members are scored.
        """
        return self._of(identity, f"report-{group}", lambda: self._report(identity, group))

    def _report(self, identity: str, group: int) -> str:
        run, groups = self._run(identity), self.attributions(identity)
        if not 1 <= group <= len(groups):
            raise KeyError(group)
        shown = groups[group - 1]
        addresses = [identity, *(f"{identity}-{n}" for n in range(2, len(groups) + 1))]
        others = [(address, other) for address, other in zip(addresses, groups, strict=True) if other is not shown]
        return report_html(shown, run.status(), run.warnings, others=others, **removal_of(run, shown))

    def attributions(self, identity: str) -> tuple[Attribution, ...]:
        """See :meth:`daunce_api.Run.attributions`."""
        return self._of(identity, "attributions", lambda: self._run(identity).attributions())

    def compared(self, one: str, other: str, test: str | None) -> dict[str, Any]:
        """Two runs side by side; see :func:`~.compare.side_by_side`."""
        sides = []
        for identity in (one, other):
            try:
                sides.append(self.attributions(identity)[0])
            except NotEnoughMembersError as error:
                return {"problem": f"{self._path(identity).name}: {error}"}
        return side_by_side(sides[0], sides[1], test)

    def _run(self, identity: str) -> Run:
        return self._of(identity, "run", lambda: Run.open(self._path(identity)))

    def _path(self, identity: str) -> Path:
        if identity not in self._paths:
            self.scan()
        return self._paths[identity]

    def _of(self, identity: str, name: str, make: Callable[[], T]) -> T:
        """A value that is made once for each state of the run's store."""
        stamp = _stamp(self._path(identity))
        kept = self._kept.get((identity, name))
        if kept is None or kept[0] != stamp:
            kept = self._kept[identity, name] = stamp, make()
        value: T = kept[1]
        return value


def _stamp(path: Path) -> tuple[float, ...]:
    """Changes whenever the store does."""
    stamp: list[float] = []
    for name in (FILE_NAME, FILE_NAME + "-wal"):
        try:
            found = (path / name).stat()
            stamp += [found.st_mtime_ns, found.st_size]
        except OSError:
            stamp += [0, 0]
    # A proposal is kept beside the store.
    stamp += sorted(found.stat().st_mtime_ns for found in path.glob("fix/*/fix.json"))
    return tuple(stamp)
