"""``Plan``: what a run will do and cost, and why it may not start."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

from ..backends.base import ModelInfo, ScorerCapabilities, TrainerCapabilities
from ..config import RunConfig
from ..dataset import Dataset
from ..ensemble import Ensemble, plan_ensemble
from ..errors import BudgetError, CapabilityError, ConfigurationError, DaunceError
from ..store import TARGET
from ..tokens import Tokenizer
from .counting import count
from .epochs import epochs_of
from .prices import MILLION, JobCosts, Price, closing_of, prices_of


@dataclass(frozen=True, slots=True)
class Plan:
    """Jobs, tokens, dollars and time of a whole run, from its beginning, retries apart.

    Tokens are those that are billed: of all epochs for training, of prompts and answers for scoring. Dollars and
    hours are None where they are not known. ``refusals`` are the reasons not to start; :meth:`check` raises them.
    """

    provider: str
    scorer: str
    model: str
    members: int
    jobs: int
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
    hours: float | None
    concurrent_jobs: int
    today: date
    n_scored: int | None = None
    """Examples that each model is asked about, where it is not all of them."""
    notes: tuple[str, ...] = ()
    refusals: tuple[DaunceError, ...] = field(default=(), compare=False)

    @property
    def total_training_tokens(self) -> int:
        """Tokens of all jobs together."""
        return sum(self.training_tokens.values())

    @property
    def training_usd(self) -> float | None:
        """Dollars of all training jobs."""
        price = self.training_price.training
        return None if price is None else self.total_training_tokens * price / MILLION

    @property
    def scoring_usd_per_model(self) -> float | None:
        """Dollars of measuring one model on every example."""
        total = 0.0
        for tokens, price in (
            (self.scoring_input_tokens, self.scoring_price.input),
            (self.scoring_output_tokens, self.scoring_price.output),
        ):
            if tokens and price is None:
                return None
            total += tokens * (price or 0.0)
        return total * self.price_factor / MILLION

    @property
    def scoring_usd(self) -> float | None:
        """Dollars of measuring all models."""
        one = self.scoring_usd_per_model
        return None if one is None else one * self.scored_models

    @property
    def usd(self) -> float | None:
        """Dollars of the whole run."""
        if self.training_usd is None or self.scoring_usd is None:
            return None
        return self.training_usd + self.scoring_usd

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
        if info.shutdown_date is None:
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
        per_member = self.training_tokens.get(0)
        return {
            "provider": self.provider,
            "scorer": self.scorer,
            "model": self.model,
            "members": self.members,
            "jobs": self.jobs,
            "train_examples": self.n_train,
            "test_examples": self.n_test,
            "subset_examples": self.subset,
            "training_tokens": self.total_training_tokens,
            "training_tokens_first_member": per_member,
            "training_tokens_target": self.training_tokens.get(TARGET),
            "scored_models": self.scored_models,
            "scoring_input_tokens": self.scoring_input_tokens * self.scored_models,
            "scoring_output_tokens": self.scoring_output_tokens * self.scored_models,
            "training_usd": self.training_usd,
            "scoring_usd": self.scoring_usd,
            "usd": self.usd,
            "max_usd": self.max_usd,
            "training_price_source": self.training_price.source,
            "scoring_price_source": self.scoring_price.source,
            "hours": self.hours,
            "concurrent_jobs": self.concurrent_jobs,
            "notes": list(self.notes),
            "refused": [str(error) for error in self.refusals],
        }

    def text(self) -> str:
        """The plan for a reader."""
        target = TARGET in self.training_tokens
        jobs = f"{self.jobs} fine-tunes of {self.model} at {self.provider}"
        if target:
            jobs += f" (the target model on all {self.n_train:,} examples, then {self.members} members"
            jobs += f" on {self.subset:,} each)"
        else:
            jobs += f", each on {self.subset:,} of {self.n_train:,} examples"
        members = [tokens for k, tokens in self.training_tokens.items() if k != TARGET]
        spread = f"{min(members):,} to {max(members):,} a member" if members else "none"
        scored = (self.scoring_input_tokens + self.scoring_output_tokens) * self.scored_models
        asked = self.n_train + self.n_test if self.n_scored is None else self.n_scored
        rows = [
            ("Jobs", jobs),
            ("Scoring", f"{asked:,} examples on {self.scored_models} models, by {self.scorer}"),
            ("Training tokens", f"{self.total_training_tokens:,} ({spread}, all epochs)"),
            ("Scoring tokens", f"{scored:,}"),
            ("Training", _dollars(self.training_usd, self.training_price)),
            ("Scoring cost", _dollars(self.scoring_usd, self.scoring_price)),
            ("Together", _total(self.usd, self.max_usd)),
            ("Time", _time(self.hours, self.concurrent_jobs)),
        ]
        lines = [f"{name + ':':17}{value}" for name, value in rows]
        lines += [f"Note: {note}." for note in self.notes]
        lines += [f"Refused: {error}" for error in self.refusals]
        return "\n".join(lines)


def make_plan(
    config: RunConfig,
    train: Dataset,
    test: Dataset,
    tokenizer: Tokenizer,
    trainer: TrainerCapabilities,
    scorer: ScorerCapabilities,
    model_info: ModelInfo | None = None,
    *,
    today: date | None = None,
) -> Plan:
    """Plan a run; nothing is sent, and no key is needed.

    ``model_info``, where the provider was asked, adds its shutdown date to the reasons not to start. ``today``
    defaults to the present day in UTC. Raises DataError where examples cannot be encoded; all other reasons not to
    start are in ``Plan.refusals``.
    """
    today = today or datetime.now(UTC).date()
    counts = count(config, train, test, tokenizer, scorer)
    refusals: list[DaunceError] = list(counts.refusals)
    notes: list[str] = [*trainer.notes, *scorer.notes]
    if not counts.exact:
        notes.append(
            "tiktoken's rank file is out of reach, so tokens are estimated from bytes (four a token), and whether "
            "completions are single tokens is not checked"
        )
    ensemble: Ensemble | None = None
    try:
        shape = config.ensemble
        ensemble = plan_ensemble(len(train), shape.members, shape.subset_ratio, shape.seed, trainer.min_examples)
    except ConfigurationError as error:
        refusals.append(error)
    refusals += _trainer_refusals(config, trainer)
    if not trainer.honours_seed:
        notes.append(f"{trainer.provider} takes no seed: the same job twice gives two models")
    tokens: dict[int, int] = {}
    if config.ensemble.start_from == "target" and config.ensemble.target_model is None:
        epochs, assumed = epochs_of(config, len(train), target=True)
        tokens[TARGET] = epochs * sum(counts.training_N)
        notes += [f"target model: {assumed}"] if assumed else []
    subset = 0
    if ensemble is not None:
        subset = int(ensemble.inclusion_KN[0].sum())
        epochs, assumed = epochs_of(config, subset, target=False)
        notes += [assumed] if assumed else []
        tokens |= {k: epochs * sum(counts.training_N[i] for i in ensemble.subset(k)) for k in range(ensemble.members)}
    training_price, scoring_price = prices_of(config)
    jobs = config.ensemble.members + (TARGET in tokens)
    concurrent = config.backend.max_concurrent_jobs or max(1, trainer.max_concurrent_jobs)
    hours = None
    minutes = config.backend.minutes_per_job
    seconds = trainer.seconds_per_job if minutes is None else 60 * minutes
    if seconds is not None:
        rounds = math.ceil(config.ensemble.members / concurrent) + (TARGET in tokens)
        hours = rounds * seconds / 3600
    plan = Plan(
        provider=trainer.provider,
        scorer=scorer.provider,
        model=config.backend.model,
        members=config.ensemble.members,
        jobs=jobs,
        n_train=len(train),
        n_test=len(test),
        subset=subset,
        training_tokens=tokens,
        scored_models=config.ensemble.members + (config.scoring.target and config.ensemble.start_from == "target"),
        scoring_input_tokens=counts.input,
        scoring_output_tokens=counts.output,
        training_price=training_price,
        scoring_price=scoring_price,
        price_factor=scorer.price_factor,
        max_usd=config.budget.max_usd,
        hours=hours,
        concurrent_jobs=concurrent,
        today=today,
        notes=tuple(dict.fromkeys(notes)),
    )
    refusals += [*_closing_refusals(config, plan), *_budget_refusals(plan)]
    if model_info is not None:
        try:
            plan.check_model(model_info)
        except CapabilityError as error:
            refusals.append(error)
    return replace(plan, refusals=tuple(refusals))


def _trainer_refusals(config: RunConfig, trainer: TrainerCapabilities) -> list[DaunceError]:
    refusals: list[DaunceError] = []
    if config.ensemble.start_from == "target" and not trainer.starts_from_fine_tune:
        refusals.append(
            CapabilityError(
                f"{trainer.provider} cannot fine-tune a fine-tune, which start_from: target needs. Use start_from: "
                "base, or another backend."
            )
        )
    given = {**config.training.hyperparameters, **(config.training.target_hyperparameters or {})}
    for name in sorted(given.keys() - trainer.hyperparameters) if trainer.hyperparameters else ():
        close = difflib.get_close_matches(name, trainer.hyperparameters, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it knows {', '.join(sorted(trainer.hyperparameters))}."
        refusals.append(
            ConfigurationError(
                f"training.hyperparameters.{name}: {trainer.provider} does not know it; {hint} Nothing was sent."
            )
        )
    return refusals


def _closing_refusals(config: RunConfig, plan: Plan) -> list[DaunceError]:
    closing = closing_of(config)
    if closing is None:
        return []
    if plan.last_day >= date.fromisoformat(closing.no_new_jobs_from):
        return [
            CapabilityError(
                f"{plan.provider} takes no new fine-tuning jobs from {closing.no_new_jobs_from} ({closing.source}), "
                f"and this run would go on until {plan.last_day}. Nothing was spent. Use another provider."
            )
        ]
    if closing.models_end is not None and plan.last_day >= date.fromisoformat(closing.models_end):
        return [
            CapabilityError(
                f"{plan.provider} shuts {plan.model} and its fine-tunes down on {closing.models_end} "
                f"({closing.source}), before this run would end ({plan.last_day}). Choose another model."
            )
        ]
    return []


def _budget_refusals(plan: Plan) -> list[DaunceError]:
    if plan.max_usd is None:
        return []
    if plan.usd is None:
        missing = " and ".join(
            name for name, usd in (("training", plan.training_usd), ("scoring", plan.scoring_usd)) if usd is None
        )
        return [
            BudgetError(
                f"budget.max_usd is set, but the price of {missing} is not known for {plan.model} at {plan.provider}. "
                "Nothing was sent. Set budget.price (US dollars per million tokens), or take max_usd out."
            )
        ]
    if plan.usd > plan.max_usd:
        return [
            BudgetError(
                f"the run would cost about ${plan.usd:,.2f} (training ${plan.training_usd:,.2f}, scoring "
                f"${plan.scoring_usd:,.2f}), more than budget.max_usd: ${plan.max_usd:,.2f}. Nothing was sent. Use "
                "fewer members, a smaller subset_ratio or fewer epochs, or raise budget.max_usd."
            )
        ]
    return []


def _dollars(usd: float | None, price: Price) -> str:
    if usd is None:
        return "price not known; set budget.price to see it"
    if usd == 0:
        return f"$0 ({price.source})"
    return f"${usd:,.2f} ({price.source})"


def _total(usd: float | None, cap: float | None) -> str:
    limit = "" if cap is None else f", at most ${cap:,.2f} (budget.max_usd)"
    return ("not known" if usd is None else f"${usd:,.2f}") + limit


def _time(hours: float | None, concurrent: int) -> str:
    at_once = f"{concurrent} job{'' if concurrent == 1 else 's'} at once"
    if hours is None:
        return f"not known ({at_once}); set backend.minutes_per_job to how long a job takes to see hours"
    return f"about {hours:.1f} hours of training ({at_once})"
