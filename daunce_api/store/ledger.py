"""What has been spent, and what is spoken for: a ledger that cannot exceed its cap."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import BudgetError
from .database import seal
from .records import Records

NANO = 1_000_000_000
"""Money is kept in whole billionths of a dollar, so that sums are exact."""


class Ledger(Records):
    """Reservations and settlements by subject (a job's key, a batch of requests).

    A reservation counts in full until it is settled with what was really billed.
    """

    def reserve(self, subject: str, usd: float, *, cap: float | None = None) -> None:
        """Speak for money before it is spent.

        A subject with an open reservation is not counted twice; one that was settled is opened again with ``usd`` on
        top. Check and reservation are one transaction. Raises BudgetError where spent and reserved money together
        would exceed ``cap`` dollars; then nothing is reserved.
        """
        amount = _nano(usd)
        with self._db.transaction():
            rows = self._spend_rows()
            settled = 0
            if subject in rows:
                _, known = rows[subject]
                if known is None:
                    return
                settled = known
            total = _total(rows)
            if cap is not None and total + amount > _nano(cap):
                raise BudgetError(
                    f"{subject} needs ${usd:,.4f}, but ${total / NANO:,.4f} of the ${cap:,.2f} in budget.max_usd are "
                    "spent or reserved. Nothing more was sent, and everything paid for is kept. Raise budget.max_usd "
                    "and run the same command again."
                )
            self._write_spend(subject, settled + amount, None)
            self._log(f"spend {subject}", "", "reserved", f"${usd:.6f}")

    def settle(self, subject: str, usd: float) -> None:
        """Replace a reservation with what was billed (0 where nothing was). The last word counts."""
        amount = _nano(usd)
        with self._db.transaction():
            reserved, settled = self._spend_rows().get(subject, (0, None))
            if settled != amount:
                self._write_spend(subject, reserved, amount)
                self._log(f"spend {subject}", "reserved" if settled is None else "settled", "settled", f"${usd:.6f}")

    def spent(self) -> float:
        """Dollars settled, plus those reserved and not settled yet."""
        return _total(self._spend_rows()) / NANO

    def unsettled(self) -> dict[str, float]:
        """Dollars reserved and not settled yet, by subject."""
        return {s: reserved / NANO for s, (reserved, settled) in self._spend_rows().items() if settled is None}

    def _spend_rows(self) -> dict[str, tuple[int, int | None]]:
        rows = self._db.execute("SELECT subject, reserved, settled, seal FROM spend")
        for *values, expected in rows:
            self._db.check(expected, *values)
        return {subject: (reserved, settled) for subject, reserved, settled, _ in rows}

    def _write_spend(self, subject: str, reserved: int, settled: int | None) -> None:
        row = (subject, reserved, settled)
        self._db.execute("INSERT OR REPLACE INTO spend VALUES (?, ?, ?, ?)", (*row, seal(*row)))


def _total(rows: Mapping[str, tuple[int, int | None]]) -> int:
    return sum(reserved if settled is None else settled for reserved, settled in rows.values())


def _nano(usd: float) -> int:
    """Rounded up, so that what is counted is never less than what is meant."""
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"an amount of money must be finite and not negative, not {usd}")
    return math.ceil(round(usd * NANO, 3))
