"""``Plan``: what a run will do and cost, and why it may not start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from .._util.text import dollars
from ..errors import CapabilityError, DaunceError
from ..providers.base import ModelInfo
from ..store import TARGET
from .prices import MILLION, Hosting, JobCosts, Price


@dataclass(frozen=True, slots=True)
class Missing:
    """What a run still has to do.

    ``jobs``: members (-1: the target model) for which a job has to be submitted; those with a live job are paid for
    already. ``training``: members without a model, live jobs included. ``models`` are to be scored, earlier
    checkpoints included; ``finals`` of them are members' final ones. ``spent_usd``: dollars spent and reserved so far.
    """

    jobs: frozenset[int]
    training: frozenset[int]
    models: int
    finals: int = 0
    spent_usd: float = 0.0

    @property
    def nothing(self) -> bool:
        """Whether the run is trained and scored."""
        return not self.training and not self.models


_JSON = (
    *("provider", "scorer", "model", "members", "jobs", "checkpoints", "training_usd", "scoring_usd", "usd"),
    *("spent_usd", "max_usd", "loss", "hours", "concurrent_jobs"),
)
"""Attributes of a plan that its JSON form has under the same name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Jobs, tokens, dollars and time of what a run still has to do, retries apart: all of it before it was started.

    Tokens are those that are billed: of all epochs for training, of prompts and answers for scoring. Dollars and
    hours are None where they are not known. ``refusals`` are the reasons not to start; :meth:`check` raises them.
    ``members``, ``training_tokens`` (of each member's job), ``scored_models`` and ``scoring_*_tokens`` (of one model,
    every example once) describe the whole run; ``jobs`` and everything in dollars, what is missing.
    """

    provider: str
    scorer: str
    model: str
    members: int
    n_train: int
    n_test: int
    subset: int
    training_tokens: dict[int, int]
    scored_models: int
    scoring_input_tokens: int
    scoring_output_tokens: int
    training_price: Price
    scoring_price: Price
    price_factor: float
    max_usd: float | None
    hours_per_job: float | None
    concurrent_jobs: int
    today: date
    missing: Missing
    """What the run still has to do; of a new one, everything."""
    smallest_subset: int = 0
    """Examples of the member with the fewest; ``subset`` is that of the one with the most."""
    again_tokens: tuple[int, int] = (0, 0)
    """Of prompts and of answers that each member gives twice, to measure noise."""
    test_tokens: int = 0
    """Of the endpoint's test, which is made once with every model and with the base model."""
    checkpoints: int = 1
    """Models of each member that are scored, its final one included."""
    hosting: Hosting | None = None
    """What the hours of the endpoint that scores cost; None where it is not paid for by the hour."""
    loss: str = ""
    """Which turns of the training examples carry the loss and are measured, in words."""
    n_scored: int | None = None
    """Examples that each model is scored on, where it is not all of them."""
    notes: tuple[str, ...] = ()
    about_jobs: tuple[DaunceError, ...] = field(default=(), compare=False)
    """Reasons not to submit jobs."""
    about_scoring: tuple[DaunceError, ...] = field(default=(), compare=False)
    """Reasons not to score, and what forbids both."""
    refusals: tuple[DaunceError, ...] = field(default=(), compare=False)

    @property
    def submitted(self) -> frozenset[int]:
        """Members (-1: the target model) for which a job is to be submitted."""
        return self.missing.jobs

    @property
    def jobs(self) -> int:
        """Jobs to be submitted."""
        return len(self.submitted)

    @property
    def models(self) -> int:
        """Models to be scored."""
        return self.missing.models

    @property
    def nothing_missing(self) -> bool:
        """The run is trained and scored."""
        return self.missing.nothing

    @property
    def spent_usd(self) -> float:
        """Dollars that were spent or reserved before."""
        return self.missing.spent_usd

    @property
    def total_training_tokens(self) -> int:
        """Tokens of all jobs to be submitted."""
        return sum(tokens for member, tokens in self.training_tokens.items() if member in self.submitted)

    @property
    def training_usd(self) -> float | None:
        """Dollars of all training jobs."""
        price = self.training_price.training
        return None if price is None else self.total_training_tokens * price / MILLION

    @property
    def scoring_usd_per_model(self) -> float | None:
        """Dollars of testing one model and measuring it on every example once, its share of the endpoint's hours
        included."""
        hosting = 0.0 if self.hosting is None else self.hosting.usd
        tokens = self._scoring_usd_of(self.scoring_input_tokens + self.test_tokens, self.scoring_output_tokens)
        return None if hosting is None or tokens is None else tokens + hosting / self.scored_models

    @property
    def again_usd(self) -> float | None:
        """Dollars of what a member is measured on twice."""
        return self._scoring_usd_of(*self.again_tokens)

    @property
    def test_usd(self) -> float | None:
        """Dollars of testing the endpoint with one model."""
        return self._scoring_usd_of(self.test_tokens, 0)

    @property
    def scoring_tokens(self) -> tuple[int, int]:
        """Tokens of all prompts that are to be sent, tests and repeated ones included, and of their answers."""
        (prompts, answers), finals = self.again_tokens, self.missing.finals
        tests = (self.models + 1 if self.models else 0) * self.test_tokens
        return (
            self.models * self.scoring_input_tokens + finals * prompts + tests,
            self.models * self.scoring_output_tokens + finals * answers,
        )

    @property
    def scoring_usd(self) -> float | None:
        """Dollars of scoring all models that are to be scored, tests and the endpoint's hours included."""
        tokens, hosting = self._scoring_usd_of(*self.scoring_tokens), 0.0 if self.hosting is None else self.hosting.usd
        return None if hosting is None or tokens is None else tokens + hosting * self.models / self.scored_models

    def _scoring_usd_of(self, prompts: int, answers: int) -> float | None:
        price = self.scoring_price
        if (prompts and price.input is None) or (answers and price.output is None):
            return None
        return (prompts * (price.input or 0.0) + answers * (price.output or 0.0)) * self.price_factor / MILLION

    @property
    def usd(self) -> float | None:
        """Dollars of everything that is missing."""
        if self.nothing_missing:
            return 0.0
        if self.training_usd is None or self.scoring_usd is None:
            return None
        return self.training_usd + self.scoring_usd

    @property
    def hours(self) -> float | None:
        """Hours of training; None where it is not known how long a job takes."""
        if self.hours_per_job is None:
            return None
        training = self.missing.training
        members = len(training - {TARGET})
        return (math.ceil(members / self.concurrent_jobs) + (TARGET in training)) * self.hours_per_job

    @property
    def costs_money(self) -> bool:
        """False only where everything is known to cost nothing."""
        return self.usd != 0.0

    @property
    def costs(self) -> JobCosts | None:
        """What each job is expected to be billed; None where the price is not known."""
        price = self.training_price.training
        return None if price is None else JobCosts(self.training_tokens, price / MILLION)

    @property
    def last_day(self) -> date:
        """The day on which the run is expected to end, if it starts today and its duration is known."""
        return self.today + timedelta(hours=self.hours or 0.0)

    def check(self) -> None:
        """Raises the first reason why the run may not start: DataError, ConfigurationError, CapabilityError or
        BudgetError."""
        if self.refusals:
            raise self.refusals[0]

    def check_model(self, info: ModelInfo) -> None:
        """Raises CapabilityError where the provider shuts the model down before the run would end."""
        if info.shutdown_date is None or self.nothing_missing:
            return
        try:
            shutdown = date.fromisoformat(info.shutdown_date[:10])
        except ValueError:
            return
        if shutdown <= self.last_day:
            raise CapabilityError(
                f"{self.provider} shuts {info.id} down on {shutdown}, before this run would end ({self.last_day}). "
                "Nothing was spent. Choose another model."
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, fields as documented here; what is not known is null."""
        hosting = self.hosting or Hosting(None, None, "")
        return {name: getattr(self, name) for name in _JSON} | {
            "train_examples": self.n_train,
            "test_examples": self.n_test,
            "subset_examples": self.subset,
            "training_tokens": self.total_training_tokens,
            "training_tokens_first_member": self.training_tokens.get(0),
            "training_tokens_target": self.training_tokens.get(TARGET),
            "scored_models": self.models,
            "scoring_input_tokens": self.scoring_tokens[0],
            "scoring_output_tokens": self.scoring_tokens[1],
            "training_price_source": self.training_price.source,
            "scoring_price_source": self.scoring_price.source,
            "hosting_usd": 0.0 if self.hosting is None else hosting.usd,
            "hosting_usd_per_hour": hosting.usd_per_hour,
            "hosting_hours": hosting.hours,
            "hosting_price_source": hosting.source or None,
            "notes": list(self.notes),
            "refused": [str(error) for error in self.refusals],
        }

    def rows(self) -> list[tuple[str, str]]:
        """The plan in words, each with its name; its notes and why it may not start come last."""
        members = [tokens for k, tokens in self.training_tokens.items() if k != TARGET and k in self.submitted]
        spread = f" ({min(members):,} to {max(members):,} a member, all epochs)" if members else ""
        examples = self.n_train + self.n_test if self.n_scored is None else self.n_scored
        of_each = f" ({self.checkpoints} of each member)" if self.checkpoints > 1 else ""
        if self.nothing_missing:
            done = f"all {self.members} members of {self.model} are trained and scored"
            return [("Jobs", f"nothing is missing: {done}"), ("Total", _total(self))]
        return [
            ("Jobs", self._jobs_text()),
            ("Scoring", f"{examples:,} examples on {self.models} models{of_each}, by {self.scorer}"),
            *([("Loss", self.loss)] if self.loss else []),
            ("Training tokens", f"{self.total_training_tokens:,}{spread}"),
            ("Scoring tokens", f"{sum(self.scoring_tokens):,}"),
            ("Training", _dollars(self.training_usd, self.training_price)),
            ("Scoring cost", self._scoring_text()),
            ("Total", _total(self)),
            ("Time", _time(self.hours, self.concurrent_jobs)),
            *(("Note", f"{note}.") for note in self.notes),
            *(("Refused", str(error)) for error in self.refusals),
        ]

    def text(self) -> str:
        """The plan for a reader."""
        return "\n".join(
            f"{name}: {value}" if name in ("Note", "Refused") else f"{name + ':':17}{value}"
            for name, value in self.rows()
        )

    @property
    def _subset_text(self) -> str:
        least = self.smallest_subset
        return f"{least:,} to {self.subset:,}" if 0 < least < self.subset else f"{self.subset:,}"

    def _jobs_text(self) -> str:
        if not self.submitted:
            live = len(self.missing.training)
            return f"none to submit; {live} of {self.members} members are being trained" if live else "none to submit"
        place = ("on " if self.provider == "this machine" else "at ") + self.provider
        jobs = f"{self.jobs} fine-tune{'' if self.jobs == 1 else 's'} of {self.model} {place}"
        members = len(self.submitted - {TARGET})
        if TARGET in self.submitted:
            jobs += f" (the target model on all {self.n_train:,} examples, then {members} members"
            jobs += f" on {self._subset_text} each)"
        elif self.subset:
            jobs += f", each on {self._subset_text} of {self.n_train:,} examples"
        others = self.members - members
        return f"{jobs}; the other {others} members have a job" if others else jobs

    def _scoring_text(self) -> str:
        if self.hosting is None:
            return _dollars(self.scoring_usd, self.scoring_price)
        total = "not known" if self.scoring_usd is None else dollars(self.scoring_usd)
        return f"{total} (tokens: {self.scoring_price.source}; endpoint: {self.hosting.text})"


def _dollars(usd: float | None, price: Price) -> str:
    if usd is None:
        return "price not known; set budget.price to see it"
    if usd == 0:
        return f"$0 ({price.source})"
    return f"{dollars(usd)} ({price.source})"


def _total(plan: Plan) -> str:
    text = "not known" if plan.usd is None else dollars(plan.usd)
    if plan.spent_usd:
        text += f", and {dollars(plan.spent_usd)} spent or reserved before"
    return text if plan.max_usd is None else f"{text}; budget.max_usd is {dollars(plan.max_usd)}"


def _time(hours: float | None, concurrent: int) -> str:
    at_once = f"{concurrent} job{'' if concurrent == 1 else 's'} at once"
    if hours is None:
        return f"not known ({at_once}); set backend.minutes_per_job to how long a job takes to see hours"
    return f"about {hours:.1f} hours of training ({at_once})"
