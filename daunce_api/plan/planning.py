"""Making a plan: what is counted, what it costs, and what forbids it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime

from .._util.text import dollars
from ..config import RunConfig, close_to
from ..data.dataset import Dataset
from ..data.subsets import Ensemble, plan_ensemble
from ..data.tokenizers import Encode
from ..errors import BudgetError, CapabilityError, ConfigurationError, DaunceError
from ..providers.base import ScorerCapabilities, TrainerCapabilities
from ..store import TARGET
from .examples import loss_line, record_refusals
from .plan import Missing, Plan
from .prices import closing_of, hosting_of, price_notes, prices_of
from .tokens import count, epochs_of


def make_plan(
    config: RunConfig,
    train: Dataset,
    test: Dataset,
    encode: Encode,
    trainer: TrainerCapabilities,
    scorer: ScorerCapabilities,
    *,
    design: Ensemble | None = None,
    questions_only: bool = False,
    today: date | None = None,
) -> Plan:
    """Plan a run from its beginning; nothing is sent, and no key is needed.

    ``encode`` gives the token ids of both data sets, where they are needed
    (:func:`~daunce_api.data.encoded.encode_dataset`). ``design``: the subsets, where they are not drawn from the
    config. ``questions_only``: models are not scored on the training examples. ``today`` defaults to the present day
    in UTC.
    Raises DataError where examples cannot be encoded; all other reasons not to start are in ``Plan.refusals``.
    """
    today = today or datetime.now(UTC).date()
    counts = count(config, train, test, encode, trainer, scorer, questions_only=questions_only)
    about_scoring: list[DaunceError] = list(counts.refusals)
    about_jobs: list[DaunceError] = list(counts.about_jobs)
    notes: list[str] = [*trainer.notes, *scorer.notes, *counts.notes]
    jobs_refused, scoring_refused, more = record_refusals(config, train, test, trainer, scorer)
    about_jobs += jobs_refused
    about_scoring = [*scoring_refused, *about_scoring]
    loss, unlike_others = loss_line(config, train, scorer)
    notes += [*more, *([unlike_others] if unlike_others else [])]
    if not counts.exact:
        notes.append(
            "tiktoken's rank file is out of reach, so tokens are estimated from bytes (four a token), and answers are "
            "judged to be single tokens by their bytes"
        )
    if scorer.refusal is not None:
        about_scoring.append(CapabilityError(scorer.refusal))
    shape = config.ensemble
    ensemble = design
    if ensemble is None:
        try:
            ensemble = plan_ensemble(len(train), shape.members, shape.subset_ratio, shape.seed, trainer.min_examples)
        except ConfigurationError as error:
            about_scoring.append(error)
    about_jobs += trainer_refusals(config, trainer)
    if not trainer.honours_seed:
        notes.append(f"{trainer.provider} takes no seed: the same job twice gives two models")
    tokens: dict[int, int] = {}
    if shape.start_from == "target" and shape.target_model is None:
        epochs, assumed = epochs_of(config, len(train), target=True)
        tokens[TARGET] = epochs * sum(counts.training_N)
        notes += [f"target model: {assumed}"] if assumed else []
    members, subset, least = shape.members, 0, 0
    if ensemble is not None:
        members = ensemble.members
        sizes_K = ensemble.inclusion_KN.sum(axis=1)
        subset, least = int(sizes_K.max()), int(sizes_K.min())
        epochs, assumed = epochs_of(config, subset, target=False)
        notes += [assumed] if assumed else []
        about_jobs += checkpoint_refusals(config, trainer, None if assumed else epochs)
        about_jobs += subset_refusals(least, len(train), trainer)
        for k in range(members):
            chosen = ensemble.subset(k)
            epochs, _ = epochs_of(config, len(chosen), target=False)
            tokens[k] = epochs * sum(counts.training_N[i] for i in chosen)
    training_price, scoring_price = prices_of(config)
    submitted = config.backend.max_concurrent_jobs or max(1, trainer.max_concurrent_jobs)
    minutes = config.backend.minutes_per_job
    models = members * shape.checkpoints + (config.scoring.target and shape.start_from == "target")
    everyone = frozenset(range(members)) | tokens.keys()
    hosting = hosting_of(config, scorer)
    notes += price_notes(config, today, training_price, scoring_price, hosting)
    plan = Plan(
        provider=trainer.provider,
        scorer=scorer.provider,
        model=config.backend.model,
        members=members,
        n_train=len(train),
        n_test=len(test),
        subset=subset,
        smallest_subset=least,
        training_tokens=tokens,
        scored_models=models,
        missing=Missing(everyone, everyone, models, members),
        checkpoints=shape.checkpoints,
        scoring_input_tokens=counts.input,
        scoring_output_tokens=counts.output,
        again_tokens=counts.again,
        test_tokens=counts.test,
        training_price=training_price,
        scoring_price=scoring_price,
        price_factor=scorer.price_factor,
        hosting=hosting,
        max_usd=config.budget.max_usd,
        hours_per_job=None if minutes is None else minutes / 60,
        concurrent_jobs=min(submitted, trainer.workers or submitted),
        today=today,
        n_scored=len(test) if questions_only else None,
        loss=loss,
        notes=tuple(dict.fromkeys(notes)),
        about_jobs=tuple(about_jobs),
        about_scoring=tuple(about_scoring),
    )
    return plan_of_missing(config, plan)


def plan_of_missing(config: RunConfig, plan: Plan, missing: Missing | None = None) -> Plan:
    """The plan of what a run still has to do (default: everything), with the reasons not to do that: a run that is
    trained is not refused for its trainer, and a finished one for nothing."""
    missing = plan.missing if missing is None else missing
    plan = replace(plan, missing=missing, max_usd=config.budget.max_usd)
    refusals: list[DaunceError] = []
    if not missing.nothing:
        refusals += plan.about_scoring
        if missing.training:
            refusals += plan.about_jobs
        refusals += [*closing_refusals(config, plan), *budget_refusals(plan)]
    return replace(plan, refusals=tuple(refusals))


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
    no_new_jobs, models_end = closing["no_new_jobs_from"], closing["models_end"]
    source = f"{closing['source']}, {closing['as_of']}"
    if plan.submitted and plan.last_day >= date.fromisoformat(no_new_jobs):
        return [
            CapabilityError(
                f"{plan.provider} takes no new fine-tuning jobs from {no_new_jobs} ({source}), "
                f"and this run would go on until {plan.last_day}. Nothing was spent. Use another provider."
            )
        ]
    if models_end is not None and plan.last_day >= date.fromisoformat(models_end):
        return [
            CapabilityError(
                f"{plan.provider} shuts {plan.model} and its fine-tunes down on {models_end} "
                f"({source}), before this run would end ({plan.last_day}). Choose another model."
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
            before = f" after {dollars(plan.spent_usd)} that are spent or reserved, together"
        return [
            BudgetError(
                f"the run would cost about {dollars(plan.usd)} (training {dollars(plan.training_usd)}, scoring "
                f"{dollars(plan.scoring_usd)}){before} more than budget.max_usd: {dollars(plan.max_usd)}. Nothing was "
                "sent. Use fewer members, a smaller subset_ratio or fewer epochs, or raise budget.max_usd "
                "(`--max-usd` for one command)."
            )
        ]
    return []
