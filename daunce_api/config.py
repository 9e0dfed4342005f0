"""``RunConfig``: everything a run depends on, as one pydantic model and one YAML file.

Unknown keys are refused with a suggestion. No secret has a place in it: ``backend.api_key_env`` names the environment
variable that holds the key.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ._util.secrets import address_problem, looks_like_key, secret_part
from ._util.yaml import read_yaml
from .data.dataset import LossOn
from .data.dialects import COLUMNS
from .errors import ConfigurationError

VERSION = 2
"""Version of the config's keys, kept in the manifest of a run. 1: the runs of daunce-api 0.1."""

_EARLIER_DEFAULTS: dict[int, dict[str, Any]] = {
    2: {"data.loss_on": "last", "data.questions": None, "attribution.prior": "none"}
}
"""What a key that is left out meant before the default changed, by the version that changed it: a run of an earlier
version keeps the recipe that it was started with."""

_RETIRED = {
    "backend.options.job_events": "progress comes from the job itself",
    "backend.options.ray.retries": "the members of a lost actor are trained again",
    "backend.options.model_name": "the embedded server names its model itself",
    **dict.fromkeys(
        [f"backend.options.max_{what}" for what in ("file_bytes", "body_bytes", "prompts", "prompt_tokens", "queue")],
        "it is a constant of the embedded server",
    ),
    "backend.scorer.options.leading_tokens": "serve a tokenizer that adds none, or name it in backend.tokenizer",
    "backend.scorer.options.route": "echo is backend.scorer.kind: echo, and vLLM is always sent token ids",
    "backend.scorer.options.return_tokens_as_token_ids": "return_token_ids: true does the same",
}
"""Keys that this version no longer has, options of providers among them, with what takes their place."""
_RETIRED_VALUES = {
    "attribution.estimator: matched": "this version does not have it; scores are those of auto",
}
"""The same of values."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1."""
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must be a number, not true or false")
        return value

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_default(cls, content: Any) -> Any:
        """A section whose lines are all commented out reads as null; it means its defaults."""
        if not isinstance(content, dict):
            return content
        plain_sections = {k for k, f in cls.model_fields.items() if isinstance(f.annotation, type(BaseModel))}
        return {k: v for k, v in content.items() if v is not None or k not in plain_sections}


def _is_number(annotation: Any) -> bool:
    parts = {annotation, *getattr(annotation, "__args__", ())}
    return bool(parts & {int, float}) and bool not in parts


def _address(value: str, info: ValidationInfo) -> str:
    if not (info.context or {}).get("kept") and (problem := address_problem(value)):
        raise ValueError(problem)
    return value


