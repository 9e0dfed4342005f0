"""Measured log-probabilities, sealed row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..backends.base import TokenScores
from ..errors import RunChangedError
from .database import seal
from .records import Records
from .rows import pack, unpack


class ScoreRecords(Records):
    """The part of the store that the scoring client writes to."""

    def scored_keys(self, member: int, replicate: int = 0) -> set[str]:
        """Keys (``EncodedExample.key``) that this member has been measured on."""
        rows = self._db.execute(
            "SELECT example_key FROM scores WHERE member = ? AND replicate = ?", (member, replicate)
        )
        return {key for (key,) in rows}

    def save_scores(self, member: int, replicate: int, fingerprint: str, scores: Mapping[str, TokenScores]) -> None:
        """Keep a batch of measurements, by ``EncodedExample.key``: all of it or none. What is there already stays.

        ``fingerprint`` is the scorer's; one run has one. Raises RunChangedError for another one, since losses that
        were measured in two ways cannot be compared over members.
        """
        self.save_score_batches(fingerprint, [(member, replicate, scores)])

    def save_score_batches(
        self, fingerprint: str, batches: Sequence[tuple[int, int, Mapping[str, TokenScores]]]
    ) -> None:
        """:meth:`save_scores` for several (member, replicate, scores) in one transaction."""
        rows = []
        for member, replicate, scores in batches:
            for key, value in scores.items():
                row = (member, replicate, key, *pack(value))
                rows.append((*row, seal(*row)))
        with self._db.transaction():
            known = self._meta("fingerprint")
            if known is None:
                self._set_meta("fingerprint", fingerprint)
            elif known != fingerprint:
                raise RunChangedError(
                    f"this run was scored with {known}, and now with {fingerprint}; nothing was stored. Go back to the "
                    "first scorer, or set run_dir to a new folder."
                )
            self._db.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?)", rows)

    def load_scores(self, member: int, replicate: int = 0) -> dict[str, TokenScores]:
        """All measurements of a member, by ``EncodedExample.key``."""
        rows = self._db.execute(
            "SELECT example_key, logprobs, censored, seal FROM scores WHERE member = ? AND replicate = ?",
            (member, replicate),
        )
        for key, logprobs, censored, expected in rows:
            self._db.check(expected, member, replicate, key, logprobs, censored)
        return {key: unpack(logprobs, censored) for key, logprobs, censored, _ in rows}

    def discard_scores(self, member: int, reason: str) -> None:
        """Forget what a model was measured to answer: its member is trained anew, and two models never mix."""
        with self._db.transaction():
            self._db.execute("DELETE FROM scores WHERE member = ?", (member,))
            self._log(f"scores of member {member}", "", "discarded", reason)
