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
from ...data.tokenizers import EncodedExample, encode_training
from ...errors import ConfigurationError, DataError, DaunceError, RejectedError
from ..objective import Objective
from .classifier import Classifier, Members, State
from .engines import WorkerLostError
from .language import LanguageModel
from .memory import Limits, default_budget, limits_of, within_memory
from .models import check_device
from .options import ClassifierSettings, FullSettings, LocalOptions, LoraSettings, ModelSpec, Spec, TaskSpec
from .store import MemberResult, MemberTask, beside, whole_folder
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
    ``checkpoints``: of how many epochs before the last one the result is kept too. ``cuts``: how often memory ran out
    at these members."""

    spec: Spec
    settings: LoraSettings | FullSettings | ClassifierSettings
    objective: Objective
    members: tuple[MemberTask, ...]
    start: Path | None = None
    checkpoints: int = 0
    cuts: int = 0


@lru_cache(maxsize=1)
def loaded(spec: ModelSpec) -> LanguageModel:
    """The model of a spec, in this process."""
    _set_threads(spec.options)
    return LanguageModel.load(spec)


def _set_threads(options: LocalOptions) -> None:
    if options.device == "cpu":
        torch.set_num_threads(options.threads)


@lru_cache(maxsize=1)
def opened(spec: TaskSpec) -> tuple[Classifier, Records]:
    """The classifier and the data of a spec, in this process. Imports the task."""
    _set_threads(spec.options)
    check_device(spec.options.device)
    task = load_task(spec)
    try:
        classifier = Classifier(task.model_factory, loss=task.loss, device=spec.options.device)
    except Exception as error:  # the user's code may fail in any way
        raise ConfigurationError(f"{spec.task}: model_factory() failed: {type(error).__name__}: {error}") from error
    return classifier, Records(task, spec.inputs)


def check_task(spec: TaskSpec) -> None:
    """Raises ConfigurationError where the task cannot be used."""
    _state(spec)


def run_score(spec: Spec, tuned: Path | None, rows: Sequence[Any], cuts: int = 0) -> list[tuple[float, ...]]:
    """Log-probabilities (nats) under one fine-tune (its folder, or None for the base) of ``rows``: the targets of each
    (ids, targets), or a task's class of each (prompt, completion). ``cuts``: see TrainTask. Raises RejectedError where
    a loss of a classifier is not finite."""
    if isinstance(spec, TaskSpec):
        return _score_classes(spec, tuned, rows)
    model = loaded(spec)
    if cuts:
        model.forget_fine_tunes()
    answers = within_memory(lambda: model.target_logprobs(rows, adapter=tuned, cuts=cuts))
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


def read_examples(content: bytes, spec: Spec) -> list[EncodedExample] | list[tuple[str, str]]:
    """The examples of a training file, or a task's (prompt, completion) records."""
    if not content:
        raise DataError("the training file is empty, or was deleted before it was read")
    lines = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    data = Dataset.from_records(lines, name="training file")
    if isinstance(spec, TaskSpec):
        return [(e.prompt, e.completion) for e in data]
    return encode_training(data, loaded(spec).tokenizer, loaded(spec).max_context)


def train_in_parts(
    group: Group, limits: Limits, train: Callable[[Group, int], list[MemberResult]], *, longest: int, cuts: int = 0
) -> list[MemberResult]:
    """Results of all members of a group, by ``train(some of them, tokens a pass)``.

    ``cuts`` says how often memory has run out before: each time fewer members are trained together, then fewer tokens
    go through the model at once. A batch in which ``train`` raises a DaunceError is halved, down to single members,
    whose failure is their own. Raises WorkerLostError where memory runs out and there is something left to cut.
    """
    failure = (
        f"out of memory: one member with its longest example of {longest:,} tokens could not be trained. Set "
        "backend.options.gradient_checkpointing: true, dtype: bfloat16, quantisation: 8bit or 4bit, fewer workers, a "
        "smaller lora_rank or shorter examples; for a model that one machine cannot hold use kind: tinker with a "
        "Tinker-compatible server."
    )
    now: Limits | None = limits
    for _ in range(cuts):
        now = now and now.smaller(longest)
    if now is None:  # a worker was killed at the smallest piece
        return [MemberResult(member.key, error=failure) for member, _ in group]
    members, tokens, smaller = now.members, now.tokens, now.smaller(longest)

    def parts(batch: Group) -> list[MemberResult]:
        try:
            return within_memory(lambda: train(batch, tokens))
        except WorkerLostError:
            if smaller:
                raise
            return [MemberResult(member.key, error=failure) for member, _ in batch]
        except DaunceError as error:
            if len(batch) == 1:
                return [MemberResult(batch[0][0].key, error=str(error))]
        middle = (len(batch) + 1) // 2
        return parts(batch[:middle]) + parts(batch[middle:])

    batches = [group[first : first + members] for first in range(0, len(group), members)]
    return [result for batch in batches for result in parts(batch)]


