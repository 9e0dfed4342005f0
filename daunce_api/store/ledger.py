"""``store.ledger``: what has been spent and what is reserved, with a cap that holds."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Literal

from .._util.text import dollars
from ..errors import BudgetError
from .part import Part

NANO = 1_000_000_000
"""Money is kept in whole billionths of a dollar, so that sums are exact."""

Purpose = Literal["train", "score", "probe", "ask", "retrain"]


class Ledger(Part):
    """Reservations and settlements by subject (a job's key, a model's scoring), each for a purpose.

    A reservation counts in full until it is settled with what was billed.
    """

    def reserve(self, subject: str, usd: float, *, purpose: Purpose, cap: float | None = None) -> None:
        """Reserve money before it is spent.

        A subject with an open reservation is not counted twice; one that was settled is opened again with ``usd`` on
        top. Check and reservation are one transaction. Raises BudgetError where spent and reserved money together
        would exceed ``cap`` dollars; then nothing is reserved.
        """
        with self._db.transaction():
            row = self._rows().get(subject)
            if row is None or row[2] is not None:
                self._add(subject, usd, row, purpose, cap)

    def add(self, subject: str, usd: float, *, purpose: Purpose, cap: float | None = None) -> None:
        """Book what is sent now and billed in any case. Raises as :meth:`reserve` does; then nothing is booked."""
        with self._db.transaction():
            row = self._rows().get(subject)
            self._add(subject, usd, row, purpose, cap)
            if row is None or row[2] is not None:
                before = 0 if row is None or row[2] is None else row[2]
                self._db.put("spend", (subject, purpose if row is None else row[0], 0, before + _nano(usd)))

    def settle(self, subject: str, usd: float) -> None:
        """Replace a reservation with what was billed (0 where nothing was). The last word counts."""
        amount = _nano(usd)
        with self._db.transaction():
            purpose, reserved, settled = self._rows().get(subject, ("train", 0, None))
            if settled != amount:
                self._db.put("spend", (subject, purpose, reserved, amount))
                self._log(f"spend {subject}", "reserved" if settled is None else "settled", "settled", f"${usd:.6f}")

    def spent(self) -> float:
        """Dollars settled, plus those reserved and not settled yet."""
        return sum(self._totals().values()) / NANO

    def spent_by_purpose(self) -> dict[str, float]:
        """:meth:`spent` of every purpose that occurs."""
        return {purpose: total / NANO for purpose, total in sorted(self._totals().items())}

    def _totals(self) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        for purpose, reserved, settled in self._rows().values():
            totals[purpose] += reserved if settled is None else settled
        return totals

    def unsettled(self) -> dict[str, float]:
        """Dollars reserved and not settled yet, by subject."""
        return {s: reserved / NANO for s, (_, reserved, settled) in self._rows().items() if settled is None}

    def _add(
        self, subject: str, usd: float, row: tuple[str, int, int | None] | None, purpose: str, cap: float | None
    ) -> None:
        amount = _nano(usd)
        total = sum(self._totals().values())
        if cap is not None and total + amount > _nano(cap):
            raise BudgetError(
                f"{subject} needs {dollars(usd)}, but {dollars(total / NANO)} of the {dollars(cap)} in budget.max_usd "
                "are spent or reserved. Nothing more was sent, and everything paid for is kept. Raise budget.max_usd "
                "and run the same command again."
            )
        before = 0 if row is None else row[1] if row[2] is None else row[2]
        self._db.put("spend", (subject, purpose if row is None else row[0], before + amount, None))
        self._log(f"spend {subject}", "", "reserved", f"${usd:.6f}")

    def _rows(self) -> dict[str, tuple[str, int, int | None]]:
        return {s: (purpose, reserved, settled) for s, purpose, reserved, settled in self._db.rows("spend")}


def _nano(usd: float) -> int:
    """Rounded up, so that what is counted is never less than what is meant."""
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"an amount of money must be finite and not negative, not {usd}")
    return math.ceil(round(usd * NANO, 3))
