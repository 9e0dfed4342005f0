"""What a worker does: load a model once, train a group of members, or score a batch. Plain functions of picklable
values, so that a thread, a process or an actor on another machine can run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...data.dataset import Dataset
from ...data.tokenizers import EncodedExample
from ...errors import ConfigurationError, DataError, DaunceError, RejectedError
from ..objective import Objective
from .classifier import Classifier, Members, State
from .engines import WorkerLostError
from .language import LanguageModel
from .memory import Limits, OutOfMemoryError, Scored, default_budget, limits_of, within_memory
from .models import check_device
from .options import ClassifierSettings, FullSettings, LoraSettings, ModelSpec, TaskSpec
from .store import MemberResult, MemberTask, beside, encode_training, whole_folder
from .task import Records, load_task
from .train import fine_tune, trained_tokens

CLASS_WEIGHTS = "model.safetensors"
_IDS_PER_EXAMPLE = 2  # see TaskTokenizer
_ADAPTER_COPIES = 5
"""Float32 copies of a member's adapter: weights, gradient, two moments of AdamW, and the start."""
_FULL_BYTES = 20
"""Bytes that a full fine-tune takes a weight beside the base model: weights, float32 copies where the model is held in
half precision, gradient, two moments of AdamW, and the start."""

Group = Sequence[tuple[MemberTask, Any]]
"""Members, each with what it is trained on as its kind of training reads it."""


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Members that are trained side by side, all from the fine-tune in the folder ``start`` (None: the base model).
    ``memory_limit`` in bytes beside the model; None: half of what is free,
    shared by ``workers`` processes. ``tokens``: most padded tokens of a pass. ``checkpoints``: of how many epochs
    before the last one the result is kept too. ``cuts``: how often memory ran out at these members."""

    spec: ModelSpec | TaskSpec
    settings: LoraSettings | FullSettings | ClassifierSettings
    objective: Objective
    members: tuple[MemberTask, ...]
    start: Path | None = None
    memory_limit: int | None = None
    workers: int = 1
    checkpoints: int = 0
    tokens: int | None = None
    cuts: int = 0


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Log-probabilities under one fine-tune (its folder, or None for the base) of ``rows``: the targets of
    (ids, targets), or a task's class of (prompt, completion). ``cuts``: see TrainTask."""

    spec: ModelSpec | TaskSpec
    tuned: Path | None
    rows: tuple[Scored, ...] | tuple[tuple[str, str], ...]
    cuts: int = 0


@lru_cache(maxsize=1)
def loaded(spec: ModelSpec) -> LanguageModel:
    """The model of a spec, in this process."""
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    return LanguageModel.of(spec)


@lru_cache(maxsize=1)
def opened(spec: TaskSpec) -> tuple[Classifier, Records]:
    """The classifier and the data of a spec, in this process. Imports the task."""
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    check_device(spec.device)
    task = load_task(spec)
    try:
        classifier = Classifier(task.model_factory, loss=task.loss, device=spec.device)
    except Exception as error:  # the user's code may fail in any way
        raise ConfigurationError(f"{spec.task}: model_factory() failed: {type(error).__name__}: {error}") from error
    return classifier, Records(task, spec.inputs)


def check_task(spec: TaskSpec) -> None:
    """Raises ConfigurationError where the task cannot be used."""
    classifier, _ = opened(spec)
    if spec.start is not None:
        classifier.check(read_state(Path(spec.start)))


def run_score(task: ScoreTask) -> list[tuple[float, ...]]:
    """Log-probabilities (nats) of each sequence's targets, or of each record's class. Raises RejectedError where a loss
    of a classifier is not finite."""
    rows: Any = task.rows
    if isinstance(task.spec, TaskSpec):
        return _score_classes(task.spec, task.tuned, rows)
    model = loaded(task.spec)
    if task.cuts:
        model.forget_fine_tunes()
    answers = within_memory(lambda: model.target_logprobs(rows, adapter=task.tuned, cuts=task.cuts))
    return [tuple(answer.tolist()) for answer in answers]


