"""``RunConfig``: everything a run depends on, as one pydantic model and one YAML file.

Unknown keys are refused with a suggestion. No secret has a place in it: ``backend.api_key_env`` names the environment
variable that holds the key.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .dataset import LossOn
from .errors import ConfigurationError

MAX_CONFIG_BYTES = 1_000_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(_Section):
    """Where the examples are. Relative paths are relative to the config file."""

    train: Path = Field(description="training examples: JSONL, chat or prompt/completion")
    test: Path = Field(description="the answers to explain: JSONL of the same kinds")
    loss_on: LossOn = Field("last", description="chat turns that carry the loss: the last assistant turn, or all")


class ScorerConfig(_Section):
    """Where log-probabilities are read, if that is another endpoint than the one that trains."""

    kind: str | None = Field(None, description="scorer; default: the backend's own")
    base_url: str | None = None
    api_key_env: str | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="options of this kind of scorer")


class BackendConfig(_Section):
    """Who fine-tunes and who scores."""

    kind: str = Field("embedded", description="embedded, openai, or another registered backend")
    model: str = Field("daunce-tiny", description="base model that is fine-tuned")
    base_url: str | None = Field(None, description="endpoint of an OpenAI-wire server; default: the provider's own")
    api_key_env: str | None = Field(None, description="environment variable that holds the API key")
    tokenizer: str | None = Field(None, description="tokenizer folder or tiktoken model; default: the model's own")
    max_concurrent_jobs: int | None = Field(None, ge=1, description="default: the provider's limit")
    options: dict[str, Any] = Field(default_factory=dict, description="options of this kind of backend")
    scorer: ScorerConfig = Field(default_factory=ScorerConfig)


class StopConfig(_Section):
    """Stop paying for members when more of them no longer help."""

    self_lds: float | None = Field(None, gt=0, lt=1, description="stop when self_lds reaches this value")
    plateau: float | None = Field(None, gt=0, lt=1, description="stop when the last round gained less than this")
    min_members: int = Field(10, ge=2)
    check_every: int = Field(5, ge=1, description="members between two looks")


class EnsembleConfig(_Section):
    members: int = Field(32, ge=2, le=100_000, description="K, the number of fine-tunes")
    subset_ratio: float = Field(0.5, gt=0, lt=1, description="share of the training set that each member sees")
    seed: int = Field(0, ge=0, lt=2**31, description="everything random follows from it")
    start_from: Literal["base", "target"] = Field("base", description="what members are fine-tuned from")
    target_model: str | None = Field(None, description="an existing fine-tune of the whole training set")
    stop: StopConfig | None = None

    @model_validator(mode="after")
    def _target_needs_start(self) -> EnsembleConfig:
        if self.target_model is not None and self.start_from != "target":
            raise ValueError("target_model is only used with start_from: target")
        return self


HyperparameterValue = Annotated[int | float | str, Field(union_mode="left_to_right")]


class TrainingConfig(_Section):
    """Hyperparameters by the provider's own names; those left out are the provider's defaults."""

    hyperparameters: dict[str, HyperparameterValue] = Field(default_factory=dict)
    target_hyperparameters: dict[str, HyperparameterValue] | None = Field(
        None, description="for the target fine-tune of start_from: target; default: the same"
    )
    max_attempts: int = Field(3, ge=1, le=10, description="jobs tried for one member before it is left out")
    min_members: int = Field(2, ge=2, description="the run goes on as long as this many members can still succeed")


class ScoringConfig(_Section):
    concurrency: int | None = Field(None, ge=1, description="requests at once; default: the endpoint's limit")
    noise_probe: int = Field(4, ge=0, description="examples scored twice for every member, to measure noise")
    target: bool = Field(False, description="also score the target model (start_from: target)")


class AttributionConfig(_Section):
    estimator: str = Field("auto", description="auto, covariance, correlation, inclusion, whitened, ...")
    loss: Literal["mean", "sum"] = Field("mean", description="per example: nats per completion token, or their sum")


class PriceConfig(_Section):
    """US dollars per million tokens."""

    training: float | None = Field(None, ge=0)
    input: float | None = Field(None, ge=0)
    output: float | None = Field(None, ge=0)


class BudgetConfig(_Section):
    max_usd: float | None = Field(None, ge=0, description="the run refuses to start or go on above this")
    price: PriceConfig | None = Field(None, description="overrides the price table")


class RunConfig(_Section):
    """One run. ``run_dir`` is where everything is kept."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$", description="short name; goes into job names"
    )
    run_dir: Path = Field(Path("runs/run"), description="folder of the run; relative to the config file")
    data: DataConfig
    backend: BackendConfig = Field(default_factory=BackendConfig)
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    attribution: AttributionConfig = Field(default_factory=AttributionConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a config file; relative paths in it become relative to its folder.

        Raises ConfigurationError that lists every problem with its key.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}. `daunce init` writes one.") from error
        if len(raw) > MAX_CONFIG_BYTES:
            raise ConfigurationError(f"{path} has {len(raw):,} bytes; a config file has at most {MAX_CONFIG_BYTES:,}.")
        try:
            content = yaml.load(raw, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ConfigurationError(f"{path} is not usable YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigurationError(f"{path} must hold a mapping (name:, data:, backend:, ...).")
        return cls.from_mapping(content, base=path.parent, where=str(path))

    @classmethod
    def from_mapping(cls, content: dict[str, Any], *, base: Path | None = None, where: str = "config") -> RunConfig:
        """From plain data; ``base`` is the folder that relative paths start from (default: the current one)."""
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            raise ConfigurationError("\n".join([f"{where} has problems:", *_explain(error)])) from error
        base = Path.cwd() if base is None else base
        return config.model_copy(
            update={
                "run_dir": (base / config.run_dir.expanduser()).resolve(),
                "data": config.data.model_copy(
                    update={k: (base / getattr(config.data, k).expanduser()).resolve() for k in ("train", "test")}
                ),
            }
        )


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines of them can expand to gigabytes) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.get_mark().line + 1
            raise ValueError(f"line {line}: aliases (*name) are not allowed in a config file")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        place = ".".join(str(p) for p in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            lines.append(f"  {place}: unknown key; {hint}")
        else:
            lines.append(f"  {place}: {problem['msg']}")
    return lines


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    section: Any = RunConfig
    for part in loc:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
