"""What a run's jobs cost: reserved before they are sent, settled when they end."""

from __future__ import annotations

from ..errors import BudgetError
from ..plan import JobCosts
from ..providers.base import Job, JobStatus
from ..store import JobRow, Purpose, RunStore


class JobMoney:
    """The ledger's side of jobs. Without ``costs`` (tokens and price of each job) nothing is reserved or settled, which
    is enough for cancelling and cleaning up. ``cap``: dollars that reserved and spent money may reach."""

    def __init__(self, store: RunStore, costs: JobCosts | None, cap: float | None, purpose: Purpose) -> None:
        """Raises BudgetError for a cap without a price."""
        if cap is not None and costs is None:
            raise BudgetError(
                "budget.max_usd is set, but the price of a job is not known; nothing was sent. Set budget.price, or "
                "take max_usd out."
            )
        self.costs = costs
        self._store = store
        self._cap = cap
        self._purpose = purpose
        self._compared = False

    def reserve(self, subject: str, member: int) -> None:
        """Reserve the expected price of a job. Raises BudgetError at the cap; nothing is reserved then."""
        if self.costs is not None:
            self._store.ledger.reserve(subject, self.costs.estimate(member), purpose=self._purpose, cap=self._cap)

    def settle(self, subject: str, member: int, trained_tokens: int | None) -> None:
        """Book what was billed: the price of the reported tokens. Where none are reported the reservation stands,
        since a job that failed may have been billed for its steps."""
        if self.costs is not None:
            usd = self.costs.estimate(member) if trained_tokens is None else self.costs.billed(trained_tokens)
            self._store.ledger.settle(subject, usd)

    def book(self, subject: str, member: int, trained_tokens: int | None) -> None:
        """Book a job that has been submitted already, whatever the cap: its price, or what it reports."""
        if self.costs is not None:
            self._store.ledger.reserve(subject, self.costs.estimate(member), purpose=self._purpose)
            self.settle(subject, member, trained_tokens)

    def release_unsent(self) -> None:
        """Free money that was reserved for jobs of which not even an intent was recorded: they were never sent."""
        known = {row.key for row in self._store.jobs.rows()}
        for subject in self._store.ledger.unsettled():
            if subject.startswith(f"{self._store.run_key}-m") and " " not in subject and subject not in known:
                self._store.ledger.settle(subject, 0.0)

    def other_tokens(self, row: JobRow, job: Job) -> str | None:
        """A sentence where a job was billed for other tokens than are measured; once."""
        if self.costs is None or job.status is not JobStatus.SUCCEEDED or self._compared:
            return None
        text = self.costs.mismatch(row.member, job.trained_tokens)
        self._compared = text is not None
        return text
