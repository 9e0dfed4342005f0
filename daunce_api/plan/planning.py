"""Making a plan: what is counted, what it costs, and what forbids it."""

from __future__ import annotations

import math
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
from .plan import Plan
from .prices import hosting_of, prices_of
from .refusals import budget_refusals, checkpoint_refusals, closing_refusals, trainer_refusals
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
    today: date | None = None,
) -> Plan:
    """Plan a run; nothing is sent, and no key is needed.

    ``encode`` gives the token ids of both data sets, where they are needed
    (:func:`~daunce_api.data.encoded.encode_dataset`).
    ``model_info``, where the provider was asked, adds its shutdown date to the reasons not to start. ``today``
    defaults to the present day in UTC. Raises DataError where examples cannot be encoded; all other reasons not to
    start are in ``Plan.refusals``.
    """
    today = today or datetime.now(UTC).date()
    counts = count(config, train, test, encode, trainer, scorer)
    refusals: list[DaunceError] = list(counts.refusals)
    notes: list[str] = [*trainer.notes, *scorer.notes]
    if not counts.exact:
        notes.append(
            "tiktoken's rank file is out of reach, so tokens are estimated from bytes (four a token), and whether "
            "completions are single tokens is not checked"
        )
    shape = config.ensemble
    ensemble: Ensemble | None = None
    try:
        ensemble = plan_ensemble(len(train), shape.members, shape.subset_ratio, shape.seed, trainer.min_examples)
    except ConfigurationError as error:
        refusals.append(error)
    refusals += trainer_refusals(config, trainer)
    if not trainer.honours_seed:
        notes.append(f"{trainer.provider} takes no seed: the same job twice gives two models")
    tokens: dict[int, int] = {}
    if shape.start_from == "target" and shape.target_model is None:
        epochs, assumed = epochs_of(config, len(train), target=True)
        tokens[TARGET] = epochs * sum(counts.training_N)
        notes += [f"target model: {assumed}"] if assumed else []
    subset = 0
    if ensemble is not None:
        subset = int(ensemble.inclusion_KN[0].sum())
        epochs, assumed = epochs_of(config, subset, target=False)
        notes += [assumed] if assumed else []
        refusals += checkpoint_refusals(config, trainer, None if assumed else epochs)
        tokens |= {k: epochs * sum(counts.training_N[i] for i in ensemble.subset(k)) for k in range(ensemble.members)}
    training_price, scoring_price = prices_of(config)
    jobs = shape.members + (TARGET in tokens)
    submitted = config.backend.max_concurrent_jobs or max(1, trainer.max_concurrent_jobs)
    concurrent = min(submitted, trainer.workers or submitted)
    hours = None
    minutes = config.backend.minutes_per_job
    seconds = trainer.seconds_per_job if minutes is None else 60 * minutes
    if seconds is not None:
        rounds = math.ceil(shape.members / concurrent) + (TARGET in tokens)
        hours = rounds * seconds / 3600
    plan = Plan(
        provider=trainer.provider,
        scorer=scorer.provider,
        model=config.backend.model,
        members=shape.members,
        jobs=jobs,
        n_train=len(train),
        n_test=len(test),
        subset=subset,
        training_tokens=tokens,
        scored_models=shape.members * shape.checkpoints + (config.scoring.target and shape.start_from == "target"),
        checkpoints=shape.checkpoints,
        scoring_input_tokens=counts.input,
        scoring_output_tokens=counts.output,
        training_price=training_price,
        scoring_price=scoring_price,
        price_factor=scorer.price_factor,
        hosting=hosting_of(config, scorer),
        max_usd=config.budget.max_usd,
        hours=hours,
        concurrent_jobs=concurrent,
        today=today,
        notes=tuple(dict.fromkeys(notes)),
    )
    refusals += [*closing_refusals(config, plan), *budget_refusals(plan)]
    if model_info is not None:
        try:
            plan.check_model(model_info)
        except CapabilityError as error:
            refusals.append(error)
    return replace(plan, refusals=tuple(refusals))
