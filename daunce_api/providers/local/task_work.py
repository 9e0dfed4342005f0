"""What a worker does for a classifier's task: train a batch of members, or measure examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from ...errors import ConfigurationError, DaunceError, RejectedError
from ..objective import Objective
from .classifier import Classifier, Members, State
from .devices import check_device
from .member_work import Files, MemberResult, MemberTask, train_in_halves, training_records, wanted
from .recipes import ClassifierSettings
from .task import Material, TaskSpec, load_task

WEIGHTS = "model.safetensors"
IDS_PER_EXAMPLE = 2
"""See ``task_tokens``."""

Records = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TaskTraining:
    """Members that are trained side by side; ``memory_limit`` in bytes bounds how many at once. ``checkpoints``: of
    how many epochs before the last one the result is kept too."""

    spec: TaskSpec
    settings: ClassifierSettings
    objective: Objective
    members: tuple[MemberTask, ...]
    memory_limit: int | None = None
    checkpoints: int = 0


@dataclass(frozen=True, slots=True)
class TaskScoring:
    """log p of the class of each record under one model: a folder here, its files, or None for the base."""

    spec: TaskSpec
    model: Path | Files | None
    records: tuple[tuple[str, str], ...]


@lru_cache(maxsize=1)
def opened(spec: TaskSpec) -> tuple[Classifier, Material]:
    """The classifier and the data of a spec, in this process. Imports the task."""
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    check_device(spec.device)
    task = load_task(spec)
    try:
        classifier = Classifier(task.model_factory, loss=task.loss, device=spec.device)
    except Exception as error:  # the user's code may fail in any way
        raise ConfigurationError(f"{spec.task}: model_factory() failed: {type(error).__name__}: {error}") from error
    return classifier, Material(task, spec.inputs)


def check_task(spec: TaskSpec) -> None:
    """Raises ConfigurationError where the task cannot be used."""
    classifier, _ = opened(spec)
    if spec.start is not None:
        classifier.check(read_state(Path(spec.start)))


def read_state(given: Path | Files) -> State:
    """Weights from a safetensors file, a folder with one, or its files. Raises ConfigurationError."""
    try:
        if isinstance(given, Path):
            given = given / WEIGHTS if given.is_dir() else given
            return dict(load_file(given))
        return dict(load(given[WEIGHTS]))
    except (OSError, KeyError, SafetensorError) as error:
        raise ConfigurationError(f"weights cannot be read: {error}") from error


def run_task_training(task: TaskTraining) -> list[MemberResult]:
    """One result a member, in order. Members of equal size and start are trained together; where that fails they are
    halved, down to single members, whose failure is their own."""
    results: dict[str, MemberResult] = {}
    groups: dict[tuple[int, str], list[tuple[MemberTask, Records]]] = {}
    for member in task.members:
        try:
            data = training_records(member.content)
        except DaunceError as error:
            results[member.key] = MemberResult(member.key, error=str(error))
            continue
        records = [(e.prompt, e.completion) for e in data]
        groups.setdefault((len(records), repr(member.start)), []).append((member, records))
    trained = train_in_halves(groups.values(), lambda group: _train(task, group), halve_on=(DaunceError,))
    results.update({r.key: r for r in trained})
    return [results[m.key] for m in task.members]


def _train(task: TaskTraining, group: Sequence[tuple[MemberTask, Records]]) -> list[MemberResult]:
    classifier, material = opened(task.spec)
    # Equal records of one file are examples of their own: the second one is not the first one again.
    places: dict[tuple[str, str, int], int] = {}
    subsets = []
    for _, records in group:
        seen: dict[tuple[str, str], int] = {}
        subset = []
        for record in records:
            seen[record] = seen.get(record, 0) + 1
            subset.append(places.setdefault((*record, seen[record]), len(places)))
        subsets.append(subset)
    inputs, labels = material.read([(prompt, completion) for prompt, completion, _ in places])
    start = group[0][0].start or (None if task.spec.start is None else Path(task.spec.start))
    state = None if start is None else read_state(start)
    if state is not None:
        classifier.check(state)
    earlier: list[dict[int, Files]] = [{} for _ in group]

    def after_epoch(epoch: int, first: int, members: Members) -> None:
        if wanted(epoch, task.settings.n_epochs, task.checkpoints):
            for k in range(len(members)):
                earlier[first + k][epoch] = _files(members.state(k))

    members = classifier.train_subsets(
        inputs,
        labels,
        np.array(subsets),
        [member.seed for member, _ in group],
        task.settings,
        start=state,
        objective=task.objective,
        memory_limit=task.memory_limit,
        after_epoch=after_epoch if task.checkpoints else None,
    )
    count = task.settings.n_epochs * IDS_PER_EXAMPLE
    return [
        MemberResult(
            member.key,
            _files(members.state(k)),
            trained_tokens=count * len(records),
            earlier=earlier[k],
        )
        for k, (member, records) in enumerate(group)
    ]


def _files(state: State) -> Files:
    return {WEIGHTS: save({n: t.cpu().contiguous() for n, t in state.items()})}


def run_task_scoring(task: TaskScoring) -> list[tuple[float]]:
    """log p (nats, at most 0) of each record's class. Raises RejectedError where a loss is not finite."""
    classifier, material = opened(task.spec)
    given = task.model or (None if task.spec.start is None else Path(task.spec.start))
    state = classifier.fresh(0) if given is None else read_state(given)
    classifier.check(state)
    inputs, labels = material.read(task.records)
    values = classifier.log_probabilities(state, inputs, labels)
    if not np.isfinite(values).all():
        raise RejectedError("the model gives losses that are not finite")
    return [(float(v),) for v in values]
