"""Options of ``kind: local``, and how hyperparameters of a job become training settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ...config import RunConfig
from ...errors import ConfigurationError, RejectedError
from ..objective import Objective
from ..options import Options, parse_options
from .recipes import ClassifierSettings, FullSettings, LoraSettings
from .task import FRESH, TaskSpec
from .tasks import ModelSpec

FineTuning = Literal["lora", "full"]
_RECIPE = frozenset({"n_epochs", "batch_size", "learning_rate", "learning_rate_multiplier", "warmup_ratio"})
HYPERPARAMETERS: Mapping[FineTuning, frozenset[str]] = {
    "lora": _RECIPE | {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"},
    "full": _RECIPE,
}

_CLASSIFIER = {
    "n_epochs": int,
    "batch_size": int,
    "learning_rate": float,
    "optimizer": str,
    "momentum": float,
    "weight_decay": float,
    "schedule": str,
}
CLASSIFIER_HYPERPARAMETERS = frozenset(_CLASSIFIER)
_LANGUAGE_ONLY = {"dtype", "device_map", "quantisation", "gradient_checkpointing", "fine_tuning"}


class RayOptions(Options):
    """The cluster of ``engine: ray``."""

    address: str | None = Field(None, description="auto, or a cluster's address; default: one on this machine")
    cpus: float = Field(1.0, ge=0, description="CPUs of a task (one batch of members)")
    gpus: float | None = Field(None, ge=0, description="GPUs of a task; default: one where device is cuda, else none")
    retries: int = Field(3, ge=0, description="times that a lost worker's task is run again")

    @model_validator(mode="after")
    def _needs_something(self) -> RayOptions:
        if not self.cpus and self.gpus == 0:
            raise ValueError("a task needs CPUs or GPUs")
        return self


class LocalOptions(Options):
    """``backend.options`` of ``kind: local``."""

    device: str = Field("cpu", description="torch device: cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="of the frozen model")
    device_map: str | None = Field(None, description="auto: spread a model that is larger than one GPU over several")
    quantisation: Literal["8bit", "4bit"] | None = Field(None, description="frozen weights through bitsandbytes")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more computing")
    threads: int = Field(1, ge=1, description="torch threads of a worker on the CPU")
    fine_tuning: FineTuning = Field("lora", description="lora, or full: all weights of the model are trained")
    objective: Literal["subset", "influence", "fisher"] = Field("subset", description="what members minimise")
    rho: float | None = Field(None, ge=0, description="noise of the perturbed objectives; default: 10, a task's 1")
    gamma: float = Field(1.0, gt=0, description="weight of their loss term")
    task: str | None = Field(
        None, description="a classifier instead of a language model: file.py:name or module:name; ITS CODE IS RUN"
    )
    inputs: str | None = Field(None, description="of a task: .npz (array x) or .npy; a record's prompt is a row number")
    engine: Literal["processes", "thread", "ray"] = Field("processes", description="where members are trained")
    workers: int | None = Field(None, ge=1, description="processes; default: one a core on the CPU, one on a GPU")
    members_at_a_time: int | None = Field(
        None,
        ge=1,
        description="members of one group, whose results arrive together; default: 8 adapters, 32 classifiers or one "
        "full fine-tune, fewer where workers would have none. Memory decides how many of them are trained side by side",
    )
    memory_limit_gib: float | None = Field(
        None, gt=0, description="of a worker, beside the model; default: half of what is free"
    )
    ray: RayOptions = Field(default_factory=RayOptions)

    @property
    def worker_count(self) -> int:
        """Worker processes of this machine."""
        if self.engine == "thread" or (self.workers is None and self.device != "cpu"):
            return 1
        return self.workers or max(1, usable_cores() // self.threads)

    @property
    def memory_limit(self) -> int | None:
        """:attr:`memory_limit_gib` in bytes."""
        return None if self.memory_limit_gib is None else int(self.memory_limit_gib * 2**30)

    @property
    def gpus_per_task(self) -> float:
        """GPUs that a task takes of a Ray cluster, which hides all others from it."""
        return self.ray.gpus if self.ray.gpus is not None else float(self.device.startswith("cuda"))

    def spec(self, model: str, tokenizer: str | None = None) -> ModelSpec:
        """The model as a worker holds it."""
        return ModelSpec(
            path=model,
            device=self.device,
            dtype=self.dtype,
            device_map=self.device_map,
            quantisation=self.quantisation,
            gradient_checkpointing=self.gradient_checkpointing,
            threads=self.threads,
            tokenizer=tokenizer,
        )

    def task_spec(self, config: RunConfig) -> TaskSpec:
        """The classifier as a worker holds it; its files are looked up from the folder of the training data.

        Raises ConfigurationError where there is no task.
        """
        folder = config.data.train.parent
        if self.task is None:
            raise ConfigurationError("backend.options.task is not set")
        return TaskSpec(
            task=self.task,
            folder=str(folder),
            inputs=None if self.inputs is None else str(folder / self.inputs),
            start=None if config.backend.model == FRESH else str(folder / config.backend.model),
            device=self.device,
            threads=self.threads,
        )


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
                "backend.options.ray.gpus: 0 hides every GPU from a task that has device: cuda. Give it one, or a "
                "share (0.5: two tasks on a GPU), or leave it out."
            )
        if options.device != "cuda":
            raise ConfigurationError(
                f"backend.options.device: {options.device}: Ray chooses each task's GPU. Use device: cuda."
            )
    if options.device_map and options.engine != "thread":
        raise ConfigurationError(
            "backend.options.device_map spreads one copy of the model: use it with engine: thread."
        )
    return options


def objective_of(options: LocalOptions, *, from_base: bool) -> Objective:
    """The objective of one job: a job that starts from the base model makes the target, by a plain fine-tune."""
    return Objective() if from_base else Objective.of_options(options.model_dump())


def classifier_settings_of(hyperparameters: Mapping[str, Any]) -> ClassifierSettings:
    """Settings of a task's job; those left out are the defaults. Raises RejectedError for an unknown name or a value
    out of range."""
    unknown = sorted(set(hyperparameters) - CLASSIFIER_HYPERPARAMETERS)
    if unknown:
        raise RejectedError(
            f"hyperparameter {unknown[0]!r} is not known to a task; known: {', '.join(sorted(_CLASSIFIER))}"
        )
    try:
        return ClassifierSettings(**{k: _CLASSIFIER[k](v) for k, v in hyperparameters.items() if v != "auto"})
    except (ConfigurationError, ValueError) as error:
        raise RejectedError(f"hyperparameters cannot be used: {error}") from error


def settings_of(hyperparameters: Mapping[str, Any], fine_tuning: FineTuning = "lora") -> LoraSettings | FullSettings:
    """Training settings of a job's hyperparameters; ``auto`` and those left out are the defaults, and
    ``learning_rate_multiplier`` multiplies the default rate (LoRA: 1e-3, full: 5e-5).

    Raises RejectedError for an unknown name or a value out of range.
    """
    given = {k: v for k, v in hyperparameters.items() if v != "auto"}
    known = HYPERPARAMETERS[fine_tuning]
    unknown = sorted(set(given) - known)
    if unknown:
        raise RejectedError(
            f"hyperparameter {unknown[0]!r} is not known with fine_tuning: {fine_tuning}; "
            f"known: {', '.join(sorted(known))}"
        )
    if "learning_rate" in given and "learning_rate_multiplier" in given:
        raise RejectedError("give learning_rate or learning_rate_multiplier, not both")
    kind = FullSettings if fine_tuning == "full" else LoraSettings
    try:
        values: dict[str, Any] = {k: int(given[k]) for k in ("n_epochs", "batch_size") if k in given}
        values |= {k: float(given[k]) for k in ("learning_rate", "warmup_ratio") if k in given}
        if "learning_rate_multiplier" in given:
            values["learning_rate"] = kind().learning_rate * float(given["learning_rate_multiplier"])
        for name, number in (("rank", int), ("alpha", float), ("dropout", float)):
            if f"lora_{name}" in given:
                values[name] = number(given[f"lora_{name}"])
        if "lora_targets" in given:
            values["targets"] = tuple(t.strip() for t in str(given["lora_targets"]).split(",") if t.strip())
        return kind(**values)
    except (ConfigurationError, ValueError) as error:
        raise RejectedError(f"hyperparameters cannot be used: {error}") from error
