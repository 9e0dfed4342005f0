"""``store.scores``: measured log-probabilities in blobs, and loss matrices of the models that are complete.

Examples have integer ids. A blob holds what one transaction brought of one model, end to end, under one checksum. A
group (the run's examples, a later batch of questions) is the columns of a matrix; a model that is measured on a whole
group has its row there, with bounds and measured values apart.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ..data.encoded import EncodedExample
from ..data.kept import keys_of
from ..errors import RunChangedError, StoreError
from ..providers.base import TokenScores
from .database import Database
from .part import Part
from .rows import Ids, LossRow, ScoreBatch, TokenColumns

Place = tuple[int, int, int]
"""(member, replicate, checkpoint)."""

_FINGERPRINT, _EXAMPLES = "fingerprint", "examples"
_IDS, _FLOATS = np.dtype("<i4"), np.dtype("<f8")


class Scores(Part):
    """What the scoring client writes and the attribution reads.

    A measurement belongs to a ``member``, a ``replicate`` (0; 1 where the same was measured again for its noise), and
    a ``checkpoint``: 0 for the member's final model, 1 for the last one before it, 2 for the one before that.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._numbers: dict[str, int] | None = None
        self._sizes: NDArray[np.int64] = np.zeros(0, np.int64)
        self._measured: dict[Place, NDArray[np.bool_]] = {}

    # -- examples --------------------------------------------------------------------------------------

    def ids_of(self, examples: Sequence[EncodedExample]) -> Ids:
        """(n,) ids of examples; equal ones share an id, new ones get one."""
        return self.register({e.key: len(e.ids) for e in examples}, [e.key for e in examples])

    def register(self, sizes: Mapping[str, int], keys: Sequence[str] | None = None) -> Ids:
        """Ids of ``keys`` (default: those of ``sizes``), whose sizes in tokens are given. New ones get an id."""
        with self._db.lock:
            numbers = self._known()
            fresh = {k: n for k, n in sizes.items() if k not in numbers or self._sizes[numbers[k]] < 0}
            if fresh:
                # Runs of earlier versions did not note sizes.
                unknown = itertools.count(len(numbers))
                rows = [(numbers[k] if k in numbers else next(unknown), k, size) for k, size in fresh.items()]
                with self._db.transaction():
                    self._db.executemany("INSERT OR REPLACE INTO examples VALUES (?, ?, ?)", rows)
                    stored = [key for (key,) in self._db.execute("SELECT key FROM examples ORDER BY id")]
                    self._set_meta(_EXAMPLES, _digest(stored))
                self._numbers = None
                numbers = self._known()
            return np.array([numbers[key] for key in (sizes if keys is None else keys)], _IDS)

    def find_ids(self, examples: Sequence[EncodedExample]) -> Ids:
        """:meth:`ids_of` without writing: -1 for an example that nothing was ever measured of."""
        numbers = self._known()
        return np.array([numbers.get(key, -1) for key in keys_of(examples)], _IDS)

    def _known(self) -> dict[str, int]:
        """Ids by key, in the order of the ids."""
        ((count,),) = self._db.execute("SELECT COUNT(*) FROM examples")
        if self._numbers is None or count > len(self._numbers):  # another process may be writing
            rows = self._db.execute("SELECT key, id, COALESCE(tokens, -1) FROM examples ORDER BY id")
            self._numbers = {key: number for key, number, _ in rows}
            self._sizes = np.array([size for *_, size in rows], np.int64)
            expected = self._meta(_EXAMPLES)
            if expected is not None and expected != _digest(list(self._numbers)):
                self._numbers = None
                raise self._db.damaged("the table of examples does not match its checksum")
        return self._numbers

    # -- measurements ---------------------------------------------------------------------------------------------

    def save(self, fingerprint: str, batches: Sequence[ScoreBatch]) -> None:
        """Keep measurements, in one transaction: all of them or none. The first measurement of an example stays.

        ``fingerprint`` is the scorer's; one run has one. Raises RunChangedError for another one, since losses that
        were measured in two ways cannot be compared over members; StoreError for values that no model can give.
        """
        places: dict[Place, list[ScoreBatch]] = {}
        for batch in batches:
            places.setdefault((batch.member, batch.replicate, batch.checkpoint), []).append(batch)
        columns = {place: _columns(part) for place, part in places.items()}
        with self._db.lock:
            saved: list[tuple[Place, Ids]] = []
            with self._db.transaction():
                self._scored_with(fingerprint)
                ((last,),) = self._db.execute("SELECT COALESCE(MAX(id), 0) FROM blobs")
                for place, column in columns.items():
                    fresh = self._new_ones(place, column)
                    if fresh.ids.size:
                        last += 1
                        self._write_blob(last, place, fresh)
                        saved.append((place, fresh.ids))
                if saved:
                    self._result()
            for place, ids in saved:
                if place in self._measured:
                    self._measured[place] = _with(self._measured[place], ids)

    def _write_blob(self, number: int, place: Place, column: TokenColumns) -> None:
        flags = None if column.censored is None else column.censored.tobytes()
        sizes = self._sizes[column.ids]  # a run of an earlier version did not note all of them
        described = (number, *place, len(sizes), int(sizes.sum()) if (sizes >= 0).all() else None)
        content = (column.ids.tobytes(), column.counts.tobytes(), column.logprobs.tobytes(), flags)
        self._db.put("blobs", (*described, *content))

    def _scored_with(self, fingerprint: str) -> None:
        known = self._meta(_FINGERPRINT)
        if known is None:
            self._set_meta(_FINGERPRINT, fingerprint)
        elif known != fingerprint:
            raise RunChangedError(
                f"this run was scored with {known}, and now with {fingerprint}; nothing was stored. Go back to the "
                "first scorer, or set run_dir to a new folder."
            )

    def _new_ones(self, place: Place, column: TokenColumns) -> TokenColumns:
        have = self.measured(*place)
        old = np.zeros(len(column.ids), np.bool_)
        known = column.ids < have.size
        old[known] = have[column.ids[known]]
        first = np.zeros_like(old)
        first[np.unique(column.ids, return_index=True)[1]] = True
        return column if (keep := first & ~old).all() else _pick(column, keep)

    def measured(self, member: int, replicate: int = 0, checkpoint: int = 0) -> NDArray[np.bool_]:
        """By id, whether the model has been measured on an example; ids beyond its end were not."""
        place = (member, replicate, checkpoint)
        have = self._measured.get(place)
        if have is None:
            with self._db.lock:
                where, values = self._in_use(place)
                rows = self._db.execute(f"SELECT ids FROM blobs WHERE {where}", values)
                have = _with(np.zeros(0, np.bool_), np.frombuffer(b"".join(ids for (ids,) in rows), _IDS))
                if self._db.writable:
                    self._measured[place] = have
        return have

    def has_all(self, ids: Ids, member: int, replicate: int = 0, checkpoint: int = 0) -> bool:
        """Whether the model has been measured on all of these examples."""
        have = self.measured(member, replicate, checkpoint)
        return bool(ids.size == 0 or (ids.min() >= 0 and ids.max() < have.size and have[ids].all()))

    def load(self, member: int, replicate: int = 0, checkpoint: int = 0) -> TokenColumns:
        """All measurements of a model. Raises StoreCorruptError where a blob is damaged."""
        return _joined(list(self._blobs(*self._in_use((member, replicate, checkpoint)))))

    def load_some(self, ids: Ids, member: int, replicate: int = 0, checkpoint: int = 0) -> TokenColumns:
        """Measurements of some examples, those that exist; only the blobs that hold them are read."""
        where, values = self._in_use((member, replicate, checkpoint))
        wanted = _with(np.zeros(0, np.bool_), ids[ids >= 0])
        missing, found = int(wanted.sum()), []
        # What is measured twice comes first, so that the ids of most blobs are not looked at.
        with self._db.reading(f"SELECT id, ids FROM blobs WHERE {where} ORDER BY id", values) as rows:
            for number, raw in rows:
                if not missing:
                    break
                held = np.frombuffer(raw, _IDS)
                keep = held < wanted.size
                keep[keep] = wanted[held[keep]]
                if keep.any():
                    found.append(_pick(next(self._blobs("id = ?", (number,))), keep))
                    missing -= int(keep.sum())
        return _joined(found)

    def _blobs(self, where: str, values: tuple[int, ...]) -> Iterator[TokenColumns]:
        for row in self._db.rows("blobs", f"WHERE {where} ORDER BY id", *values):
            *_, ids, counts, logprobs, censored = row
            yield TokenColumns(
                np.frombuffer(ids, _IDS),
                np.frombuffer(counts, _IDS),
                np.frombuffer(logprobs, _FLOATS),
                None if censored is None else np.frombuffer(censored, np.bool_),
            )

    def _in_use(self, place: Place) -> tuple[str, tuple[int, ...]]:
        """SQL for a model's blobs that were not set aside."""
        return "member = ? AND replicate = ? AND checkpoint = ? AND id > ?", (*place, self.aside_up_to(place[0]))

    def models(self) -> list[Place]:
        """Models of which anything in use is measured: (member, replicate, checkpoint), ascending; -1 is the target."""
        rows = self._db.execute(
            "SELECT member, replicate, checkpoint, MAX(id) FROM blobs GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        aside = {member: self.aside_up_to(member) for member in {m for m, *_ in rows}}
        return [(m, r, c) for m, r, c, last in rows if last > aside[m]]

    def tokens_scored(self, *sides: Sequence[EncodedExample]) -> int:
        """Prompt and completion tokens of every measurement that was made, those set aside included.

        ``sides``: examples that give the sizes that a run of an earlier version did not note.
        """
        ((tokens,),) = self._db.execute("SELECT COALESCE(SUM(tokens), 0) FROM blobs")
        unknown = self._db.execute("SELECT ids FROM blobs WHERE tokens IS NULL")
        if unknown:
            sizes = {int(i): len(e.ids) for side in sides for i, e in zip(self.find_ids(side), side, strict=True)}
            tokens += sum(sizes.get(i, 0) for (ids,) in unknown for i in np.frombuffer(ids, _IDS).tolist())
        return int(tokens)

    @property
    def scored_with(self) -> str | None:
        """Fingerprint of the scorer that the run is measured with; None before anything is."""
        fingerprint: str | None = self._meta(_FINGERPRINT)
        return fingerprint

    # -- what came from elsewhere ---------------------------------------------------------------------------------

    def add_cached(self, member: int, checkpoint: int, examples: int, tokens: int) -> None:
        """Note that scores of a model came from another run and cost nothing."""
        with self._db.transaction():
            for row in self._db.rows("cached", "WHERE member = ? AND checkpoint = ?", member, checkpoint):
                examples, tokens = examples + row[2], tokens + row[3]
            self._db.put("cached", (member, checkpoint, examples, tokens))

    def cached_tokens(self, member: int, checkpoint: int = 0) -> int:
        """Tokens of the model's scores that came from another run."""
        rows = self._db.rows("cached", "WHERE member = ? AND checkpoint = ?", member, checkpoint)
        return sum(tokens for *_, tokens in rows)

    def cached(self) -> int:
        """Scores of all models that came from another run."""
        return sum(examples for _, _, examples, _ in self._db.rows("cached"))

    # -- scores that are not used ---------------------------------------------------------------------------------

    def set_aside(self, members: Sequence[int], reason: str, *, suspect: bool) -> None:
        """Use no more what was measured of members so far, and keep it.

        ``suspect``: the answers may be another model's (an endpoint that seemed to serve one model under many names),
        and :meth:`take_back` uses them again. Otherwise the member is trained anew, and two models never mix.
        """
        with self._db.transaction():
            ((number,),) = self._db.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM aside")
            ((up_to,),) = self._db.execute("SELECT COALESCE(MAX(id), 0) FROM blobs")
            listed = json.dumps(sorted(members))
            self._db.put("aside", (number, listed, up_to, int(suspect), reason, self._now(), None))
            for member in members:
                self._db.execute("DELETE FROM losses WHERE member = ?", (member,))
                self._db.execute("DELETE FROM cached WHERE member = ?", (member,))
                self._log(f"scores of member {member}", "", "set aside", reason)
        self._measured.clear()

    def take_back(self) -> tuple[int, ...]:
        """Use suspect scores again that were set aside; the members. Nothing happens where there are none.

        Raises StoreError where a member was scored again since.
        """
        with self._db.transaction():
            rows = self._db.rows("aside", "WHERE restored_at IS NULL AND suspect = 1")
            members = tuple(sorted({member for _, listed, *_ in rows for member in json.loads(listed)}))
            again = sorted({m for m, _, _ in self.models() if m in members})
            if again:
                raise StoreError(
                    f"members {', '.join(map(str, again))} were scored again since; both stay stored, nothing was "
                    "changed."
                )
            self._db.put("aside", *[(*row[:-1], self._now()) for row in rows])
            for member in members:
                self._log(f"scores of member {member}", "set aside", "taken back", "")
        self._measured.clear()
        return members

    def aside_up_to(self, member: int) -> int:
        """Number of the last blob of a member that is set aside; 0 where none is."""
        rows = self._db.rows("aside", "WHERE restored_at IS NULL")
        return max((up_to for _, members, up_to, *_ in rows if member in json.loads(members)), default=0)

    # -- loss matrices --------------------------------------------------------------------------------------------

    def groups(self) -> dict[int, Ids]:
        """Columns of every matrix, by its number: ids of examples, each once."""
        return {number: np.frombuffer(ids, _IDS) for number, ids in self._db.rows("groups", "ORDER BY number")}

    def save_losses(
        self, ids: Ids, member: int, checkpoint: int, kind: str, row: LossRow, *, aside: int | None = None
    ) -> None:
        """Keep a complete model's row of the matrix whose columns are ``ids``, made if it is new.

        ``kind`` names what was summed over tokens; a row of another kind is replaced. ``aside``: what
        :meth:`aside_up_to` was when the measurements were read; where they were set aside since, the row is not kept.
        """
        flags = None if row.censored is None or not row.censored.any() else np.packbits(row.censored).tobytes()
        content = (row.loss.astype(_FLOATS).tobytes(), row.counts.astype(_IDS).tobytes(), flags)
        with self._db.transaction():
            if aside is not None and aside != self.aside_up_to(member):
                return
            groups = self.groups()
            number = next((n for n, columns in groups.items() if np.array_equal(columns, ids)), None)
            if number is None:
                number = 1 + max(groups, default=-1)
                self._db.put("groups", (number, ids.astype(_IDS).tobytes()))
            self._db.put("losses", (number, member, checkpoint, kind, *content))

    def load_losses(self, member: int, checkpoint: int, kind: str) -> dict[int, LossRow]:
        """Rows of a model that were kept in this kind, by the number of their matrix."""
        found = {}
        for number, *_, loss, counts, flags in self._db.rows(
            "losses", "WHERE member = ? AND checkpoint = ? AND kind = ? ORDER BY grp", member, checkpoint, kind
        ):
            values = np.frombuffer(loss, _FLOATS)
            bits = None
            if flags is not None:
                bits = np.unpackbits(np.frombuffer(flags, np.uint8), count=len(values)).astype(np.bool_)
            found[int(number)] = LossRow(values, np.frombuffer(counts, _IDS), bits)
        return found

    def has_row(self, ids: Ids, member: int, checkpoint: int) -> bool:
        """Whether the losses of a model on these examples were kept."""
        rows = self._db.execute("SELECT grp FROM losses WHERE member = ? AND checkpoint = ?", (member, checkpoint))
        groups = self.groups() if rows else {}
        columns = [groups[int(n)] for (n,) in rows]
        return bool(columns) and bool(np.isin(ids, np.concatenate(columns)).all())

    def complete(self, ids: Ids) -> set[tuple[int, int]]:
        """(member, checkpoint) of the models that are measured on all of these examples."""
        if ids.size and ids.min() < 0:
            return set()
        groups = self.groups()
        have: dict[tuple[int, int], list[int]] = {}
        for number, member, checkpoint in self._db.execute("SELECT grp, member, checkpoint FROM losses ORDER BY 1"):
            have.setdefault((int(member), int(checkpoint)), []).append(int(number))
        covered: dict[tuple[int, ...], bool] = {}
        found = set()
        for member, replicate, checkpoint in self.models():
            if replicate:
                continue
            numbers = tuple(have.get((member, checkpoint), ()))
            if numbers and numbers not in covered:
                covered[numbers] = bool(np.isin(ids, np.concatenate([groups[n] for n in numbers])).all())
            if covered.get(numbers) or self.has_all(ids, member, 0, checkpoint):
                found.add((member, checkpoint))
        return found


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(keys).encode()).hexdigest()


