"""What a worker does: load a model once, train a group of members, or score a batch. Plain functions of picklable
values, so that a thread, a process or an actor on another machine can run them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from ...data.dataset import Dataset
from ...data.tokenizers import EncodedExample
from ...errors import CapabilityError, ConfigurationError, DataError, DaunceError, RejectedError
from ..objective import Objective
from .classifier import Classifier, Members, State
from .language import LanguageModel
from .models import check_device
from .options import ClassifierSettings, FullSettings, LoraSettings, ModelSpec, TaskSpec
from .score import (
    GPU_TOKENS,
    SCORED_TOKENS,
    Limits,
    OutOfMemoryError,
    Scored,
    default_budget,
    is_out_of_memory,
    limits_of,
    release,
)
from .store import Files, MemberResult, MemberTask, beside, encode_training
from .task import Records, load_task
from .train import fine_tune, trained_tokens

CLASS_WEIGHTS = "model.safetensors"
_IDS_PER_EXAMPLE = 2  # see TaskTokenizer
_ADAPTER_COPIES = 5
"""Float32 copies of a member's adapter: weights, gradient, two moments of AdamW, and the start."""
_FULL_BYTES = 20
"""Bytes that a full fine-tune takes a weight beside the base model: weights, float32 copies where the model is held in
half precision, gradient, two moments of AdamW, and the start."""

Own = TypeVar("Own")
"""What a member is trained on, as its kind of training reads it."""


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Members that are trained side by side. ``memory_limit`` in bytes beside the model; None: half of what is free,
    shared by ``workers`` processes. ``tokens``: most padded tokens of a pass. ``checkpoints``: of how many epochs
    before the last one the result is kept too. ``cuts``: how often a worker was killed at these members."""

    spec: ModelSpec | TaskSpec
    settings: LoraSettings | FullSettings | ClassifierSettings
    objective: Objective
    members: tuple[MemberTask, ...]
    memory_limit: int | None = None
    workers: int = 1
    checkpoints: int = 0
    tokens: int | None = None
    cuts: int = 0


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Log-probabilities under one fine-tune (a folder here, its files, or None for the base) of ``rows``: the targets
    of (ids, targets), or a task's class of (prompt, completion). ``cuts``: see TrainTask."""

    spec: ModelSpec | TaskSpec
    tuned: Path | Files | None
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
    if isinstance(task.spec, TaskSpec):
        return _score_classes(task.spec, task)
    usual = SCORED_TOKENS if task.spec.device == "cpu" else GPU_TOKENS
    tokens = max(1, usual >> task.cuts) if task.cuts else None
    answers = loaded(task.spec).target_logprobs(task.rows, adapter=_folder(task.tuned), tokens=tokens)  # type: ignore[arg-type]
    return [tuple(answer.tolist()) for answer in answers]


