"""The questions of a run: the answers to explain, in the batches in which they were asked.

A batch is written once and never changes; what a table does not show is flagged. So questions can be added to a
finished run and taken out of its tables, and no score is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError
from .dataset import Dataset, Example
from .example import Verdict
from .kept import keep_dataset, kept_dataset

FILE_BATCH, ASKED_BATCH = "test", "ask"
"""Names of batches: of the config's test file (``test``, ``test-2``, ...) and of ``daunce ask`` (``ask-1``, ...)."""


@dataclass(frozen=True)
class Batch:
    """Questions that were asked together.

    ``absent``: ids that the config's test file no longer has. ``removed``: ids that ``daunce ask --remove`` took out.
    """

    name: str
    examples: Dataset
    absent: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @property
    def shown(self) -> tuple[Example, ...]:
        """What the tables show."""
        return tuple(e for e in self.examples if e.id not in self.absent | self.removed)

    @property
    def from_file(self) -> bool:
        return self.name == FILE_BATCH or self.name.startswith(f"{FILE_BATCH}-")


@dataclass(frozen=True)
class Questions:
    """All batches, oldest first.

    >>> from daunce_api import Dataset
    >>> first = Questions.of(Dataset.from_records([{"id": "a", "prompt": "x", "completion": "y"}]))
    >>> more = first.asked(Dataset.from_records([{"id": "b", "prompt": "z", "completion": "y"}]))
    >>> more.shown.ids, more.without(["a"]).shown.ids
    (['a', 'b'], ['b'])
    """

    batches: tuple[Batch, ...]
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """Which answers are wanted and which are not, by id, where somebody said so."""

    @classmethod
    def of(cls, examples: Dataset) -> Questions:
        """Those of a new run."""
        return cls((Batch(FILE_BATCH, examples),), examples.verdicts)

    @cached_property
    def shown(self) -> Dataset:
        """Everything that the tables show, in order. Raises DataError where all of it was removed."""
        shown = [e for batch in self.batches for e in batch.shown]
        first = self.batches[0].examples
        return first if shown == list(first) else Dataset(shown, name=first.name, warnings=first.warnings)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def from_file(self, examples: Dataset) -> Questions:
        """With the config's test file as it is now: new lines are a new batch, lines that are gone leave the tables. A
        line that ``daunce ask`` has asked before is shown once.

        Raises DataError where an id belongs to another question that was asked.
        """
        now = {e.id: e for e in examples}
        batches, known = [], set[str]()
        for batch in self.batches:
            if not batch.from_file:
                batches.append(batch)
                continue
            same = {e.id for e in batch.examples if now.get(e.id) == e}
            batches.append(replace(batch, absent=frozenset(batch.examples.ids) - same))
            known |= same
        asked = [e for batch in batches if not batch.from_file for e in batch.shown]
        _refuse_other_questions(asked, examples)
        known |= {e.id for e in asked}
        new = [e for e in examples if e.id not in known]
        return self._judged(examples, batches)._with(FILE_BATCH, new, examples.name)

    def asked(self, examples: Dataset) -> Questions:
        """With questions of ``daunce ask``. One that was asked before is shown again, and not asked twice.

        Raises DataError where an id belongs to another question.
        """
        _refuse_other_questions(self.shown, examples)
        batches, new = list(self.batches), []
        for example in examples:
            for number, batch in enumerate(batches):
                if example.id not in batch.absent and _same(example, batch.examples):
                    batches[number] = replace(batch, removed=batch.removed - {example.id})
                    break
            else:
                new.append(example)
        return self._judged(examples, batches)._with(ASKED_BATCH, new, examples.name)

    def _judged(self, examples: Dataset, batches: Sequence[Batch]) -> Questions:
        """With the verdicts of a file where nobody has said otherwise since."""
        return replace(self, batches=tuple(batches), verdicts={**examples.verdicts, **self.verdicts})

    def marked(self, ids: Sequence[str], verdict: Verdict | None) -> Questions:
        """With a verdict on some answers, or without one. Raises DataError for an id that is not shown."""
        for question in ids:
            self.shown.position(question)
        kept = {question: known for question, known in self.verdicts.items() if question not in ids}
        return replace(self, verdicts=kept if verdict is None else kept | dict.fromkeys(ids, verdict))

    def without(self, ids: Sequence[str]) -> Questions:
        """Without some questions in the tables; their scores are kept. Raises DataError for an id that is not shown."""
        for question in ids:
            self.shown.position(question)
        batches = [
            replace(batch, removed=batch.removed | {e.id for e in batch.shown if e.id in ids}) for batch in self.batches
        ]
        return replace(self, batches=tuple(batches))

    def _with(self, kind: str, examples: Sequence[Example], name: str) -> Questions:
        if not examples:
            return self
        number = 1 + sum(batch.name.startswith(kind) for batch in self.batches)
        return replace(self, batches=(*self.batches, Batch(f"{kind}-{number}", Dataset(examples, name=name))))

    # -- in the run folder ----------------------------------------------------------------------------------------

    def write(self, folder: Path, keep: Callable[[Path, Dataset], None] = keep_dataset) -> None:
        """Write the files of batches that the folder does not hold. Raises StoreError where that fails."""
        for batch in self.batches:
            keep(folder / f"{batch.name}.jsonl", batch.examples)

    def to_value(self) -> dict[str, Any]:
        """What the store keeps beside the files."""
        batches = [
            {"name": b.name, "digest": b.examples.digest, "absent": sorted(b.absent), "removed": sorted(b.removed)}
            for b in self.batches
        ]
        return {"batches": batches, "verdicts": dict(self.verdicts)}

    @classmethod
    def read(
        cls,
        folder: Path,
        value: Mapping[str, Any] | None,
        first_digest: str,
        *,
        instead: Dataset | None = None,
    ) -> Questions:
        """Read the batches of a run folder; without ``value`` there is one, of ``first_digest``. ``instead`` are the
        original questions: a damaged copy of the same content is not read.

        Raises StoreCorruptError where a file is not the one that was asked.
        """
        batches = []
        first: dict[str, Any] = {"name": FILE_BATCH, "digest": first_digest, "absent": [], "removed": []}
        for entry in [first] if value is None else value["batches"]:
            if instead is not None and instead.digest == entry["digest"]:
                examples = instead
            else:
                examples = kept_dataset(folder / f"{entry['name']}.jsonl", entry["digest"])
            batches.append(Batch(entry["name"], examples, frozenset(entry["absent"]), frozenset(entry["removed"])))
        return cls(tuple(batches), {} if value is None else value["verdicts"])


def _refuse_other_questions(shown: Iterable[Example], examples: Dataset) -> None:
    content = {e.id: e.content_hash for e in shown}
    clash = [e.id for e in examples if content.get(e.id, e.content_hash) != e.content_hash]
    if clash:
        raise DataError(
            f"the run has other questions of these ids: {', '.join(clash[:5])}. Nothing was sent. Give the new ones "
            "other ids, or take the old ones out with `daunce ask RUN --remove ID`."
        )


def _same(example: Example, examples: Dataset) -> bool:
    """Whether a question of this id and content is among the examples."""
    return example.id in examples.ids and examples[examples.position(example.id)].content_hash == example.content_hash
