"""The sections of a config as dictionaries, for type checkers: a misspelled key of ``attribute(...)`` is found before
it runs. :class:`daunce_api.config.RunConfig` says what each key means."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypedDict

BackendName = Literal[
    "embedded", "openai", "openai_wire", "local", "together", "fireworks", "nebius", "tinker", "azure"
]  # a test compares it with the registry
Values = Mapping[str, int | float | str]


class DataSection(TypedDict, total=False):
    validation: Path | str | None
    columns: Mapping[str, str] | None
    loss_on: Literal["last", "all"]
    measure: Literal["last", "all"] | None
    questions: Literal["last", "all"] | None


class ScorerSection(TypedDict, total=False):
    kind: str | None
    base_url: str | None
    api_key_env: str | None
    options: Mapping[str, Any]


class BackendSection(TypedDict, total=False):
    template_date: date | str | None
    kind: BackendName
    model: str
    base_url: str | None
    api_key_env: str | None
    tokenizer: str | None
    max_concurrent_jobs: int | None
    minutes_per_job: float | None
    options: Mapping[str, Any]
    scorer: ScorerSection


class StopSection(TypedDict, total=False):
    self_lds: float | None
    surely: bool
    plateau: float | None
    min_members: int
    check_every: int


class EnsembleSection(TypedDict, total=False):
    members: int
    subset_ratio: float
    seed: int
    start_from: Literal["base", "target"]
    target_model: str | None
    checkpoints: int
    keep_days: int | None
    stop: StopSection | None


class TrainingSection(TypedDict, total=False):
    hyperparameters: Values
    target_hyperparameters: Values | None
    max_attempts: int
    min_members: int


class ScoringSection(TypedDict, total=False):
    concurrency: int | None
    noise_probe: int
    target: bool
    cache: bool


class AttributionSection(TypedDict, total=False):
    estimator: str
    loss: Literal["mean", "sum", "margin"]
    prior: Literal["auto", "none", "text", "gradient"]
    prior_model: str | None


class PriceSection(TypedDict, total=False):
    training: float | None
    input: float | None
    output: float | None
    hosting: float | None


class BudgetSection(TypedDict, total=False):
    max_usd: float | None
    price: PriceSection | None
    hosting_hours: float | None


class Sections(TypedDict, total=False):
    """Sections of a config besides ``run_dir`` and ``backend``, which ``attribute`` has arguments for."""

    name: str
    data: DataSection
    ensemble: EnsembleSection
    training: TrainingSection
    scoring: ScoringSection
    attribution: AttributionSection
    budget: BudgetSection


__all__ = ["BackendName", "BackendSection", "Sections"]