def run_train(task: TrainTask) -> list[MemberResult]:
    """One result a member, in order. Members that take the same number of steps are trained together, as many as memory
    allows; where a batch fails it is halved, down to single members, whose failure is their own."""
    results: dict[str, MemberResult] = {}
    alike: dict[tuple[int, str], list[tuple[MemberTask, list[Any]]]] = {}
    classes = isinstance(task.spec, TaskSpec)
    for member in task.members:
        try:
            own = read_examples(member.content, task.spec)
        except DaunceError as error:
            results[member.key] = MemberResult(member.key, error=str(error))
            continue
        # A classifier's members that are trained together have as many examples, a language model's as many steps.
        steps = len(own) if classes else -(-len(own) // task.settings.batch_size)
        alike.setdefault((steps, str(_folder(member.start))), []).append((member, own))
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
    group: Sequence[tuple[MemberTask, Own]],
    limits: Limits,
    train: Callable[[Sequence[tuple[MemberTask, Own]], int], list[MemberResult]],
    *,
    longest: int,
    device: torch.device,
    cuts: int = 0,
    halve_on: tuple[type[Exception], ...] = (),
) -> list[MemberResult]:
    """Results of all members of a group, by ``train(some of them, tokens a pass)``.

    Where memory runs out, fewer members are trained together, then fewer tokens go through the model at once; ``cuts``
    says how often that has happened before. A batch in which ``train`` raises one of ``halve_on`` is halved, down to
    single members, whose failure is their own; another DaunceError is the failure of the whole batch.
    """
    now: Limits | None = limits
    for _ in range(cuts):
        now = now and now.smaller(longest)
    waiting: list[Sequence[tuple[MemberTask, Own]]] = [group]
    results: list[MemberResult] = []
    while waiting:
        batch = waiting.pop(0)
        if now is not None and len(batch) > now.members:
            waiting[:0] = [batch[i : i + now.members] for i in range(0, len(batch), now.members)]
            continue
        try:
            if now is None:
                raise MemoryError
            results += train(batch, now.tokens)
            continue
        except Exception as error:
            if not isinstance(error, DaunceError) and not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the memory
        if is_out_of_memory(failure):
            release(device)
            now = now and Limits(len(batch), now.tokens).smaller(longest)
            if now is not None:
                waiting.insert(0, batch)
                continue
            failure = OutOfMemoryError(
                f"one member with its longest example of {longest:,} tokens could not be trained"
            )
        elif len(batch) > 1 and isinstance(failure, halve_on):
            half = (len(batch) + 1) // 2
            waiting[:0] = [batch[:half], batch[half:]]
            continue
        results += [MemberResult(member.key, error=str(failure)) for member, _ in batch]
    return results


def _train_language(task: TrainTask, group: Sequence[tuple[MemberTask, list[EncodedExample]]]) -> list[MemberResult]:
    """LoRA members together, full fine-tunes one at a time."""
    settings = task.settings
    if isinstance(settings, ClassifierSettings) or not isinstance(task.spec, ModelSpec):
        raise CapabilityError("these settings belong to a task's classifier")
    model = loaded(task.spec)
    model.fine_tunes.clear()  # those of scoring
    device, own_weights = model.adapted.device, model.adapted.own_weights
    longest = max(len(e.ids) for _, examples in group for e in examples)
    budget = task.memory_limit or default_budget(device, task.workers)
    if isinstance(settings, LoraSettings):
        numbers = settings.rank * sum(map(sum, model.adapter_shapes(settings.targets).values()))
        member_bytes, together = 4 * _ADAPTER_COPIES * numbers, len(group)
    else:
        member_bytes, together = _FULL_BYTES * sum(t.numel() for t in own_weights.values()), 1
    limits = limits_of(
        model.adapted, member_bytes=member_bytes, members=together, longest=longest, budget=budget, tokens=task.tokens
    )

    def train(batch: Sequence[tuple[MemberTask, list[EncodedExample]]], tokens: int) -> list[MemberResult]:
        start = _folder(batch[0][0].start)
        trainee = model.trainee([(examples, member.seed) for member, examples in batch], settings, start)
        earlier: list[dict[int, Files]] = [{} for _ in batch]

        def keep(k: int, epoch: int | None = None) -> Files:
            if (out := batch[k][0].out) is None:
                return _packed(lambda folder: model.save(folder, trainee, k, settings))
            model.save(beside(out, epoch), trainee, k, settings)
            return {}

        def after_epoch(epoch: int) -> None:
            if _kept(epoch, settings.n_epochs, task.checkpoints):
                for k, kept in enumerate(earlier):
                    kept[epoch] = keep(k, epoch)

        losses = fine_tune(
            model.adapted,
            trainee,
            settings,
            objective=task.objective,
            max_tokens=tokens,
            after_epoch=after_epoch,
        )
        return [
            MemberResult(m.key, keep(k), tuple(losses[k]), trained_tokens(examples, settings), earlier=earlier[k])
            for k, (m, examples) in enumerate(batch)
        ]

    halve_on = (CapabilityError, RejectedError)
    return train_in_parts(group, limits, train, longest=longest, device=device, cuts=task.cuts, halve_on=halve_on)