def _train_language(task: TrainTask, group: Group) -> list[MemberResult]:
    """LoRA members together, full fine-tunes one at a time."""
    settings, spec, options = task.settings, task.spec, task.spec.options
    assert isinstance(spec, ModelSpec)
    assert not isinstance(settings, ClassifierSettings)
    model = loaded(spec)
    model.forget_fine_tunes()
    longest = max(len(e.ids) for _, examples in group for e in examples)
    budget = options.memory_limit or default_budget(model.adapted.device, options.worker_count)
    if isinstance(settings, LoraSettings):
        numbers = settings.rank * sum(map(sum, model.adapter_shapes(settings.targets).values()))
        member_bytes, together = 4 * _ADAPTER_COPIES * numbers, len(group)
    else:
        member_bytes, together = _FULL_BYTES * sum(t.numel() for t in model.adapted.own_weights.values()), 1
    tokens = options.tokens_per_pass
    limits = limits_of(model.adapted, member_bytes, members=together, longest=longest, budget=budget, tokens=tokens)

    def train(batch: Group, tokens: int) -> list[MemberResult]:
        data = [(examples, member.seed) for member, examples in batch]
        trainee = model.trainee(data, settings, task.start)

        def after_epoch(epoch: int) -> None:
            if _kept(epoch, task):
                for k, (member, _) in enumerate(batch):
                    model.save(beside(member.out, epoch), trainee, k)

        fine_tune(
            model.adapted, trainee, settings, objective=task.objective, max_tokens=tokens, after_epoch=after_epoch
        )
        for k, (member, _) in enumerate(batch):
            model.save(member.out, trainee, k)
        return [MemberResult(member.key, trained_tokens(examples, settings)) for member, examples in batch]

    return train_in_parts(group, limits, train, longest=longest, cuts=task.cuts)


def _train_classes(task: TrainTask, group: Group) -> list[MemberResult]:
    settings, spec = task.settings, task.spec
    assert isinstance(spec, TaskSpec)
    assert isinstance(settings, ClassifierSettings)
    classifier, data = opened(spec)
    start = _state(spec, task.start)

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
            memory_limit=spec.options.memory_limit,
            after_epoch=after_epoch,
        )
        for k, (member, _) in enumerate(batch):
            _save_state(member.out, members.state(k))
        count = settings.n_epochs * _IDS_PER_EXAMPLE
        return [MemberResult(member.key, count * len(records)) for member, records in batch]

    limits = Limits(len(group), _IDS_PER_EXAMPLE)
    return train_in_parts(group, limits, train, longest=_IDS_PER_EXAMPLE, cuts=task.cuts)


def _score_classes(spec: TaskSpec, tuned: Path | None, rows: Sequence[tuple[str, str]]) -> list[tuple[float, ...]]:
    classifier, data = opened(spec)
    values = classifier.log_probabilities(_state(spec, tuned) or classifier.fresh(0), *data.read(rows))
    if not np.isfinite(values).all():
        raise RejectedError("the model gives losses that are not finite")
    return [(float(v),) for v in values]


def _state(spec: TaskSpec, tuned: Path | None = None) -> State | None:
    """Weights of a fine-tune's folder, else those that everything starts from; None: fresh ones. Raises
    ConfigurationError where they cannot be read or belong to another model."""
    classifier, _ = opened(spec)
    file = spec.start if tuned is None else tuned / CLASS_WEIGHTS
    if file is None:
        return None
    try:
        state = dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"weights cannot be read: {error}") from error
    classifier.check(state)
    return state


def _save_state(out: Path, state: State) -> None:
    with whole_folder(out) as part:
        save_file({n: t.cpu().contiguous() for n, t in state.items()}, part / CLASS_WEIGHTS)


def _kept(epoch: int, task: TrainTask) -> bool:
    """Whether an epoch (from 1) is one of the last ones before the final one whose result is kept too."""
    return task.settings.n_epochs - task.checkpoints <= epoch < task.settings.n_epochs
