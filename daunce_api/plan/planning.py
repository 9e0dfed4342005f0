"""Making a plan: what is counted, what it costs, and what forbids it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime

from ..config import RunConfig
from ..data.dataset import Dataset
from ..data.subsets import Ensemble, plan_ensemble
from ..data.tokenizers import Encode
from ..errors import CapabilityError, ConfigurationError, DaunceError
from ..providers.base import ModelInfo, ScorerCapabilities, TrainerCapabilities
from ..store import TARGET
from .epochs import epochs_of
from .examples import loss_line, record_refusals
from .plan import Missing, Plan
from .prices import hosting_of, price_notes, prices_of
from .refusals import (
    budget_refusals,
    checkpoint_refusals,
    closing_refusals,
    subset_refusals,
    trainer_refusals,
)
from .tokens import count


def make_plan(
    config: RunConfig,
    train: Dataset,
    test: Dataset,
    encode: Encode,
    trainer: TrainerCapabilities,
    scorer: ScorerCapabilities,
    model_info: ModelInfo | None = None,
    *,
    design: Ensemble | None = None,
    questions_only: bool = False,
    today: date | None = None,
) -> Plan:
    """Plan a run from its beginning; nothing is sent, and no key is needed.

    ``encode`` gives the token ids of both data sets, where they are needed
    (:func:`~daunce_api.data.encoded.encode_dataset`). ``model_info``, where the provider was asked, adds its shutdown
    date to the reasons not to start. ``design``: the subsets, where they are not drawn from the config.
    ``questions_only``: models are not scored on the training examples. ``today`` defaults to the present day in UTC.
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
    seconds = None if minutes is None else 60 * minutes
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
        scored_models=members * shape.checkpoints + (config.scoring.target and shape.start_from == "target"),
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
        hours_per_job=None if seconds is None else seconds / 3600,
        concurrent_jobs=min(submitted, trainer.workers or submitted),
        today=today,
        n_scored=len(test) if questions_only else None,
        loss=loss,
        notes=tuple(dict.fromkeys(notes)),
        about_jobs=tuple(about_jobs),
        about_scoring=tuple(about_scoring),
    )
    if model_info is not None:
        try:
            plan.check_model(model_info)
        except CapabilityError as error:
            plan = replace(plan, about_jobs=(*plan.about_jobs, error))
    return plan_of_missing(config, plan, None)


def plan_of_missing(config: RunConfig, plan: Plan, missing: Missing | None) -> Plan:
    """The plan of what a run still has to do, with the reasons not to do that: a run that is trained is not refused for
    its trainer, and a finished one for nothing. ``None``: of the whole run."""
    plan = replace(plan, missing=missing, max_usd=config.budget.max_usd)
    refusals: list[DaunceError] = []
    if missing is None or not missing.nothing:
        refusals += plan.about_scoring
        if missing is None or missing.training:
            refusals += plan.about_jobs
        refusals += [*closing_refusals(config, plan), *budget_refusals(plan)]
    return replace(plan, refusals=tuple(refusals))
