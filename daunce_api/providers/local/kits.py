"""What the trainer and the scorer ask of a family of models: language models, or a task's classifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...config import RunConfig
from ...data.tokenizers import EncodedExample, LocalTokenizer, Tokenizer
from .adapters import CONFIG
from .devices import check_device
from .full import is_full
from .member_work import Files, MemberTask
from .models import resolve_model
from .options import (
    CLASSIFIER_HYPERPARAMETERS,
    HYPERPARAMETERS,
    LocalOptions,
    classifier_settings_of,
    objective_of,
    options_of,
    settings_of,
)
from .task_tokens import TaskTokenizer
from .task_work import WEIGHTS, TaskScoring, TaskTraining, check_task, run_task_scoring, run_task_training
from .tasks import ScoreTask, TrainTask, run_score, run_train

# What a run gains from larger groups, against later results: tests/benchmarks/RESULTS-local.md.
_ADAPTERS = 8
_CLASSIFIERS = 32


@dataclass(frozen=True, slots=True)
class Work:
    """A function of this package and the task that an engine runs it on."""

    function: Callable[[Any], Any]
    task: Any


class Kit(Protocol):
    """One family of models."""

    hyperparameters: frozenset[str]
    prompts_per_request: int
    fingerprint: str
    members_at_a_time: int
    """Of a group, where the options do not say."""
    writes_folders: bool
    """Whether workers that share this machine's folders write a fine-tune themselves, because it is large."""

    @property
    def context_tokens(self) -> int | None: ...

    def tokenizer(self) -> Tokenizer: ...

    def check_base(self) -> Work | None:
        """Raises ConfigurationError where the base model cannot be used; what of it a worker has to find out."""
        ...

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        """Raises RejectedError where they cannot be used."""
        ...

    def is_model(self, folder: Path) -> bool:
        """Whether a folder of the user's holds a fine-tune."""
        ...

    def train(self, hyperparameters: Mapping[str, Any], members: Sequence[MemberTask]) -> Work:
        """Work whose answer is a list of ``MemberResult``; the members agree in where they start."""
        ...

    def score(self, tuned: Path | Files | None, batch: Sequence[EncodedExample]) -> Work:
        """Work whose answer is one tuple of log-probabilities an example."""
        ...


def kit_of(config: RunConfig) -> Kit:
    """The kit that a config asks for. Raises ConfigurationError."""
    options = options_of(config)
    return TaskKit(config, options) if options.task else LanguageKit(config, options)


def _kept_epochs(config: RunConfig, members: Sequence[MemberTask]) -> int:
    """Epochs before the last one whose models are kept: none of the target's, which is not scored epoch by epoch."""
    is_target = config.ensemble.start_from == "target" and members[0].start is None
    return 0 if is_target else config.ensemble.checkpoints - 1


class LanguageKit:
    """Causal language models, by LoRA or full fine-tuning."""

    def __init__(self, config: RunConfig, options: LocalOptions) -> None:
        self._config, self._options = config, options
        own = config.backend.kind == "local"  # otherwise the tokenizer belongs to whoever trains
        self._spec = spec = options.spec(config.backend.model, config.backend.tokenizer if own else None)
        self.hyperparameters = HYPERPARAMETERS[options.fine_tuning]
        self.prompts_per_request = 256
        self.fingerprint = (
            f"local:{spec.path}:{spec.device.partition(':')[0]}:{spec.dtype}:{spec.quantisation or 'plain'}"
        )
        self.members_at_a_time = 1 if options.fine_tuning == "full" else _ADAPTERS
        self.writes_folders = options.fine_tuning == "full"

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence of the model, from its config.json."""
        content = json.loads((resolve_model(self._config.backend.model)[1] / "config.json").read_text())
        value = content.get("max_position_embeddings", content.get("n_positions"))
        return value if isinstance(value, int) else None

    def tokenizer(self) -> Tokenizer:
        return LocalTokenizer(self._config.backend.tokenizer or resolve_model(self._config.backend.model)[1])

    def check_base(self) -> None:
        resolve_model(self._config.backend.model)
        if self._options.engine != "ray":  # the machines of a cluster have devices of their own
            check_device(self._options.device)

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        settings_of(hyperparameters, self._options.fine_tuning)

    def is_model(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() or is_full(folder)

    def train(self, hyperparameters: Mapping[str, Any], members: Sequence[MemberTask]) -> Work:
        options = self._options
        task = TrainTask(
            self._spec,
            settings_of(hyperparameters, options.fine_tuning),
            objective_of(options, from_base=members[0].start is None),
            tuple(members),
            memory_limit=options.memory_limit,
            workers=options.worker_count,
            checkpoints=_kept_epochs(self._config, members),
        )
        return Work(run_train, task)

    def score(self, tuned: Path | Files | None, batch: Sequence[EncodedExample]) -> Work:
        return Work(run_score, ScoreTask(self._spec, tuned, tuple((e.ids, e.targets) for e in batch)))


class TaskKit:
    """A classifier of the user's own. Nothing of it is imported here, only in workers."""

    def __init__(self, config: RunConfig, options: LocalOptions) -> None:
        self._config, self._options = config, options
        self._spec = options.task_spec(config)
        self.hyperparameters = CLASSIFIER_HYPERPARAMETERS
        self.prompts_per_request = 4096
        self.fingerprint = f"local:{self._spec.task}:{options.device.partition(':')[0]}"
        self.members_at_a_time = _CLASSIFIERS
        self.writes_folders = False

    @property
    def context_tokens(self) -> None:
        return None

    def tokenizer(self) -> Tokenizer:
        return TaskTokenizer(self._spec)

    def check_base(self) -> Work:
        self._spec.digest()
        return Work(check_task, self._spec)

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        classifier_settings_of(hyperparameters)

    def is_model(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file()

    def train(self, hyperparameters: Mapping[str, Any], members: Sequence[MemberTask]) -> Work:
        options = self._options
        task = TaskTraining(
            self._spec,
            classifier_settings_of(hyperparameters),
            objective_of(options, from_base=members[0].start is None),
            tuple(members),
            memory_limit=options.memory_limit,
            checkpoints=_kept_epochs(self._config, members),
        )
        return Work(run_task_training, task)

    def score(self, tuned: Path | Files | None, batch: Sequence[EncodedExample]) -> Work:
        records = tuple((e.example.prompt, e.example.completion) for e in batch)
        return Work(run_task_scoring, TaskScoring(self._spec, tuned, records))