def _with(have: NDArray[np.bool_], ids: Ids) -> NDArray[np.bool_]:
    """The flags with these ids among them."""
    size = int(ids.max()) + 1 if ids.size else 0
    if size > have.size:
        have = np.concatenate([have, np.zeros(max(size, 2 * have.size) - have.size, np.bool_)])
    have[ids] = True
    return have


def _columns(batches: Sequence[ScoreBatch]) -> TokenColumns:
    """Batches of one model end to end. Raises StoreError for values that no model can give: a mean is never poisoned
    by them."""
    scores: list[TokenScores] = [s for batch in batches for s in batch.scores]
    ids = np.concatenate([np.asarray(batch.ids, _IDS) for batch in batches])
    if len(ids) != len(scores):
        raise StoreError("examples and scores differ in number; nothing of this batch was stored.")
    counts = np.array([len(s.logprobs) for s in scores], _IDS)
    logprobs = np.fromiter(chain.from_iterable(s.logprobs for s in scores), _FLOATS, int(counts.sum()))
    if not np.isfinite(logprobs).all():
        raise StoreError("a log-probability is not finite; nothing of this batch was stored.")
    if any(s.censored and len(s.censored) != len(s.logprobs) for s in scores):
        raise StoreError("censoring flags and log-probabilities differ in number; nothing of this batch was stored.")
    censored = None
    if any(s.any_censored for s in scores):
        flags = chain.from_iterable(s.censored or (False,) * len(s.logprobs) for s in scores)
        censored = np.fromiter(flags, np.bool_, len(logprobs))
    return TokenColumns(ids, counts, logprobs, censored)


def _pick(column: TokenColumns, keep: NDArray[np.bool_]) -> TokenColumns:
    tokens = np.repeat(keep, column.counts)
    censored = None if column.censored is None else column.censored[tokens]
    return TokenColumns(column.ids[keep], column.counts[keep], column.logprobs[tokens], censored)


def _joined(columns: Sequence[TokenColumns]) -> TokenColumns:
    """Blobs end to end."""
    if not columns:
        return TokenColumns(np.zeros(0, _IDS), np.zeros(0, _IDS), np.zeros(0, _FLOATS), None)
    censored = None
    if any(c.censored is not None for c in columns):
        censored = np.concatenate(
            [np.zeros(len(c.logprobs), np.bool_) if c.censored is None else c.censored for c in columns]
        )
    return TokenColumns(
        np.concatenate([c.ids for c in columns]),
        np.concatenate([c.counts for c in columns]),
        np.concatenate([c.logprobs for c in columns]),
        censored,
    )
