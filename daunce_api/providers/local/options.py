"""Options of ``kind: local``, the recipes that members are trained by, and how hyperparameters become a recipe.

Imports no PyTorch: a plan reads it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from ...config import RunConfig
from ...errors import ConfigurationError, RejectedError
from ..options import Options, parse_options

_MULTIPLIER = "learning_rate_multiplier"
_LORA = ("rank", "alpha", "dropout", "targets")
FRESH = "fresh"
"""``backend.model`` of a task: every fine-tune of the base starts from weights of its own seed."""
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Settings:
    """How a member is trained. Raises pydantic's ValidationError that names every value that is out of range."""

    n_epochs: PositiveInt = 3
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-3
    members_at_a_time: ClassVar[int] = 8
    """Members of a group, where the options do not say. What a run gains from larger groups, against later results:
    tests/benchmarks/RESULTS-local.md."""


@dataclass(frozen=True)
class Recipe(Settings):
    """AdamW without weight decay, linear warm-up, cosine to zero. ``warmup_ratio`` is the share of all optimiser
    steps. The model runs in evaluation mode: its own dropout is off, so that a loss is the one that scoring gives."""

    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03

    def rate(self, step: int, total: int) -> float:
        """Rate of optimizer step ``step`` (from 0): linear from above 0 over the warm-up, then a cosine to 0."""
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass(frozen=True)
class LoraSettings(Recipe):
    """LoRA (Hu et al., 2021): the update added to a layer is (alpha / rank) B A x.

    ``targets`` are read as PEFT reads ``target_modules``: names (the last part, or the whole path; in a text with
    commas between them), one regular expression for the whole path, or ``all-linear``; None takes PEFT's table for the
    architecture and, for architectures that are not in it, every linear layer but the output head. Only the text part
    of a vision-language model gets adapters.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Share = 0.0
    targets: tuple[str, ...] | str | None = None

    @field_validator("targets")
    @classmethod
    def _names(cls, given: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if not isinstance(given, str) or given == "all-linear" or re.search(r"[\\^$*+?()|\[\]{}]", given):
            return given
        return tuple(t.strip() for t in given.split(",") if t.strip())


@dataclass(frozen=True)
class FullSettings(Recipe):
    """Every weight of the model is trained."""

    learning_rate: PositiveFloat = 5e-5
    members_at_a_time: ClassVar[int] = 1


@dataclass(frozen=True)
class ClassifierSettings(Settings):
    """Of a classifier: SGD (with momentum) or AdamW. ``schedule`` lowers the rate to 0 over all steps, or keeps it."""

    n_epochs: PositiveInt = 1
    batch_size: PositiveInt = 25
    learning_rate: PositiveFloat = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Share = 0.0
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    members_at_a_time: ClassVar[int] = 32

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step (from 0), at the middle of its share of the schedule."""
        t = (step + 0.5) / total
        factor = {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[self.schedule]
        return self.learning_rate * factor


SettingsT = TypeVar("SettingsT", bound=Settings)


def hyperparameters_of(kind: type[Settings]) -> dict[str, str]:
    """Names of a job's hyperparameters, each with the field that it sets."""
    names = {f"lora_{name}" if name in _LORA else name: name for name in kind.__dataclass_fields__}
    return names if kind is ClassifierSettings else {**names, _MULTIPLIER: "learning_rate"}


def settings_of(hyperparameters: Mapping[str, Any], kind: type[SettingsT]) -> SettingsT:
    """Training settings of a job's hyperparameters; ``auto`` and those left out are the defaults, and
    ``learning_rate_multiplier`` multiplies the default rate (LoRA: 1e-3, full: 5e-5).

    Raises RejectedError for an unknown name or a value out of range.
    """
    given = {k: v for k, v in hyperparameters.items() if v != "auto"}
    fields = hyperparameters_of(kind)
    if unknown := sorted(given.keys() - fields.keys()):
        raise RejectedError(f"hyperparameter {unknown[0]!r} is not known here; known: {', '.join(sorted(fields))}")
    if _MULTIPLIER in given and "learning_rate" in given:
        raise RejectedError("give learning_rate or learning_rate_multiplier, not both")
    try:
        if _MULTIPLIER in given:
            given[_MULTIPLIER] = float(given[_MULTIPLIER]) * kind().learning_rate
        return kind(**{fields[name]: value for name, value in given.items()})
    except (ValueError, TypeError) as error:
        wrong = f"{_MULTIPLIER}: {error}"
        if isinstance(error, ValidationError):
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RejectedError(f"hyperparameters cannot be used: {wrong}") from error


_LANGUAGE_ONLY = {"dtype", "device_map", "quantisation", "gradient_checkpointing", "fine_tuning", "tokens_per_pass"}


class RayOptions(Options):
    """The cluster of ``engine: ray``; each actor holds the model for the whole run."""

    address: str | None = Field(None, description="auto, or a cluster's address; default: one on this machine")
    cpus: float = Field(1.0, gt=0, description="CPUs of an actor")
    gpus: float | None = Field(None, ge=0, description="GPUs of an actor; default: one where device is cuda, else none")


class LocalOptions(Options):
    """``backend.options`` of ``kind: local``."""

    device: str = Field("cpu", description="cpu, cuda (all GPUs, one worker each), or one GPU: cuda:1")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = Field(
        None, description="of the frozen model; default: float32 on the CPU, bfloat16 on a GPU"
    )
    device_map: str | None = Field(None, description="auto: spread a model that is larger than one GPU over several")
    quantisation: Literal["8bit", "4bit"] | None = Field(None, description="frozen weights through bitsandbytes")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more computing")
    threads: int = Field(1, ge=1, description="torch threads of a worker on the CPU")
    fine_tuning: Literal["lora", "full"] = Field(
        "lora", description="lora, or full: all weights of the model are trained"
    )
    objective: Literal["subset", "influence", "fisher"] = Field("subset", description="what members minimise")
    rho: float | None = Field(None, ge=0, description="noise of the perturbed objectives; default: 10, a task's 1")
    gamma: float = Field(1.0, gt=0, description="weight of their loss term")
    task: str | None = Field(
        None, description="a classifier instead of a language model: file.py:name or module:name; ITS CODE IS RUN"
    )
    inputs: str | None = Field(None, description="of a task: .npz (array x) or .npy; a record's prompt is a row number")
    engine: Literal["processes", "thread", "ray"] = Field("processes", description="where members are trained")
    workers: int | None = Field(None, ge=1, description="processes, or actors of Ray; default: one a core, one a GPU")
    members_at_a_time: int | None = Field(
        None,
        ge=1,
        description="members of one group, whose results arrive together; default: 8 adapters, 32 classifiers or one "
        "full fine-tune, fewer where workers would have none. Memory decides how many of them are trained side by side",
    )
    memory_limit_gib: float | None = Field(
        None, gt=0, description="of a worker, beside the model; default: half of what is free"
    )
    tokens_per_pass: int | None = Field(
        None,
        ge=16,
        description="most padded tokens in a pass; default: 16,384 on a GPU, on a CPU 1,024 or what 1 GiB holds",
    )
    ray: RayOptions = Field(default_factory=RayOptions)

    @field_validator("device")
    @classmethod
    def _supported(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"{device} is not supported (mps, xpu and others are untested); use cpu, cuda or cuda:1")
        return device

    @property
    def worker_count(self) -> int:
        """Worker processes of this machine."""
        if self.engine == "thread":
            return 1
        if self.workers is not None:
            return self.workers
        if self.device == "cpu":
            return max(1, usable_cores() // self.threads)
        return max(1, visible_gpus()) if self.device == "cuda" else 1

    @property
    def memory_limit(self) -> int | None:
        """In bytes."""
        return None if self.memory_limit_gib is None else int(self.memory_limit_gib * 2**30)

    @property
    def precision(self) -> str:
        """Of the frozen model."""
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")

    @property
    def settings(self) -> type[LoraSettings | FullSettings | ClassifierSettings]:
        """How members are trained."""
        if self.task:
            return ClassifierSettings
        return FullSettings if self.fine_tuning == "full" else LoraSettings

    def spec(self, config: RunConfig) -> Spec:
        """What a worker holds: the model, or the classifier, whose files are looked up from the folder of the training
        data."""
        backend, folder = config.backend, config.data.train.parent
        if not self.task:
            own = backend.kind == "local"  # otherwise the tokenizer belongs to whoever trains
            return ModelSpec(backend.model, self, backend.tokenizer if own else None)
        inputs = None if self.inputs is None else str(folder / self.inputs)
        start = None if backend.model == FRESH else str(folder / backend.model)
        return TaskSpec(self.task, str(folder), inputs, start, self)


@dataclass(frozen=True)
class ModelSpec:
    """A language model and how a worker holds it; equal specs share one copy in a process. ``tokenizer``: folder of
    another tokenizer than the model's own."""

    path: str
    options: LocalOptions = Field(default_factory=LocalOptions)
    tokenizer: str | None = None

    @classmethod
    def of(cls, path: str | Path, **options: Any) -> ModelSpec:
        """A model with these options. Raises ConfigurationError."""
        return cls(str(path), parse_options(LocalOptions, options, "options"))


@dataclass(frozen=True)
class TaskSpec:
    """A task and how a worker holds it. ``start``: file of the weights that everything starts from; None: fresh."""

    task: str
    folder: str
    inputs: str | None = None
    start: str | None = None
    options: LocalOptions = Field(default_factory=LocalOptions)

    @property
    def place(self) -> tuple[Path | str, str]:
        """File or module of the task, and the name in it ('' for the module itself)."""
        place, _, name = self.task.partition(":")
        return (Path(self.folder, place).resolve() if place.endswith(".py") else place), name

    def digest(self) -> str:
        """SHA-256 of the task's file, the inputs and the start; imports nothing. Raises ConfigurationError."""
        sha = hashlib.sha256(f"{self.task}\n{self.inputs}\n{self.start}\n".encode())
        place, _ = self.place
        parts = [str(p) for p in (place if isinstance(place, Path) else None, self.inputs, self.start) if p]
        try:
            for part in parts:
                with Path(part).open("rb") as file:
                    hashlib.file_digest(file, lambda: sha)
        except OSError as error:
            why = f"{error.filename} cannot be read: {error.strerror}. Check backend.options."
            raise ConfigurationError(why) from error
        return sha.hexdigest()


Spec = ModelSpec | TaskSpec


def visible_gpus() -> int:
    """CUDA devices that this process may use, without opening one."""
    from torch.cuda import device_count

    return device_count()


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def options_of(config: RunConfig) -> LocalOptions:
    """Options of the local backend, checked against the rest of the config. Raises ConfigurationError."""
    local = config.backend.kind == "local"
    given = config.backend.options if local else config.backend.scorer.options
    options = parse_options(LocalOptions, given, "backend.options" if local else "backend.scorer.options")
    if options.fine_tuning == "full" and (options.quantisation or options.dtype == "float16"):
        raise ConfigurationError(
            "backend.options.fine_tuning: full trains the model's own weights, which float16 and quantised weights "
            "cannot take. Use dtype: float32 or bfloat16, or fine_tuning: lora."
        )
    if options.objective != "subset" and config.ensemble.start_from != "target":
        raise ConfigurationError(
            f"backend.options.objective: {options.objective} perturbs members around the target model. "
            "Set ensemble.start_from: target, or objective: subset."
        )
    unused = sorted(_LANGUAGE_ONLY & options.model_fields_set) if options.task else []
    if unused:
        raise ConfigurationError(f"backend.options.{unused[0]} is for language models; a task has no use for it.")
    if options.inputs and not options.task:
        raise ConfigurationError("backend.options.inputs belongs to a task: set backend.options.task too.")
    if options.task and local and config.backend.tokenizer:
        raise ConfigurationError("backend.tokenizer is for language models; a task reads its inputs itself.")
    if options.engine == "ray" and options.device.startswith("cuda"):
        if options.ray.gpus == 0:
            raise ConfigurationError(
                "backend.options.ray.gpus: 0 hides every GPU from an actor that has device: cuda. Give it one, or a "
                "share (0.5: two actors on a GPU), or leave it out."
            )
        if options.device != "cuda":
            raise ConfigurationError(
                f"backend.options.device: {options.device}: Ray chooses each actor's GPU. Use device: cuda."
            )
    if options.device_map and options.engine != "thread":
        raise ConfigurationError(
            "backend.options.device_map spreads one copy of the model: use it with engine: thread."
        )
    return options
