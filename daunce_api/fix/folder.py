"""``RUN/fix/N``: a proposal as files; the report and `daunce view` read ``fix.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._util.files import write
from ..data.dataset import Dataset
from ..errors import DataError, StoreError
from ..run import Run
from .cleaned import write_cleaned
from .proposal import Proposal
from .retraining import Outcome

FOLDER, FIX_FILE, REMOVED_FILE = "fix", "fix.json", "removed.jsonl"


def keep(run: Run, proposal: Proposal) -> Path | None:
    """Write a proposal and return its folder; one that was kept before is found again. None with nothing to remove.

    ``removed.jsonl`` holds each removed example with the reason. ``train.cleaned.*`` is the original file without them,
    in its format; where the original has changed since, holds several examples in one record, or reads otherwise than
    the examples that stay, the run's own copy (JSONL) takes its place. Raises StoreError where the folder cannot be
    written.
    """
    if not proposal.removed:
        return None
    content = _content(proposal)
    folder = next((f for f in kept_fixes(run.run_dir) if _same(f, content)), None)
    if folder is None:
        folder = run.run_dir / FOLDER / str(1 + max((int(f.name) for f in kept_fixes(run.run_dir)), default=0))
    content["cleaned"] = _cleaned(run, proposal, folder).name
    write(folder / REMOVED_FILE, "".join(_lines(proposal)))
    _write(folder, {**_read(folder), **content})
    return folder


def keep_outcome(folder: Path, outcome: Outcome) -> None:
    """Add what the retrained models say. Raises StoreError where it cannot be written."""
    _write(folder, {**_read(folder), "outcome": outcome.to_json()})


def kept_outcome(*folders: Path) -> dict[str, Any] | None:
    """What :func:`keep_outcome` has kept last in proposals' folders, as plain data. Raises StoreError."""
    return next((found for folder in reversed(folders) if (found := _read(folder).get("outcome"))), None)


def kept_fixes(run_dir: Path) -> list[Path]:
    """Folders of the proposals of a run, oldest first."""
    found = (run_dir / FOLDER).glob(f"*/{FIX_FILE}")
    return sorted((f.parent for f in found if f.parent.name.isdecimal()), key=lambda f: int(f.name))


def _content(proposal: Proposal) -> dict[str, Any]:
    train = proposal.attribution.train
    return {
        "unwanted": list(proposal.unwanted),
        "wanted": list(proposal.wanted),
        "reason": proposal.reason,
        "members": len(proposal.attribution.members),
        "removed": [
            {"ids": [train[i].id for i in g.positions], "effect": g.effect, "stderr": g.stderr, "q": g.q}
            for g in proposal.removed
        ],
        "changes": [change.to_json() for change in proposal.changes],
    }


def _same(folder: Path, content: dict[str, Any]) -> bool:
    kept = _read(folder)
    return all(kept.get(name) == content[name] for name in ("unwanted", "wanted", "removed"))


def _cleaned(run: Run, proposal: Proposal, folder: Path) -> Path:
    removed, original, columns = set(proposal.positions), run.config.data.train, run.config.data.columns
    try:
        if Dataset.from_file(original, columns).digest == run.train.digest:
            path = write_cleaned(original, run.train, removed, folder)
            kept = [content for i, content in enumerate(run.train.content_hashes) if i not in removed]
            if not kept or list(Dataset.from_file(path, columns).content_hashes) == kept:
                return path
            path.unlink()  # a form that cannot be cut by lines, such as CSV whose lines end in a carriage return
    except DataError:
        pass  # it is gone, has changed, or holds several examples in one record
    return write_cleaned(run.run_dir / "data" / "train.jsonl", run.train, removed, folder)


def _lines(proposal: Proposal) -> Iterator[str]:
    """Removed examples in the training set's order, with the reason."""
    train = proposal.attribution.train
    group_of = {i: group for group in proposal.removed for i in group.positions}
    for position in proposal.positions:
        group = group_of[position]
        reason: dict[str, Any] = {"effect": group.effect, "stderr": group.stderr, "q": group.q}
        reason["line"] = train[position].line
        twins = [train[i].id for i in group.positions if i != position]
        if twins:
            reason["near_duplicates"] = twins
        yield json.dumps({**train[position].to_record(), "removed_because": reason}, ensure_ascii=False) + "\n"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FIX_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Delete its folder and run daunce fix again.") from error


def _write(folder: Path, content: dict[str, Any]) -> None:
    write(folder / FIX_FILE, json.dumps(content, ensure_ascii=False, indent=1))