def _train_classes(task: TrainTask, group: Sequence[tuple[MemberTask, list[tuple[str, str]]]]) -> list[MemberResult]:
    if not isinstance(task.settings, ClassifierSettings) or not isinstance(task.spec, TaskSpec):
        raise CapabilityError("a classifier's settings belong to a task")
    settings = task.settings
    classifier, data = opened(task.spec)
    first = group[0][0].start or (None if task.spec.start is None else Path(task.spec.start))
    start = None if first is None else read_state(first)
    if start is not None:
        classifier.check(start)

    def train(batch: Sequence[tuple[MemberTask, list[tuple[str, str]]]], tokens: int) -> list[MemberResult]:
        # Equal records of one file are examples of their own: the second one is not the first one again.
        places: dict[tuple[str, str, int], int] = {}
        subsets = []
        for _, records in batch:
            seen: dict[tuple[str, str], int] = {}
            subset = []
            for record in records:
                seen[record] = seen.get(record, 0) + 1
                subset.append(places.setdefault((*record, seen[record]), len(places)))
            subsets.append(subset)
        inputs, labels = data.read([(prompt, completion) for prompt, completion, _ in places])
        earlier: list[dict[int, Files]] = [{} for _ in batch]

        def after_epoch(epoch: int, first: int, members: Members) -> None:
            if _kept(epoch, settings.n_epochs, task.checkpoints):
                for k in range(len(members)):
                    earlier[first + k][epoch] = _state_files(members.state(k))

        members = classifier.train_subsets(
            inputs,
            labels,
            np.array(subsets),
            [member.seed for member, _ in batch],
            settings,
            start=start,
            objective=task.objective,
            memory_limit=task.memory_limit,
            after_epoch=after_epoch if task.checkpoints else None,
        )
        count = settings.n_epochs * _IDS_PER_EXAMPLE
        return [
            MemberResult(m.key, _state_files(members.state(k)), trained_tokens=count * len(records), earlier=earlier[k])
            for k, (m, records) in enumerate(batch)
        ]

    limits, device = Limits(len(group), _IDS_PER_EXAMPLE), torch.device(task.spec.device)
    halve_on = (DaunceError,)
    return train_in_parts(
        group, limits, train, longest=_IDS_PER_EXAMPLE, device=device, cuts=task.cuts, halve_on=halve_on
    )


def _score_classes(spec: TaskSpec, task: ScoreTask) -> list[tuple[float, ...]]:
    classifier, data = opened(spec)
    given = task.tuned or (None if spec.start is None else Path(spec.start))
    state = classifier.fresh(0) if given is None else read_state(given)
    classifier.check(state)
    values = classifier.log_probabilities(state, *data.read(task.rows))  # type: ignore[arg-type]
    if not np.isfinite(values).all():
        raise RejectedError("the model gives losses that are not finite")
    return [(float(v),) for v in values]


def read_state(given: Path | Files) -> State:
    """Weights from a safetensors file, a folder with one, or its files. Raises ConfigurationError."""
    try:
        if isinstance(given, Path):
            given = given / CLASS_WEIGHTS if given.is_dir() else given
            return dict(load_file(given))
        return dict(load(given[CLASS_WEIGHTS]))
    except (OSError, KeyError, SafetensorError) as error:
        raise ConfigurationError(f"weights cannot be read: {error}") from error


def _state_files(state: State) -> Files:
    return {CLASS_WEIGHTS: save({n: t.cpu().contiguous() for n, t in state.items()})}


def _kept(epoch: int, n_epochs: int, checkpoints: int) -> bool:
    """Whether an epoch (from 1) is one of the last ``checkpoints`` before the final one."""
    return n_epochs - checkpoints <= epoch < n_epochs


def _packed(save: Callable[[Path], None]) -> Files:
    with tempfile.TemporaryDirectory(prefix="daunce-finetune-") as folder:
        out = Path(folder) / "model"
        save(out)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _folder(given: Path | Files | None) -> Path | None:
    return given if given is None or isinstance(given, Path) else _unpacked(given)


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="daunce-adapters-")


def _unpacked(files: Mapping[str, bytes]) -> Path:
    """The folder of these files in this process's scratch folder; written once for the same content."""
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
    folder = Path(_scratch().name) / digest
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=_scratch().name))
        for name in sorted(files):
            (part / os.path.basename(name)).write_bytes(files[name])
        part.rename(folder)
    return folder