def _variable_name(value: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", value):
        raise ValueError("must be the name of an environment variable (A-Z, 0-9, _), never the key itself")
    return value


def _json_data(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("holds something other than texts, numbers, true/false, lists and mappings") from error
    return value


def _hyperparameter(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("must be a finite number, true, false or a text")
    return value


def _column(value: str) -> str:
    if value not in COLUMNS:
        raise ValueError(f"must be one of {', '.join(COLUMNS)}")
    return value


Address = Annotated[str, AfterValidator(_address)]
Column = Annotated[str, AfterValidator(_column)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
OptionValues = Annotated[dict[str, Any], AfterValidator(_json_data)]
HyperparameterValue = Annotated[bool | int | float | str, BeforeValidator(_hyperparameter)]


class DataConfig(_Section):
    """Where the examples are. Relative paths are relative to the config file."""

    train: Path
    """training examples: JSONL, JSON, CSV, Parquet, ... in any common dialect"""
    test: Path
    """the answers to explain: a file of the same kinds"""
    validation: Path | None = None
    """validation file that each job is given; it is never attributed (OpenAI, Azure, Together)"""
    columns: dict[Column, str] | None = None
    """names of the file's own columns, such as {user: question, assistant: answer}; default: recognized"""
    loss_on: LossOn = "all"
    """assistant turns that are trained on: all, as providers do, or the last"""
    measure: LossOn | None = None
    """turns of training examples that are scored (last or all); default: those trained on"""
    questions: LossOn | None = "last"
    """turns of the test file that are explained (last or all)"""

    def measured(self, *, one_turn: bool = False) -> LossOn:
        """The turns of training examples that are scored; ``one_turn``: the scorer can measure one turn only."""
        return self.measure or ("last" if one_turn else self.loss_on)

    @property
    def asked(self) -> LossOn:
        """The turns of questions that are scored."""
        return self.questions or self.loss_on


class ScorerConfig(_Section):
    """Where log-probabilities are read, if that is another endpoint than the one that trains."""

    kind: str | None = None
    """scorer; default: the backend's own"""
    base_url: Address | None = None
    """its endpoint; default: the backend's"""
    api_key_env: VariableName | None = None
    """environment variable that holds its API key; default: the backend's"""
    options: OptionValues = Field(default_factory=dict)
    """options of this kind of scorer"""


class BackendConfig(_Section):
    """Who fine-tunes and who scores."""

    kind: str = "embedded"
    """embedded, local, openai, azure, together, fireworks, tinker, nebius, or openai_wire (any server)"""
    model: str = "daunce-tiny"
    """base model that is fine-tuned"""
    base_url: Address | None = None
    """endpoint of an OpenAI-wire server; default: the provider's own"""
    api_key_env: VariableName | None = None
    """environment variable that holds the API key; default: the provider's usual one"""
    tokenizer: str | None = None
    """tokenizer folder or tiktoken model; default: the model's own"""
    template_date: date | None = None
    """date that the chat template writes; default: the template's own, or 2026-01-01"""
    max_concurrent_jobs: int | None = Field(None, ge=1)
    """fine-tuning jobs at once; default: the provider's limit"""
    minutes_per_job: float | None = Field(None, gt=0)
    """how long a job takes, for the plan's hours; default: not known"""
    options: OptionValues = Field(default_factory=dict)
    """options of this kind of backend"""
    scorer: ScorerConfig = Field(default_factory=ScorerConfig)
    """who scores, if it is somebody else"""


class StopConfig(_Section):
    """Stop paying for members when more of them no longer help."""

    self_lds: float | None = Field(None, gt=0, lt=1)
    """stop when self_lds reaches this value"""
    surely: bool = False
    """self_lds counts as reached when the lower end of its 95 % interval is"""
    plateau: float | None = Field(None, gt=0, lt=1)
    """stop when half as many members again are expected to gain less self_lds than this, and the last check_every
    gained less too"""
    min_members: int = Field(10, ge=2)
    """members that are trained in any case"""
    check_every: int = Field(5, ge=1)
    """members between two looks"""

    @model_validator(mode="after")
    def _fits_together(self) -> StopConfig:
        if self.surely and self.self_lds is None:
            raise ValueError("surely is about self_lds, which is not given")
        return self


class EnsembleConfig(_Section):
    """Which members there are. Growing ``members`` later keeps those that were trained."""

    members: int = Field(32, ge=2, le=100_000)
    """K, the number of fine-tunes"""
    subset_ratio: float = Field(0.5, gt=0, lt=1)
    """share of the training set that each member sees"""
    seed: int = Field(0, ge=0, lt=2**31)
    """everything random follows from it"""
    start_from: Literal["base", "target"] = "base"
    """what members are fine-tuned from"""
    target_model: str | None = None
    """an existing fine-tune of the whole training set"""
    checkpoints: int = Field(1, ge=1, le=100)
    """models of each job that are scored: the final one and those of the epochs before it; scoring costs that many
    times as much, training nothing more"""
    keep_days: int | None = Field(None, ge=1, le=3650)
    """days after which the provider deletes the models by itself (tinker); default: `daunce clean` does"""
    stop: StopConfig | None = None
    """stop before K members; default: never"""

    @model_validator(mode="after")
    def _fits_together(self) -> EnsembleConfig:
        if self.target_model is not None and self.start_from != "target":
            raise ValueError("target_model is only used with start_from: target")
        if self.stop is not None and self.stop.min_members > self.members:
            raise ValueError(f"stop.min_members is {self.stop.min_members}, but there are {self.members} members")
        return self


class TrainingConfig(_Section):
    """The fine-tuning jobs."""

    hyperparameters: dict[str, HyperparameterValue] = Field(default_factory=dict)
    """by the provider's own names; those left out are the provider's defaults"""
    target_hyperparameters: dict[str, HyperparameterValue] | None = None
    """for the target, also as `evaluate` and `fix` train it again; default: the same as for members"""
    max_attempts: int = Field(3, ge=1, le=10)
    """jobs tried for one member before it is left out"""
    min_members: int = Field(2, ge=2)
    """the run continues as long as this many members can still succeed"""

    @property
    def of_target(self) -> dict[str, HyperparameterValue]:
        """Hyperparameters of the target fine-tune."""
        return self.hyperparameters if self.target_hyperparameters is None else self.target_hyperparameters


class ScoringConfig(_Section):
    """The requests for log-probabilities."""

    concurrency: int | None = Field(None, ge=1)
    """requests at once; default: the endpoint's limit"""
    noise_probe: int = Field(4, ge=0)
    """examples scored twice for every member, to measure noise"""
    target: bool = False
    """also score the target model (start_from: target)"""
    cache: bool = True
    """reuse what any run of yours paid a remote endpoint for before"""


class AttributionConfig(_Section):
    """How losses become scores; may be changed after the run."""

    estimator: str = "auto"
    """auto, covariance, correlation, inclusion, whitened or half_whitened"""
    loss: Literal["mean", "sum", "margin"] = "mean"
    """per example: nats per completion token, their sum, or minus the mean log-odds"""
    prior: Literal["auto", "none", "text", "gradient"] = "auto"
    """added to scores of few members, as far as the members bear it out: text similarity, or that of the base model's
    gradients (needs prior_model); auto uses what is available"""
    prior_model: str | None = None
    """folder with the base model's weights and tokenizer, for prior: gradient (extra: local)"""

    @field_validator("estimator")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name != "auto":  # found out now, not when everything has been trained and scored
            from .core.estimators import estimator_named

            estimator_named(name)
        return name


class PriceConfig(_Section):
    """US dollars per million tokens."""

    training: float | None = Field(None, ge=0)
    """trained tokens; default: the price table"""
    input: float | None = Field(None, ge=0)
    """prompt tokens of the fine-tuned model"""
    output: float | None = Field(None, ge=0)
    """generated tokens of the fine-tuned model"""
    hosting: float | None = Field(None, ge=0)
    """US dollars per hour of the endpoint, all its GPUs together"""


class BudgetConfig(_Section):
    """What the run may cost."""

    max_usd: float | None = Field(None, ge=0)
    """the run does not start or continue above this"""
    price: PriceConfig | None = None
    """overrides the price table"""
    hosting_hours: float | None = Field(None, gt=0)
    """how long the endpoint that scores is paid for, where that goes by the hour"""


class RunConfig(_Section):
    """One run, as ``daunce init`` writes it with every key explained. ``run_dir`` is where everything is kept.

    Example::

        config = RunConfig.from_yaml("run.yaml")
        config.ensemble.members
    """

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")
    """short name; goes into job names"""
    run_dir: Path = Field(default_factory=lambda data: Path("runs", data.get("name", "run")))
    """folder of the run, relative to this file; default: runs/NAME"""
    data: DataConfig
    """where the examples are; relative paths start from this file"""
    backend: BackendConfig = Field(default_factory=BackendConfig)
    """who fine-tunes and who scores"""
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
    """which members there are"""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """the fine-tuning jobs"""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    """the requests for log-probabilities"""
    attribution: AttributionConfig = Field(default_factory=AttributionConfig)
    """how losses become scores; may be changed after the run"""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """what the run may cost"""

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.training.min_members > self.ensemble.members:
            raise ValueError(
                f"training.min_members is {self.training.min_members}, but there are {self.ensemble.members} members"
            )
        if self.scoring.target and self.ensemble.start_from != "target":
            raise ValueError("scoring.target needs ensemble.start_from: target")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a config file; relative paths in it become relative to its folder.

        Raises ConfigurationError that lists every problem with its key.
        """
        path = Path(path)
        return cls.from_mapping(read_yaml(path), base=path.parent, where=str(path))

    @classmethod
    def from_mapping(cls, content: dict[str, Any], *, base: Path | None = None, where: str = "config") -> RunConfig:
        """From plain data; ``base`` is the folder that relative paths start from (default: the current one).

        Raises ConfigurationError that lists every problem with its key, and repeats no value: it may be a secret.
        """
        if secrets := list(_misplaced_secrets(content, "")):
            raise ConfigurationError("\n".join([f"{where} has problems:", *secrets]))
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            raise ConfigurationError("\n".join([f"{where} has problems:", *_explain(error)])) from error
        base = Path.cwd() if base is None else base
        try:
            given = {k: getattr(config.data, k) for k in ("train", "test", "validation")}
            data = {k: (base / path.expanduser()).resolve() for k, path in given.items() if path is not None}
            run_dir = (base / config.run_dir.expanduser()).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links, the home of nobody
            raise ConfigurationError(f"{where}: a path cannot be used: {error}") from error
        return config.model_copy(update={"run_dir": run_dir, "data": config.data.model_copy(update=data)})

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> tuple[RunConfig, tuple[str, ...]]:
        """The config in the manifest of a run of this version or an earlier one, and what of it is gone, in sentences.

        Keys that this version does not have are left out; keys that came later have the value that they had for that
        run. Raises ConfigurationError where what remains cannot be used.
        """
        content, gone = _known_keys(cls, manifest["config"], "")
        version = int(manifest.get("version", 1))
        content = _with_earlier_defaults(content, version)
        try:
            return cls.model_validate(content, context={"kept": True}), tuple(gone)
        except ValidationError as error:
            raise ConfigurationError("\n".join(["the config in the run folder:", *_explain(error)])) from error

    def as_started(self, version: int) -> RunConfig:
        """This config for a run that was started by an earlier version: keys that are left out have the defaults of
        that version."""
        content = self.model_dump(exclude_unset=True)
        return type(self).model_validate(_with_earlier_defaults(content, version), context={"kept": True})


def earlier_default(path: str) -> Any:
    """What a key meant in runs of a version that did not have it."""
    return next((values[path] for values in _EARLIER_DEFAULTS.values() if path in values), None)


def _with_earlier_defaults(content: dict[str, Any], version: int) -> dict[str, Any]:
    content = deepcopy(content)
    for changed_in in sorted(v for v in _EARLIER_DEFAULTS if v > version):
        for path, value in _EARLIER_DEFAULTS[changed_in].items():
            *sections, key = path.split(".")
            section = content
            for name in sections:
                section = section.setdefault(name, {})
            section.setdefault(key, value)
    return content


def _known_keys(
    section: type[BaseModel] | None, content: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], list[str]]:
    """The keys of a section that this version has, and a sentence for each of the others; of a section of free keys
    (None: options, hyperparameters), those that are not retired."""
    known: dict[str, Any] = {}
    gone: list[str] = []
    for key, value in content.items():
        place = f"{path}{key}"
        if place in _RETIRED or (section is not None and key not in section.model_fields):
            instead = _RETIRED.get(place, "this version does not know it")
            gone.append(f"{place}: {instead}; the run was started with it")
            continue
        if (retired := f"{place}: {value}") in _RETIRED_VALUES:
            gone.append(f"{retired}: {_RETIRED_VALUES[retired]}")
            continue
        if isinstance(value, Mapping):
            inner = None if section is None else section_of(section.model_fields[key].annotation)
            known[key], more = _known_keys(inner, value, f"{place}.")
            gone += more
        else:
            known[key] = value
    return known, gone


def _misplaced_secrets(value: Any, place: str, depth: int = 0) -> Iterator[str]:
    """A line for every key, value and address of a config that holds a secret, without repeating it."""
    if isinstance(value, str):
        if looks_like_key(value):
            yield (
                f"  {place}: looks like an API key, and a config holds none. Put it into an environment variable and "
                "name that with backend.api_key_env"
            )
        elif "://" in value and ".options" in place and (part := secret_part(value)):
            yield f"  {place}: an address that carries {part}; it would be stored with the run"
    elif depth < _DEEPEST and isinstance(value, Mapping):
        for key, inner in value.items():
            name = str(key)
            if looks_like_key(name):
                yield f"  {place or '(top level)'}: the name of a key looks like an API key; it is not repeated here"
            else:
                yield from _misplaced_secrets(inner, f"{place}.{name}" if place else name, depth + 1)
    elif depth < _DEEPEST and isinstance(value, list | tuple):
        for inner in value:
            yield from _misplaced_secrets(inner, place, depth + 1)


_DEEPEST = 50
"""Levels of a config that are looked at; options that are nested more deeply are refused."""


def _explain(error: ValidationError) -> list[str]:
    """One line a problem, with its key. Values are left out: one of them may be a key in the wrong place."""
    lines = []
    for problem in error.errors():
        if problem["type"] == "default_factory_not_called":  # follows from another problem
            continue
        place = ".".join(str(p) for p in problem["loc"]) or "(top level)"
        if problem["type"] == "extra_forbidden":
            section, name = problem["loc"][:-1], str(problem["loc"][-1])
            hint = _RETIRED.get(place) or close_to(name, _fields_at(section))
            if not re.fullmatch(r"[A-Za-z_]{1,40}", name):  # not a name of ours, and perhaps a secret
                place = ".".join([*map(str, section), "(a key that is not shown)"])
            lines.append(f"  {place}: unknown key; {hint}")
        else:
            lines.append(f"  {place}: {problem['msg'].removeprefix('Value error, ')}")
    return lines


def close_to(name: str, known: Collection[str], otherwise: str = "known keys: {}") -> str:
    """What an unknown name may stand for."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise.format(", ".join(known))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's annotation (``StopConfig | None``) stands for, or None for a plain value."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in loc:
        section = section_of(section.model_fields[str(part)].annotation) or section
    return list(section.model_fields)
