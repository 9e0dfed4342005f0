"""Measured log-probabilities, sealed row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RunChangedError
from ..providers.base import TokenScores
from .database import seal
from .records import Records
from .rows import pack, unpack

Batch = tuple[int, int, int, Mapping[str, TokenScores]]
"""(member, replicate, checkpoint, scores by ``EncodedExample.key``)."""

_CACHED = "cached"


class ScoreRecords(Records):
    """The part of the store that the scoring client writes to.

    A measurement belongs to a ``member``, a ``replicate`` (0; 1 where the same was measured again for its noise), and
    a ``checkpoint``: 0 for the member's final model, 1 for the last one before it, 2 for the one before that.
    """

    def scored_keys(self, member: int, replicate: int = 0, checkpoint: int = 0) -> set[str]:
        """Keys (``EncodedExample.key``) that this model has been measured on."""
        place, values = _place(member, replicate, checkpoint)
        return {key for (key,) in self._db.execute(f"SELECT example_key FROM {place}", values)}

    def save_scores(
        self, member: int, replicate: int, fingerprint: str, scores: Mapping[str, TokenScores], checkpoint: int = 0
    ) -> None:
        """Keep a batch of measurements, by ``EncodedExample.key``: all of it or none. What is there already stays.

        ``fingerprint`` is the scorer's; one run has one. Raises RunChangedError for another one, since losses that
        were measured in two ways cannot be compared over members.
        """
        self.save_score_batches(fingerprint, [(member, replicate, checkpoint, scores)])

    def save_score_batches(self, fingerprint: str, batches: Sequence[Batch]) -> None:
        """:meth:`save_scores` for several batches in one transaction."""
        final: list[tuple[Any, ...]] = []
        earlier: list[tuple[Any, ...]] = []
        for member, replicate, checkpoint, scores in batches:
            _, values = _place(member, replicate, checkpoint)
            for key, value in scores.items():
                row = (*values, key, *pack(value))
                (earlier if checkpoint else final).append((*row, seal(*row)))
        with self._db.transaction():
            known = self._meta("fingerprint")
            if known is None:
                self._set_meta("fingerprint", fingerprint)
            elif known != fingerprint:
                raise RunChangedError(
                    f"this run was scored with {known}, and now with {fingerprint}; nothing was stored. Go back to the "
                    "first scorer, or set run_dir to a new folder."
                )
            self._db.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?)", final)
            self._db.executemany("INSERT OR IGNORE INTO checkpoint_scores VALUES (?, ?, ?, ?, ?, ?, ?)", earlier)

    def load_scores(self, member: int, replicate: int = 0, checkpoint: int = 0) -> dict[str, TokenScores]:
        """All measurements of a model, by ``EncodedExample.key``."""
        place, values = _place(member, replicate, checkpoint)
        rows = self._db.execute(f"SELECT example_key, logprobs, censored, seal FROM {place}", values)
        for key, logprobs, censored, expected in rows:
            self._db.check(expected, *values, key, logprobs, censored)
        return {key: unpack(logprobs, censored) for key, logprobs, censored, _ in rows}

    def times_scored(self) -> dict[str, int]:
        """How many measurements there are by ``EncodedExample.key``: over members, replicates and checkpoints."""
        rows = self._db.execute(
            "SELECT example_key, COUNT(*) FROM (SELECT example_key FROM scores "
            "UNION ALL SELECT example_key FROM checkpoint_scores) GROUP BY example_key"
        )
        return {str(key): int(times) for key, times in rows}

    @property
    def scored_with(self) -> str | None:
        """Fingerprint of the scorer that the run is measured with; None before anything is."""
        fingerprint: str | None = self._meta("fingerprint")
        return fingerprint

    def scored_members(self) -> list[int]:
        """Members (-1: the target) of which anything is measured, ascending."""
        rows = self._db.execute("SELECT member FROM scores UNION SELECT member FROM checkpoint_scores ORDER BY member")
        return [int(member) for (member,) in rows]

    def add_cached(self, member: int, checkpoint: int, examples: int, tokens: int) -> None:
        """Note that so many scores of a model, of so many tokens, came from the cache and cost nothing."""
        with self._db.transaction():
            known = self._meta(_CACHED) or {}
            before = known.get(f"{member}/{checkpoint}", [0, 0])
            known[f"{member}/{checkpoint}"] = [before[0] + examples, before[1] + tokens]
            self._set_meta(_CACHED, known)

    def cached_tokens(self, member: int, checkpoint: int = 0) -> int:
        """Tokens of the model's scores that came from the cache."""
        return int((self._meta(_CACHED) or {}).get(f"{member}/{checkpoint}", [0, 0])[1])

    def cached_scores(self) -> int:
        """Scores of all models that came from the cache."""
        return sum(int(examples) for examples, _ in (self._meta(_CACHED) or {}).values())

    def discard_scores(self, member: int, reason: str) -> None:
        """Forget what a member's models were measured to answer: it is trained anew, and two models never mix, or
        other models answered for it."""
        with self._db.transaction():
            for table in ("scores", "checkpoint_scores"):
                self._db.execute(f"DELETE FROM {table} WHERE member = ?", (member,))
            known = self._meta(_CACHED) or {}
            self._set_meta(_CACHED, {place: n for place, n in known.items() if not place.startswith(f"{member}/")})
            self._log(f"scores of member {member}", "", "discarded", reason)


def _place(member: int, replicate: int, checkpoint: int) -> tuple[str, tuple[int, ...]]:
    """Where a model's measurements lie: final models have a table of their own, the only one of older runs."""
    if checkpoint == 0:
        return "scores WHERE member = ? AND replicate = ?", (member, replicate)
    where = "checkpoint_scores WHERE member = ? AND replicate = ? AND checkpoint = ?"
    return where, (member, replicate, checkpoint)
