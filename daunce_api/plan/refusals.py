"""Why a run may not start: what the trainer cannot do, what closes too soon, what costs too much."""

from __future__ import annotations

from datetime import date

from ..config import RunConfig, close_to
from ..errors import BudgetError, CapabilityError, ConfigurationError, DaunceError
from ..providers.base import TrainerCapabilities
from .plan import Plan
from .prices import closing_of


def trainer_refusals(config: RunConfig, trainer: TrainerCapabilities) -> list[DaunceError]:
    refusals: list[DaunceError] = []
    if config.ensemble.start_from == "target" and not trainer.starts_from_fine_tune:
        refusals.append(
            CapabilityError(
                f"{trainer.provider} cannot fine-tune a fine-tune, which start_from: target needs. Use start_from: "
                "base, or another backend."
            )
        )
    if config.ensemble.keep_days is not None and not trainer.models_expire:
        refusals.append(
            ConfigurationError(
                f"ensemble.keep_days: {trainer.provider} keeps models until they are deleted. Take it out, and delete "
                "them with `daunce clean` when no more questions will be asked."
            )
        )
    given = {**config.training.hyperparameters, **(config.training.target_hyperparameters or {})}
    known = trainer.hyperparameters
    switched = [name for name, value in given.items() if isinstance(value, bool) and known and name in known]
    refusals += [
        ConfigurationError(f"training.hyperparameters.{name}: {trainer.provider} takes a number, not true or false.")
        for name in switched
        if name not in trainer.switches
    ]
    for name in sorted(given.keys() - trainer.hyperparameters) if trainer.hyperparameters else ():
        hint = close_to(name, sorted(trainer.hyperparameters), "it knows {}.")
        refusals.append(
            ConfigurationError(
                f"training.hyperparameters.{name}: {trainer.provider} does not know it; {hint} Nothing was sent."
            )
        )
    return refusals


def checkpoint_refusals(config: RunConfig, trainer: TrainerCapabilities, epochs: int | None) -> list[DaunceError]:
    """Why the models that ``ensemble.checkpoints`` wants cannot be made. ``epochs`` of a member's job, where they are
    known: one model is kept after each."""
    asked, kept = config.ensemble.checkpoints, trainer.checkpoints
    if asked > kept:
        has = "one model" if kept == 1 else f"{kept} models"
        return [
            CapabilityError(
                f"ensemble.checkpoints is {asked}, but {trainer.provider} offers {has} of each job to score. Nothing "
                f"was sent. Set it to {kept}, or train where the models of earlier epochs are kept (embedded, "
                "openai, azure and openai_wire: the last 3; local and tinker: all)."
            )
        ]
    if epochs is not None and asked > epochs:
        return [
            ConfigurationError(
                f"ensemble.checkpoints is {asked}, but a job of {epochs} epoch{'' if epochs == 1 else 's'} makes only "
                f"{epochs} model{'' if epochs == 1 else 's'}: one after each. Nothing was sent. Set it to {epochs}, or "
                f"training.hyperparameters.n_epochs to {asked} or more."
            )
        ]
    return []


def subset_refusals(least: int, n_train: int, trainer: TrainerCapabilities) -> list[DaunceError]:
    """Why the smallest subset of a design (``least`` examples) cannot be trained on."""
    need = max(trainer.min_examples, 1)
    if least >= need:
        return []
    return [
        ConfigurationError(
            f"a job would have {least} of {n_train} training examples, fewer than the {need} that a fine-tune at "
            f"{trainer.provider} needs. Nothing was sent. Take out fewer, or add examples."
        )
    ]


def closing_refusals(config: RunConfig, plan: Plan) -> list[DaunceError]:
    closing = closing_of(config)
    if closing is None:
        return []
    if plan.submitted and plan.last_day >= date.fromisoformat(closing.no_new_jobs_from):
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


def budget_refusals(plan: Plan) -> list[DaunceError]:
    if plan.max_usd is None:
        return []
    if plan.usd is None:
        missing = " and ".join(
            name for name, usd in (("training", plan.training_usd), ("scoring", plan.scoring_usd)) if usd is None
        )
        wanted = "" if plan.hosting is None else f" {plan.scorer} is paid for by the hour: {plan.hosting.text}."
        return [
            BudgetError(
                f"budget.max_usd is set, but the price of {missing} is not known for {plan.model} at {plan.provider}."
                f"{wanted} Nothing was sent. Set budget.price (US dollars per million tokens), or take max_usd out."
            )
        ]
    if plan.usd + plan.spent_usd > plan.max_usd:
        before = ""
        if plan.spent_usd:
            before = f" after ${plan.spent_usd:,.2f} that are spent or reserved, together"
        return [
            BudgetError(
                f"the run would cost about ${plan.usd:,.2f} (training ${plan.training_usd:,.2f}, scoring "
                f"${plan.scoring_usd:,.2f}){before} more than budget.max_usd: ${plan.max_usd:,.2f}. Nothing was sent. "
                "Use fewer members, a smaller subset_ratio or fewer epochs, or raise budget.max_usd (`--max-usd` for "
                "one command)."
            )
        ]
    return []