def run_train(task: TrainTask) -> list[MemberResult]:
    """One result a member, in order. Members that take the same number of steps are trained together, as many as memory
    allows; where a batch fails it is halved, down to single members, whose failure is their own."""
    results: dict[str, MemberResult] = {}
    alike: dict[int, list[tuple[MemberTask, Any]]] = {}
    classes = isinstance(task.spec, TaskSpec)
    for member in task.members:
        try:
            own = read_examples(member.content, task.spec)
        except DaunceError as error:
            results[member.key] = MemberResult(member.key, error=str(error))
            continue
        # A classifier's members that are trained together have as many examples, a language model's as many steps.
        steps = len(own) if classes else -(-len(own) // task.settings.batch_size)
        alike.setdefault(steps, []).append((member, own))
    for group in alike.values():
        results.update({r.key: r for r in (_train_classes if classes else _train_language)(task, group)})
    return [results[m.key] for m in task.members]


def read_examples(content: bytes, spec: ModelSpec | TaskSpec) -> list[EncodedExample] | list[tuple[str, str]]:
    """The examples of a training file, or a task's (prompt, completion) records."""
    if not content:
        raise DataError("the training file is empty, or was deleted before it was read")
    lines = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    data = Dataset.from_records(lines, name="training file")
    if isinstance(spec, TaskSpec):
        return [(e.prompt, e.completion) for e in data]
    return encode_training(data, loaded(spec).tokenizer, loaded(spec).max_context)


def train_in_parts(
    group: Group,
    limits: Limits,
    train: Callable[[Group, int], list[MemberResult]],
    *,
    longest: int,
    cuts: int = 0,
) -> list[MemberResult]:
    """Results of all members of a group, by ``train(some of them, tokens a pass)``.

    ``cuts`` says how often memory has run out before: each time fewer members are trained together, then fewer tokens
    go through the model at once. A batch in which ``train`` raises a DaunceError is halved, down to single members,
    whose failure is their own. Raises WorkerLostError where memory runs out and there is something left to cut.
    """
    failure = OutOfMemoryError(f"one member with its longest example of {longest:,} tokens could not be trained")
    now: Limits | None = limits
    for _ in range(cuts):
        now = now and now.smaller(longest)
    if now is None:  # a worker was killed at the smallest piece
        return [MemberResult(member.key, error=str(failure)) for member, _ in group]
    members, tokens, smaller = now.members, now.tokens, now.smaller(longest)

    def parts(batch: Group) -> list[MemberResult]:
        try:
            return within_memory(lambda: train(batch, tokens))
        except WorkerLostError:
            if smaller:
                raise
            return [MemberResult(member.key, error=str(failure)) for member, _ in batch]
        except DaunceError as error:
            if len(batch) == 1:
                return [MemberResult(batch[0][0].key, error=str(error))]
        middle = (len(batch) + 1) // 2
        return parts(batch[:middle]) + parts(batch[middle:])

    batches = [group[first : first + members] for first in range(0, len(group), members)]
    return [result for batch in batches for result in parts(batch)]


def _train_language(task: TrainTask, group: Group) -> list[MemberResult]:
    """LoRA members together, full fine-tunes one at a time."""
    settings, spec = task.settings, task.spec
    assert isinstance(spec, ModelSpec)
    assert not isinstance(settings, ClassifierSettings)
    model = loaded(spec)
    model.forget_fine_tunes()
    own_weights = model.adapted.own_weights
    longest = max(len(e.ids) for _, examples in group for e in examples)
    budget = task.memory_limit or default_budget(model.adapted.device, task.workers)
    if isinstance(settings, LoraSettings):
        numbers = settings.rank * sum(map(sum, model.adapter_shapes(settings.targets).values()))
        member_bytes, together = 4 * _ADAPTER_COPIES * numbers, len(group)
    else:
        member_bytes, together = _FULL_BYTES * sum(t.numel() for t in own_weights.values()), 1
    limits = limits_of(
        model.adapted, member_bytes=member_bytes, members=together, longest=longest, budget=budget, tokens=task.tokens
    )

    def train(batch: Group, tokens: int) -> list[MemberResult]:
        data = [(examples, member.seed) for member, examples in batch]
        trainee = model.trainee(data, settings, task.start)

        def after_epoch(epoch: int) -> None:
            if _kept(epoch, task):
                for k, (member, _) in enumerate(batch):
                    model.save(beside(member.out, epoch), trainee, k)

        losses = fine_tune(
            model.adapted, trainee, settings, objective=task.objective, max_tokens=tokens, after_epoch=after_epoch
        )
        for k, (member, _) in enumerate(batch):
            model.save(member.out, trainee, k)
        return [
            MemberResult(m.key, tuple(losses[k]), trained_tokens(examples, settings))
            for k, (m, examples) in enumerate(batch)
        ]

    return train_in_parts(group, limits, train, longest=longest, cuts=task.cuts)


def _train_classes(task: TrainTask, group: Group) -> list[MemberResult]:
    settings, spec = task.settings, task.spec
    assert isinstance(spec, TaskSpec)
    assert isinstance(settings, ClassifierSettings)
    classifier, data = opened(spec)
    first = task.start or (None if spec.start is None else Path(spec.start))
    start = None if first is None else read_state(first)
    if start is not None:
        classifier.check(start)

    def train(batch: Group, tokens: int) -> list[MemberResult]:
        places: dict[tuple[str, str], int] = {}
        subsets = [[places.setdefault(record, len(places)) for record in records] for _, records in batch]
        inputs, labels = data.read(list(places))

        def after_epoch(epoch: int, first: int, members: Members) -> None:
            if _kept(epoch, task):
                for k in range(len(members)):
                    _save_state(beside(batch[first + k][0].out, epoch), members.state(k))

        members = classifier.train(
            inputs,
            labels,
            np.array(subsets),
            [member.seed for member, _ in batch],
            settings,
            start=start,
            objective=task.objective,
            memory_limit=task.memory_limit,
            after_epoch=after_epoch,
        )
        for k, (member, _) in enumerate(batch):
            _save_state(member.out, members.state(k))
        count = settings.n_epochs * _IDS_PER_EXAMPLE
        return [MemberResult(member.key, trained_tokens=count * len(records)) for member, records in batch]

    limits = Limits(len(group), _IDS_PER_EXAMPLE)
    return train_in_parts(group, limits, train, longest=_IDS_PER_EXAMPLE, cuts=task.cuts)


def _score_classes(spec: TaskSpec, tuned: Path | None, rows: Sequence[tuple[str, str]]) -> list[tuple[float, ...]]:
    classifier, data = opened(spec)
    given = tuned or (None if spec.start is None else Path(spec.start))
    state = classifier.fresh(0) if given is None else read_state(given)
    classifier.check(state)
    values = classifier.log_probabilities(state, *data.read(rows))
    if not np.isfinite(values).all():
        raise RejectedError("the model gives losses that are not finite")
    return [(float(v),) for v in values]


def read_state(given: Path) -> State:
    """Weights from a safetensors file, or a folder with one. Raises ConfigurationError."""
    try:
        return dict(load_file(given / CLASS_WEIGHTS if given.is_dir() else given))
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"weights cannot be read: {error}") from error


def _save_state(out: Path, state: State) -> None:
    with whole_folder(out) as part:
        save_file({n: t.cpu().contiguous() for n, t in state.items()}, part / CLASS_WEIGHTS)


def _kept(epoch: int, task: TrainTask) -> bool:
    """Whether an epoch (from 1) is one of the last ones before the final one whose result is kept too."""
    return task.settings.n_epochs - task.checkpoints <= epoch < task.settings.n_epochs
